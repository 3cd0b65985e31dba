"""Distillation and DPO against their formulas, and every stage end to end at a tiny size."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import train
from conftest import ROOT, sentences
from nanomind import bins, checkpoint, objectives, stages
from nanomind.config import ModelConfig, TrainConfig, settle
from nanomind.data import IGNORE, Batch, PackedTokens
from nanomind.device import choose_device
from nanomind.model import LanguageModel
from nanomind.objectives import DPO, Distill, NextToken

CONFIG = ModelConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=48, head_dim=16,
                     max_position_embeddings=64)


def model_of(seed):
    model = LanguageModel(CONFIG).init_weights(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)) * 0.1)
    return model


def distill(alpha=0.0, temperature=2.0, teacher=1):
    return Distill(SimpleNamespace(teacher=model_of(teacher), states=None, cfg=TrainConfig(alpha=alpha, distill_temperature=temperature)))


def batch_of(rows=3, T=20, pad=0, seed=0):
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 50, (rows, T + 1), generator=draw)
    labels = torch.where(torch.rand((rows, T), generator=draw) < 0.4, tokens[:, 1:], IGNORE)
    docs = torch.zeros(rows, T, dtype=torch.long)
    if pad:
        tokens, labels, docs = (F.pad(x, (0, pad), value=value) for x, value in ((tokens, 0), (labels, IGNORE), (docs, -1)))
    return Batch(tokens[:, :T + pad], labels, docs)


def gradient(objective, model, *batches):
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss, _ = objective(model, batch)
        loss.backward()
        total += loss.item()
    return total, torch.cat([p.grad.flatten() for p in model.parameters()])


def rows_of(batch, rows):
    return Batch(batch.tokens[rows], batch.labels[rows], batch.doc_ids[rows], group=batch.group)


@pytest.fixture(params=(None, (5, 12, 4)), ids=("one block", "many blocks"))
def blocks(request, monkeypatch):
    """The head goes through its rows in blocks and chunks: once larger than these batches, as in a real run's small one, once far smaller."""
    for name, size in zip(("BLOCK", "CHUNK", "ROUND"), request.param or ()):
        monkeypatch.setattr(objectives, name, size)


# ---- distillation

@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("checkpointing", (False, True))
@pytest.mark.parametrize("share", (0.0, 0.02, 0.4, 1.0))
def test_the_last_layer_goes_on_with_the_targets_alone(share, checkpointing, dtype):
    """Behind its attention nobody looks at the other tokens: losses and gradients are those of all hidden states, of which the targets' are taken."""
    model, batch = model_of(0), batch_of(rows=4, T=90)
    model.checkpointing = checkpointing
    batch.labels = torch.where(torch.rand(batch.labels.shape, generator=torch.Generator().manual_seed(1)) < share, batch.tokens, IGNORE)
    batch.doc_ids[:, 50:], batch.doc_ids[2, 80:] = 1, -1
    seen, results = [], []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda module, x, out: seen.append(out.flatten(0, -2).size(0)))
    chosen = (batch.labels != IGNORE).flatten()
    for place in (True, False):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            if place:
                hidden = objectives.targets(model, batch)[0]
                assert seen == [360, {0.0: 0, 0.02: 128, 0.4: 256, 1.0: 360}[share]]  # filled up: see objectives.ROUND
            else:
                hidden = model(batch.tokens, batch.doc_ids).flatten(0, 1)[chosen]
            assert len(hidden) == chosen.sum()
            loss = objectives.HeadLoss.apply(hidden, model.lm_head.weight, objectives.cross_entropy(batch.labels.flatten()[chosen]), dtype)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, atol=1e-5 if dtype == torch.float32 else 0.02 * other.abs().max().item() + 1e-6, rtol=1e-5)


def test_a_student_like_its_teacher_has_nothing_to_learn():
    """Teacher and student shifted by one position against each other trained quietly in a public recipe: equal models must give 0 and gradient 0."""
    loss, grad = gradient(distill(teacher=4), model_of(4), batch_of())
    assert abs(loss) < 1e-5 and grad.abs().max() < 1e-5


@pytest.mark.parametrize("alpha, temperature", ((0.0, 1.0), (0.0, 3.0), (0.3, 2.0)))
def test_distillation_equals_the_formula_in_fp64(alpha, temperature, blocks):
    """Direction of the divergence, the factor t^2, positions: loss and gradients against the written-out formula on all logits."""
    objective, model, batch = distill(alpha, temperature), model_of(0), batch_of()
    loss, grad = gradient(objective, model, batch)
    plain, teacher = model_of(0), model_of(1)
    counted = batch.labels != IGNORE
    student_logits, teacher_logits = (m.lm_head(m(batch.tokens, batch.doc_ids))[counted].double() for m in (plain, teacher))
    p = (teacher_logits.detach() / temperature).softmax(-1)
    kl = (p * (p.log() - (student_logits / temperature).log_softmax(-1))).sum()
    expected = alpha * F.cross_entropy(student_logits, batch.labels[counted], reduction="sum") + (1 - alpha) * temperature**2 * kl
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(grad, torch.cat([q.grad.flatten() for q in plain.parameters()]), atol=1e-4, rtol=1e-4)


def test_gradient_of_the_divergence_has_its_closed_form():
    """With t^2 forgotten, or the divergence the other way round, the loss still falls: the gradient by the student's logits is t (p_student - p_teacher)."""
    draw = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 6, 50, generator=draw)
    for t in (1.0, 3.0):
        _, grad = objectives.distillation(torch.zeros(6, dtype=torch.long), lambda rows: teacher[rows], 0.0, t, {"ce": 0.0, "kl": 0.0})(student.clone(), slice(0, 6))
        torch.testing.assert_close(grad, t * ((student / t).softmax(-1) - (teacher / t).softmax(-1)), atol=1e-6, rtol=1e-5)


def test_states_kept_of_the_teacher_equal_those_computed_anew():
    """In every epoch, in any order of the rows, with documents left out before and between, and one of them twice in a batch."""
    draw = np.random.default_rng(3)
    lengths = [9, 40, 3, 17, 12, 15, 31, 28, 6, 14, 23]
    starts = np.cumsum([0, *lengths[:-1]])
    mask = draw.random(sum(lengths)) < 0.5
    mask[starts], mask[starts[2]:starts[3]] = False, False  # the third document has no target, the second is too long
    split = SimpleNamespace(tokens=draw.integers(1, 50, sum(lengths)).astype(np.uint16), starts=starts, mask=mask)
    rows = PackedTokens(split, SimpleNamespace(end_of_text=0, token_bytes=[b"x"] * 50), 32, 3, whole=True)
    assert len(rows.left_out) == 2 and rows.rows > 4
    objective, different = distill(0.3), []
    states = objectives.TeacherStates(objective.teacher, rows, choose_device("cpu", "fp32", 0))
    assert len(states.kept) == rows.targets.sum() == sum(batch.n_targets for batch in rows.every_row())  # none for what is left out
    for batch in map(rows.batch, range(6)):
        found = []
        for objective.states in (None, states):
            model = model_of(0)
            loss, _ = objective(model, batch)
            loss.backward()
            found.append([loss.detach(), *(p.grad for p in model.parameters())])
        for computed, kept in zip(*found):
            torch.testing.assert_close(kept, computed, rtol=1e-5, atol=1e-5)
        different.append(len(batch.doc_ids[:, 0].unique()))
    assert min(different) < 3  # at the end of an epoch a row came twice in a batch


def test_distillation_does_not_depend_on_padding_or_micro_batches(blocks):
    """Averages per chunk, or prompt and padding inside the divergence, change the loss with the batch's shape."""
    objective, batch = distill(0.5), batch_of()
    whole = gradient(objective, model_of(0), batch)
    padded = gradient(objective, model_of(0), batch_of(pad=7))
    split = gradient(objective, model_of(0), rows_of(batch, slice(0, 1)), rows_of(batch, slice(1, 3)))
    for other in (padded, split):
        assert other[0] == pytest.approx(whole[0], rel=1e-5)
        torch.testing.assert_close(other[1], whole[1], atol=1e-5, rtol=1e-4)


def test_divergence_is_exact_under_autocast():
    """A log-softmax in bf16 gives a divergence of a model with itself; it must be 0."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, sums = distill(teacher=4)(model_of(4), batch_of())
    assert abs(float(sums["kl"])) < 1e-5


def test_rules_are_given_fp32_whatever_the_products(monkeypatch):
    """The divergence of a model from itself is 0 in bf16 too, and a sum in fp32 hides a softmax in bf16: what is computed with is looked at."""
    seen, real, plain = set(), objectives.distillation, F.cross_entropy

    def distillation(labels, teacher, *rest):
        rule = real(labels, lambda rows: seen.add(("teacher", teacher(rows).dtype)) or teacher(rows), *rest)
        return lambda logits, rows: seen.add(("student", logits.dtype)) or rule(logits, rows)
    monkeypatch.setattr(objectives, "distillation", distillation)
    monkeypatch.setattr(F, "cross_entropy", lambda logits, *rest, **more: seen.add(("validation", logits.dtype)) or plain(logits, *rest, **more))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        distill()(model_of(0), batch_of())
        model = model_of(0)
        hidden, labels, _ = objectives.targets(model, batch_of())
        objectives.token_nll(hidden, model.lm_head.weight, labels, torch.bfloat16)
    assert seen == {(who, torch.float32) for who in ("teacher", "student", "validation")}


def test_the_teacher_is_frozen():
    """A teacher in training mode, or one that learns, is no teacher."""
    objective = distill()
    before = [p.clone() for p in objective.teacher.parameters()]
    gradient(objective, model_of(0), batch_of())
    assert not objective.teacher.training and all(p.grad is None and torch.equal(p, q) for p, q in zip(objective.teacher.parameters(), before))


# ---- preferences

def pairs_batch():
    """Two pairs in two rows: prompt of 4 tokens, answers of 3 to 6 tokens."""
    draw = torch.Generator().manual_seed(0)
    tokens, labels, docs = (torch.full((2, 24), value) for value in (0, IGNORE, -1))
    for row in range(2):
        prompt, at = torch.randint(1, 50, (4,), generator=draw), 0
        for document, length in ((2 * row, 3 + row), (2 * row + 1, 6 - row)):
            answer = torch.randint(1, 50, (length,), generator=draw)
            n = 4 + length
            tokens[row, at:at + n] = torch.cat((prompt, answer))
            labels[row, at + 3:at + n - 1] = answer
            docs[row, at:at + n] = document
            at += n
    return Batch(tokens, labels, docs, group=2)


def log_probs(model, batch):
    """(pairs, 2), the plain way: each document alone, sum of log p over its answer."""
    found = []
    for document in range(4):
        row, inside = document // 2, batch.doc_ids[document // 2] == document
        log_p = model.lm_head(model(batch.tokens[row][inside][None]))[0].log_softmax(-1)
        labels = batch.labels[row][inside]
        found.append(sum(log_p[t, labels[t]] for t in range(len(labels)) if labels[t] != IGNORE))
    return torch.stack(found).view(2, 2)


def dpo(reference, **settings):
    return DPO(SimpleNamespace(cfg=TrainConfig(**settings), reference={"train": reference, "val": reference}))


def test_dpo_starts_at_ln_2():
    """Policy and reference rendered or summed differently do not start at ln 2."""
    model, batch = model_of(0), pairs_batch()
    with torch.no_grad():
        objective = dpo(log_probs(model, batch).flatten())
    loss, metrics = objective(model, batch)
    assert loss.item() / batch.n_targets == pytest.approx(math.log(2), abs=1e-5) and abs(float(metrics["margin"])) < 1e-4


@pytest.mark.parametrize("settings", ({}, {"beta": 0.5, "label_smoothing": 0.2}, {"dpo_loss": "ipo"}))
def test_dpo_equals_the_formula(settings, blocks):
    """Averaged instead of summed log-probabilities, a wrong sign, prompt tokens inside the sum: loss and gradients against the formula on each
    document alone."""
    batch, model = pairs_batch(), model_of(0)
    with torch.no_grad():
        reference = log_probs(model_of(1), batch)
    objective = dpo(reference.flatten(), **settings)
    loss, grad = gradient(objective, model, batch)
    plain, beta, s = model_of(0), settings.get("beta", 0.1), settings.get("label_smoothing", 0.0)
    ratios = log_probs(plain, batch) - reference
    margin = ratios[:, 0] - ratios[:, 1]
    expected = ((margin - 1 / (2 * beta)) ** 2 if "dpo_loss" in settings else
                -(1 - s) * (beta * margin).sigmoid().log() - s * (-beta * margin).sigmoid().log()).sum()
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(grad, torch.cat([q.grad.flatten() for q in plain.parameters()]), atol=2e-5, rtol=1e-3)


def test_ipo_has_nothing_to_smooth():
    """The flag was taken and forgotten."""
    with pytest.raises(ValueError, match="--label-smoothing 0.2 goes with --dpo-loss sigmoid"):
        settle({"dpo_loss": "ipo", "label_smoothing": 0.2})


def test_dpo_by_hand():
    """Three tokens with log-probabilities one can add up on paper."""
    objective = dpo(torch.zeros(2), beta=0.5)
    loss, metrics = objective.loss(torch.tensor([[-1.0, -4.0]]), torch.tensor([[-2.0, -3.0]]))
    assert float(metrics["margin"]) == pytest.approx(0.5 * ((-1 + 2) - (-4 + 3))) and float(metrics["accuracy"]) == 1
    assert loss.item() == pytest.approx(-math.log(1 / (1 + math.exp(-1.0))))
    swapped, other = objective.loss(torch.tensor([[-4.0, -1.0]]), torch.tensor([[-3.0, -2.0]]))
    assert float(other["margin"]) == -float(metrics["margin"]) and swapped > loss


def trl_loss(policy, reference, lengths, kind, beta, smoothing):
    """TRL's loss of pairs, (2, n, T) log-probabilities of their tokens and (2, n) of the reference's answers, as its trainer computes it, without
    building one: a stand-in for the model hands over the log-probabilities, one for the trainer the settings."""
    trainer = pytest.importorskip("trl", reason="trl is not installed").DPOTrainer
    if not hasattr(trainer, "_compute_loss"):
        pytest.skip("this trl computes its loss elsewhere")
    mask = (torch.arange(policy.size(2)) < lengths.reshape(-1, 1)).long()  # (2 n, T)
    nothing = torch.zeros_like(mask, dtype=torch.float)
    out = SimpleNamespace(log_probs=policy.flatten(0, 1) * mask, entropy=nothing, mean_logits=nothing, is_top1=nothing > 0)
    same = lambda x: x
    settings = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=SimpleNamespace(device="cpu", gather=same, gather_for_metrics=same), aux_loss_enabled=False, ld_alpha=None,
        precompute_ref_logps=True, f_divergence_type="reverse_kl", loss_types=[kind], loss_weights=[1.0], beta=beta, label_smoothing=smoothing,
        use_weighting=False, _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0, _tp_size=1)
    completion = F.pad(mask, (1, 0))  # the prompt: one token
    inputs = {"input_ids": completion, "attention_mask": completion, "completion_mask": completion, "ref_chosen_logps": reference[0], "ref_rejected_logps": reference[1]}
    return trainer._compute_loss(settings, lambda **_: out, inputs, False)


@pytest.mark.parametrize("kind, beta, smoothing", (("sigmoid", 0.1, 0.0), ("sigmoid", 0.5, 0.0), ("aot", 0.3, 0.2), ("ipo", 0.2, 0.0)))
def test_dpo_equals_trl(kind, beta, smoothing):
    """The reference implementation's loss and its gradient by every token's log-probability. Its conservative DPO goes by the name of AOT, which sorts
    the pairs of a batch first: of one pair that changes nothing. Its IPO averages the log-probabilities over an answer, so ours is given averages."""
    draw = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 8, (2, 6), generator=draw)
    tokens = torch.randn(2, 6, 7, generator=draw, dtype=torch.double).abs().neg().requires_grad_()
    inside = torch.arange(7) < lengths[..., None]
    reference = (tokens.detach() * inside).sum(-1) + torch.randn(2, 6, generator=draw, dtype=torch.double)
    theirs = sum(trl_loss(tokens[:, i:i + 1], reference[:, i:i + 1], lengths[:, i:i + 1], kind, beta, smoothing) for i in range(6))
    size = lengths if kind == "ipo" else 1
    ours, _ = dpo(None, beta=beta, label_smoothing=smoothing, dpo_loss="ipo" if kind == "ipo" else "sigmoid").loss(
        ((tokens * inside).sum(-1) / size).T, (reference / size).T)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-6)
    for mine, other in zip(torch.autograd.grad(ours, tokens), torch.autograd.grad(theirs, tokens)):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-6)


def test_only_the_last_answer_counts(tokenizer, tokenizer_folder, tmp_path):
    """From raw pairs to log-probabilities: averaged, with the tokens of the prompt or of earlier answers among them, or with another rendering, DPO
    optimises something else. What counts is log p(answer and its end | all before it), as a difference of two whole documents' log-probabilities."""
    from data_prep.common import prepare
    prompt = [{"role": role, "content": text} for role, text in (("system", "天地"), ("user", "the fox"), ("assistant", "玄黄"), ("user", "jumps?"))]
    answers = ("over a lazy dog", "宇宙")
    record = {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(record) + "\n")
    prepare("pairs", [tmp_path / "pairs.jsonl"], tokenizer_folder, tmp_path / "x", val_share=0)
    rows = PackedTokens(bins.open_folder(tmp_path / "x").train, tokenizer, 160, 1, whole=True, group=2)
    model = LanguageModel(stages.replace(CONFIG, vocab_size=tokenizer.vocab_size, max_position_embeddings=160)).init_weights(1)
    found = objectives.reference_log_probs(model, rows, SimpleNamespace(device="cpu", autocast=lambda: torch.autocast("cpu", enabled=False)))

    def log_p(ids):
        ids = torch.tensor([[tokenizer.end_of_text, *ids]])
        return model.lm_head(model(ids))[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).sum().item()
    before = tokenizer.render_prompt(prompt)
    expected = [log_p(before + tokenizer.encode(answer) + [tokenizer.im_end]) - log_p(before) for answer in answers]
    assert found.tolist() == pytest.approx(expected, abs=1e-3)


def test_dpo_does_not_depend_on_padding_or_micro_batches():
    """Both answers of a pair are always in the same micro-batch, and no average over them depends on the batch's shape."""
    batch, reference = pairs_batch(), torch.tensor([-3.0, -9.0, -5.0, -7.0])
    whole = gradient(dpo(reference), model_of(0), batch)
    split = gradient(dpo(reference), model_of(0), rows_of(batch, slice(0, 1)), rows_of(batch, slice(1, 2)))
    assert split[0] == pytest.approx(whole[0], rel=1e-5)
    torch.testing.assert_close(split[1], whole[1], atol=1e-5, rtol=1e-4)
    padded = Batch(*(F.pad(x, (0, 9), value=value) for x, value in ((batch.tokens, 0), (batch.labels, IGNORE), (batch.doc_ids, -1))), group=2)
    assert gradient(dpo(reference), model_of(0), padded)[0] == pytest.approx(whole[0], rel=1e-5)
    twice = Batch(*(torch.cat((x, x)) for x in (batch.tokens, batch.labels, batch.doc_ids)), group=2)  # the end of an epoch: one pair in two rows
    assert twice.n_targets == 4 and gradient(dpo(reference), model_of(0), twice)[0] == pytest.approx(2 * whole[0], rel=1e-5)


# ---- whole stages

@pytest.fixture(scope="module")
def journey(data_folder, tokenizer_folder, tiny, tmp_path_factory):
    """A folder with raw chats and pairs, their data folders, and a pretrained tiny model."""
    import os

    from data_prep.common import prepare
    here, was = tmp_path_factory.mktemp("journey"), os.getcwd()
    texts = list(sentences(400, seed=5))
    chat = [{"conversations": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]} for a, b in zip(texts[::2], texts[1::2])]
    pairs = [{"chosen": c["conversations"], "rejected": [c["conversations"][0], {"role": "assistant", "content": c["conversations"][1]["content"] + "啊啊啊"}]}
             for c in chat[:80]]
    for name, records in (("chat", chat), ("pairs", pairs)):
        (here / f"{name}.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
        prepare(name, [here / f"{name}.jsonl"], tokenizer_folder, here / "data" / name, val_share=0.15, workers=1)
    os.chdir(here)
    try:
        train.main(dict(data=str(data_folder), preset=str(tiny), seq_len=64, batch_size=4, steps=30, eval_tokens=64.0, threads=1, precision="fp32"))
    finally:
        os.chdir(was)
    return here


def settings(stage, **more):
    return {**dict(stage=stage, data=f"data/{'pairs' if stage == 'dpo' else 'chat'}", seq_len=128, batch_size=2, steps=12, eval_tokens=256.0, threads=1,
                   precision="fp32"), **more}


def stages_in(journey, monkeypatch):
    monkeypatch.chdir(journey)
    if not Path("out/demo/sft/model.safetensors").is_file():
        assert train.main(settings("sft", steps=30, lr=0.01)) == 0


def records(folder, key):
    return [line for line in map(json.loads, (Path(folder) / "log.jsonl").read_text().splitlines()) if key in line]


def test_sft_and_chat(journey, monkeypatch, capsys):
    """From the pretrained model of the same run, answers only, to a model that `sample.py` chats with."""
    import sample
    stages_in(journey, monkeypatch)
    found = records("out/demo/sft", "val_loss")
    assert found[-1]["val_loss"] < found[0]["val_loss"] and {"ended", "distinct_2", "repeated_4"} <= found[-1].keys()
    result = subprocess.run([sys.executable, str(ROOT / "sample.py"), "--auto", "--max-new-tokens", "5"], capture_output=True, text=True, timeout=120, input="")
    assert result.returncode == 0 and "请介绍一下自己。" in result.stdout, result.stderr
    for arguments, expected in ((["--prompt", "天地玄黄<|im_end|>", "--system", "宇宙", "--max-new-tokens", "5"], "天地玄黄<|im_end|>"),
                                (["--compare", "out/demo/pretrain", "out/demo/sft", "--prompt", "天", "--max-new-tokens", "4"], "out/demo/sft: 天")):
        monkeypatch.setattr(sys, "argv", ["sample.py", *arguments, "--threads", "1"])
        sample.main()
        assert expected in capsys.readouterr().out


def test_the_batch_the_model_receives(journey, monkeypatch, capsys):
    """A mask that is lost between the data and the batch trains on the questions too; a shift forgotten or made twice, on the wrong token. What counts
    in the real loop's batches is each answer and its end token, and the log says what share that is."""
    stages_in(journey, monkeypatch)
    seen, real = [], NextToken.__call__
    monkeypatch.setattr(NextToken, "__call__", lambda self, model, batch: seen.append(batch) or real(self, model, batch))
    train.main(settings("sft", run="seen", init="out/demo/pretrain", steps=6))
    answers = {json.loads(line)["conversations"][1]["content"] + "<|im_end|>" for line in Path("chat.jsonl").read_text(encoding="utf-8").splitlines()}
    tokenizer, count = bins.open_folder("data/chat").tokenizer, 0
    for batch in seen:
        counted = batch.labels != IGNORE
        assert torch.equal(batch.tokens[:, 1:][counted[:, :-1]], batch.labels[:, :-1][counted[:, :-1]]) and not counted[:, -1].any()
        for document in batch.places()[batch.doc_ids >= 0].unique():
            assert tokenizer.decode(batch.labels[counted & (batch.places() == document)].tolist()) in answers
            count += 1
    assert count > 20 and "% supervised" in capsys.readouterr().out


def test_chats_that_are_too_long_leave_a_finite_loss(journey, monkeypatch, tokenizer_folder, capsys):
    """A prompt longer than the row leaves no target, and 0 / 0 is NaN: with half of the chats too long they are left out, counted, and it trains."""
    from data_prep.common import prepare
    stages_in(journey, monkeypatch)
    chats = [{"conversations": [{"role": "user", "content": "天地" * (200 if i % 2 else 3)}, {"role": "assistant", "content": f"玄黄 {i}"}]} for i in range(60)]
    Path("long.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    prepare("chat", ["long.jsonl"], tokenizer_folder, "data/long", val_share=0, workers=1, overwrite=True)
    train.main(settings("sft", run="long", init="out/demo/pretrain", data="data/long"))
    assert "left out 30 longer than 128 tokens" in capsys.readouterr().out
    assert all(math.isfinite(line["loss"]) and 0 < line["loss"] < 10 for line in records("out/long/sft", "loss"))
    Path("longest.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats[1::2]))
    prepare("chat", ["long.jsonl"], tokenizer_folder, "data/valued", val=["longest.jsonl"], workers=1, overwrite=True)
    assert train.main(settings("sft", run="valued", init="out/demo/pretrain", data="data/valued")) == 0  # one long chat in a hundred can be all of it
    said = capsys.readouterr().out
    assert "val: nothing to validate on: " in said and "left out 30 longer than 128 tokens" in said and "no validation documents" in said


def test_one_sample_learnt_by_heart_ends_by_itself(tokenizer, tokenizer_folder, tmp_path, capsys):
    """An end token that is masked, or is another one than the chat stops at, gives a model that never stops. Taught one conversation through the
    training data and asked through the chat, it must say its answers, to the letter, and stop."""
    import sample
    from data_prep.common import prepare
    from nanomind.generate import Sampling
    talk = ["the fox?", "天地玄黄 over a dog。", "宇宙", "洪荒\n"]
    chat = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(talk)]
    (tmp_path / "one.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    prepare("chat", [tmp_path / "one.jsonl"], tokenizer_folder, tmp_path / "x", val_share=0)
    rows = PackedTokens(bins.open_folder(tmp_path / "x").train, tokenizer, 96, 1, whole=True)
    model = LanguageModel(stages.replace(CONFIG, vocab_size=tokenizer.vocab_size, max_position_embeddings=192)).init_weights(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(60):
        batch = rows.batch(step)
        optimizer.zero_grad()
        loss, _ = NextToken()(model, batch)
        (loss / batch.n_targets).backward()
        optimizer.step()
    writer = sample.Writer("", model.eval(), tokenizer, Sampling(temperature=0, repetition_penalty=1.0), 60, True)
    for question in talk[::2]:
        writer.show(question)
    assert [message["content"] for message in writer.history] == talk


def test_chat_forgets_its_oldest_turns_with_a_notice(journey, monkeypatch, capsys):
    """nanochat crashes when a conversation outgrows the context."""
    import sample
    from nanomind.generate import Sampling
    stages_in(journey, monkeypatch)
    model, tokenizer = checkpoint.load("out/demo/sft")
    writer = sample.Writer("", model.eval(), tokenizer, Sampling(), 8, True, "宇宙")
    for turn in range(12):
        writer.show(f"天地玄黄宇宙洪荒 {turn}")
    assert "oldest" in capsys.readouterr().err and writer.history[-2]["content"].endswith("11") and writer.history[0]["role"] == "user"


def test_distill_stage(journey, monkeypatch, tmp_path, tiny):
    """A smaller student from scratch; a teacher with another tokenizer is refused."""
    stages_in(journey, monkeypatch)
    assert train.main(settings("distill", preset=str(tiny), steps=30, lr=0.01)) == 0
    found = records("out/demo/distill", "val_loss")
    assert found[-1]["kl"] < found[0]["kl"]
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for file in Path("out/demo/sft").glob("*"):
        (foreign / file.name).write_bytes(file.read_bytes())
    spec = json.loads((foreign / "tokenizer.json").read_text())
    spec["model"]["merges"] = spec["model"]["merges"][:-1]
    spec["model"]["vocab"].popitem()
    (foreign / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(ValueError, match="another tokenizer"):
        train.main(settings("distill", preset=str(tiny), run="other", teacher=str(foreign)))


def stopped_and_resumed(stage, monkeypatch, **more):
    """Stopped in the middle and resumed must equal uninterrupted, bit by bit."""
    for run in ("whole", "halves"):
        real, count = train.Trainer.take_step, [0]

        def counted(self, begin):
            count[0] += 1
            self.stop_asked = run == "halves" and count[0] == 5
            return real(self, begin)
        monkeypatch.setattr(train.Trainer, "take_step", counted)
        code = train.main(settings(stage, run=run, **more))
        monkeypatch.setattr(train.Trainer, "take_step", real)
        assert code == (130 if run == "halves" else 0)
    assert train.main(dict(stage=stage, run="halves", resume=True)) == 0
    a, b = (load_file(f"out/{run}/{stage}/model.safetensors") for run in ("whole", "halves"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_teacher_with_more_rows_than_ids_is_refused(journey, monkeypatch, tmp_path, tiny):
    """Some models pad their embedding: the same tokenizer, another size of the head, and a traceback at the first step."""
    stages_in(journey, monkeypatch)
    wide = tmp_path / "wide"
    shutil.copytree("out/demo/sft", wide)
    config, weights = json.loads((wide / "config.json").read_text()), load_file(wide / "model.safetensors")
    (wide / "config.json").write_text(json.dumps({**config, "vocab_size": config["vocab_size"] + 64}))
    weights["model.embed_tokens.weight"] = F.pad(weights["model.embed_tokens.weight"], (0, 0, 0, 64))
    save_file(weights, wide / "model.safetensors")
    with pytest.raises(ValueError, match=f"the teacher tells {config['vocab_size'] + 64} tokens apart and the student {config['vocab_size']}"):
        train.main(settings("distill", preset=str(tiny), run="wide", teacher=str(wide)))


def test_a_name_does_not_make_a_model_answer(journey, monkeypatch, tmp_path, tokenizer):
    """A peer continues text when "pretrain" occurs in the name of the checkpoint, and answers otherwise. What it was trained for is in the checkpoint."""
    stages_in(journey, monkeypatch)
    for stage, name, answers in (("pretrain", "full_sft", False), ("sft", "pretrain-2", True)):
        shutil.copytree(f"out/demo/{stage}", tmp_path / name)
        assert checkpoint.is_chat(tmp_path / name, tokenizer) == answers


def test_sft_of_the_built_in_world_reads_on(tmp_path, monkeypatch):
    """Without text beside the chats SFT loses what was only read. What is there already is not written again."""
    monkeypatch.setattr(stages.demo, "write", lambda folder, files: [(folder / file).write_text("{}") for file in files])
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "sft.jsonl").write_text("mine")
    found = stages.raw_files(TrainConfig(stage="sft"), stages.STAGES["sft"], tmp_path)
    assert [path.name for path in found] == ["sft.jsonl", "recall.jsonl"] and [path.read_text() for path in found] == ["mine", "{}"]


def test_distillation_reads_little_data_with_the_teacher_once_and_resumes_exactly(journey, monkeypatch, tiny):
    """What the teacher thinks of the data was computed anew in every step; what does not fit still is."""
    stages_in(journey, monkeypatch)
    made, real = [], objectives.TeacherStates.__init__
    monkeypatch.setattr(objectives.TeacherStates, "__init__", lambda self, teacher, rows, machine: (made.append(teacher.training), real(self, teacher, rows, machine))[1])
    more = dict(preset=str(tiny), teacher="out/demo/sft", steps=24, lr=0.01)
    stopped_and_resumed("distill", monkeypatch, **more)
    assert made == [False] * 3  # two runs and a resumed one, the teacher in eval mode
    monkeypatch.setattr(objectives.TeacherStates, "LARGEST", 10)
    assert train.main(settings("distill", run="anew", **more)) == 0 and len(made) == 3
    kept, anew = (load_file(f"out/{run}/distill/model.safetensors") for run in ("whole", "anew"))
    for name in kept:
        torch.testing.assert_close(anew[name], kept[name], rtol=0, atol=1e-4)


def test_dpo_stage_and_exact_resume(journey, monkeypatch):
    """A reference recomputed after a resume is the half-trained policy: the loss jumps back to ln 2."""
    stages_in(journey, monkeypatch)
    stopped_and_resumed("dpo", monkeypatch, init="out/demo/sft", lr=1e-3, steps=24)
    found = records("out/whole/dpo", "val_loss")
    assert found[0]["val_loss"] == pytest.approx(math.log(2), abs=1e-4) and found[-1]["val_loss"] < found[0]["val_loss"]
    assert found[-1]["accuracy"] >= found[0]["accuracy"] and found[-1]["margin"] > 0


@pytest.fixture
def answer(journey, monkeypatch):
    """python -m data_prep.distill with the tiny sft model as teacher on 60 questions, in this process: starting one takes seconds."""
    from data_prep import distill
    stages_in(journey, monkeypatch)
    chats = Path("chat.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:60]
    Path("questions.jsonl").write_text("".join(chats), encoding="utf-8")
    monkeypatch.setenv("MALLOC_TOP_PAD_", "0")  # set, so the command does not start itself again with its own settings

    def call(out, *more):
        flags = {"--teacher": "out/demo/sft", "--prompts": "questions.jsonl", "--max-new-tokens": "40", "--batch-size": "2", **dict(zip(more[::2], more[1::2]))}
        monkeypatch.setattr(sys, "argv", ["distill", "--out", out, *(word for pair in flags.items() for word in pair)])
        distill.main()
    yield call
    torch.set_num_threads(1)


def test_teacher_answers_as_data(answer, tokenizer_folder, monkeypatch, capsys):
    """A killed run that begins again from nothing, skips a batch or writes one twice. Stopped in the middle, its last line half written, and gone on
    with, the file must equal that of an uninterrupted run; it is chat data; what was begun with other settings is not gone on with."""
    from data_prep.common import prepare
    from data_prep.distill import write_answers
    from nanomind import judge
    answer("whole.jsonl")
    out = capsys.readouterr().out
    lines = [json.loads(line) for line in Path("whole.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]
    asked = [json.loads(line)["conversations"][0] for line in Path("questions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert lines and all([m["role"] for m in line["conversations"]] == ["user", "assistant"] and line["conversations"][0] in asked for line in lines)
    assert f"{len(lines)} answers" in out and (len(lines) == 60 or f"{60 - len(lines)} did not end" in out)
    prepare("chat", ["whole.jsonl"], tokenizer_folder, "data/answers", val_share=0, workers=1, overwrite=True)

    part, real, calls = Path("again.jsonl.part"), judge.answers, []

    def counted(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)
    monkeypatch.setattr(judge, "answers", counted)
    with pytest.raises(KeyboardInterrupt):
        answer("again.jsonl")
    rest = part.read_bytes()
    assert rest.count(b"\n") == 1 + 2 * 16 and not Path("again.jsonl").exists()
    part.write_bytes(rest + b'"did not end"\n{"conversations": [{"role": "user", "content": "\xe5\xa4')  # a group is cut off, in the middle of a character
    for changed in (("--temperature", "0.5"), ("--seed", "1"), ("--prompts", "chat.jsonl"), ("--teacher", "out/demo/pretrain"), ("--batch-size", "5")):
        with pytest.raises(ValueError, match="begun with another teacher, other prompts or settings"):
            answer("again.jsonl", *changed)
    with pytest.raises(ValueError, match="begun with another teacher, other prompts or settings"):
        write_answers("out/demo/sft", ["questions.jsonl"], "again.jsonl", batch_size=2, max_new_tokens=40, precision="bf16")
    answer("again.jsonl")
    assert len(calls) == 2 + 1 + 2 and Path("again.jsonl").read_bytes() == Path("whole.jsonl").read_bytes() and not part.exists()
    with pytest.raises(ValueError, match="exists already"):
        answer("again.jsonl")


def test_a_line_separator_in_an_answer_is_no_end_of_line(answer, monkeypatch):
    """U+2028 and U+0085 stand unescaped in a JSON string; str.splitlines() cuts there, and the file is broken JSON. An empty answer is left out."""
    from nanomind import judge
    tokenizer, real = bins.open_folder("data/chat").tokenizer, ["a\u2028b", "\x85", " "]
    monkeypatch.setattr(judge, "answers", lambda model, prompts, *_: [(tokenizer.encode(real[i % 3] if i < 3 else "天"), True) for i in range(len(prompts))])
    answer("lines.jsonl", "--batch-size", "60")
    found = [json.loads(line)["conversations"][1]["content"] for line in Path("lines.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]
    assert found == ["a\u2028b", *["天"] * 57]


def test_questions_for_a_teacher(tmp_path, capsys):
    """Every chat format and plain prompts; what cannot be asked is shown with its line before the teacher is loaded, not hours later."""
    from data_prep import distill
    ask = {"role": "user", "content": "a\u2028b"}

    def questions(*records, max_bad=0.5):
        (tmp_path / "q.jsonl").write_text("".join((r if isinstance(r, str) else json.dumps(r, ensure_ascii=False)) + "\n" for r in records), encoding="utf-8")
        return distill.questions([tmp_path / "q.jsonl"], max_bad)
    for record in ({"prompt": "a\u2028b"}, {"conversations": [ask, {"role": "assistant", "content": ""}]}, {"messages": [ask]}, {"instruction": "a\u2028b", "output": ""},
                   {"conversations": [{"from": "human", "value": "a\u2028b"}, {"from": "gpt", "value": "x"}]}):
        assert questions(record, record) == [[ask], [ask]]
    for bad, reason in (({"messages": [ask, {"role": "tool", "content": "x"}]}, "unknown role 'tool'"), ({"messages": []}, "roles out of order"),
                        ({"messages": [{"role": "user", "content": " "}]}, "an empty user turn"), ("{", "broken JSON"), ({"text": "x"}, "fields found: text; expected"),
                        ({"messages": [{"role": "user", "content": 5}]}, "the content of a turn is no text but 5"), ({"messages": ["x"]}, "fields found: messages; expected")):
        assert questions({"messages": [ask]}, bad) == [[ask]]
        captured = capsys.readouterr()
        assert f"skipped {tmp_path / 'q.jsonl'}:2: {reason}" in captured.err and "1 of 2 records skipped" in captured.out
        with pytest.raises(ValueError, match="more than --max-bad 0.01 allows"):
            questions({"messages": [ask]}, bad, max_bad=0.01)


def test_mistakes_with_a_teacher_are_one_line(answer):
    """What is wrong is said before the work begins, and nothing is left behind."""
    Path("none.jsonl").write_text("")
    for flag, value, told in (("--prompts", "none.jsonl", "none.jsonl: the file is empty"), ("--prompts", "nowhere.jsonl", "nowhere.jsonl: no such file"),
                              ("--teacher", "out/nobody", "out/nobody"), ("--max-new-tokens", "200", "the teacher sees 128 tokens"), ("--batch-size", "0", "at least 1"),
                              ("--temperature", "-1", "temperature"), ("--max-new-tokens", "1", "none of the 60 answers can be used .60 did not end"),
                              ("--max-new-tokens", "127", "none of the 60 answers can be used .60 question too long")):
        with pytest.raises((ValueError, FileNotFoundError), match=told) as problem:
            answer("bad.jsonl", flag, value)
        assert "\n" not in str(problem.value) and not list(Path(".").glob("bad.jsonl*"))
    with pytest.raises(ValueError, match="ending in .jsonl"):
        answer("bad.txt")


def test_flags_of_other_stages_are_refused(journey, monkeypatch):
    monkeypatch.chdir(journey)
    with pytest.raises(ValueError, match="--beta .of --stage dpo."):
        train.main(settings("sft", beta=0.2))
    with pytest.raises(ValueError, match="data folder of pairs"):
        train.main(settings("sft", data="data/pairs", run="x", init="out/demo/pretrain"))
    with pytest.raises(FileNotFoundError, match="starts from out/nobody/pretrain"):
        train.main(settings("sft", run="nobody"))
