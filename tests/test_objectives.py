"""Distillation and DPO against their formulas, and every stage end to end at a tiny size."""

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import train
from conftest import ROOT, sentences
from nanomind import bins, checkpoint, stages
from nanomind.config import ModelConfig, TrainConfig
from nanomind.data import IGNORE, Batch, PackedTokens
from nanomind.model import LanguageModel
from nanomind.objectives import DPO, Distill

CONFIG = ModelConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=48, head_dim=16,
                     max_position_embeddings=64)


def model_of(seed):
    model = LanguageModel(CONFIG).init_weights(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)) * 0.1)
    return model


def distill(alpha=0.0, temperature=2.0, teacher=1):
    return Distill(SimpleNamespace(teacher=model_of(teacher), cfg=TrainConfig(alpha=alpha, distill_temperature=temperature)))


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


# ---- distillation

def test_a_student_like_its_teacher_has_nothing_to_learn():
    """Teacher and student shifted by one position against each other trained quietly in a public recipe: equal models must give 0 and gradient 0."""
    loss, grad = gradient(distill(teacher=4), model_of(4), batch_of())
    assert abs(loss) < 1e-5 and grad.abs().max() < 1e-5


@pytest.mark.parametrize("alpha, temperature", ((0.0, 1.0), (0.0, 3.0), (0.3, 2.0)))
def test_distillation_equals_the_formula_in_fp64(alpha, temperature):
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


def test_distillation_does_not_depend_on_padding_or_micro_batches():
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
def test_dpo_equals_the_formula(settings):
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


def test_dpo_by_hand():
    """Three tokens with log-probabilities one can add up on paper."""
    objective = dpo(torch.zeros(2), beta=0.5)
    loss, metrics = objective.loss(torch.tensor([[-1.0, -4.0]]), torch.tensor([[-2.0, -3.0]]))
    assert float(metrics["margin"]) == pytest.approx(0.5 * ((-1 + 2) - (-4 + 3))) and float(metrics["accuracy"]) == 1
    assert loss.item() == pytest.approx(-math.log(1 / (1 + math.exp(-1.0))))
    swapped, other = objective.loss(torch.tensor([[-4.0, -1.0]]), torch.tensor([[-3.0, -2.0]]))
    assert float(other["margin"]) == -float(metrics["margin"]) and swapped > loss


def test_dpo_does_not_depend_on_micro_batches_or_prompt_labels():
    """Both answers of a pair are always in the same micro-batch, and nothing of the prompt counts."""
    batch, reference = pairs_batch(), torch.tensor([-3.0, -9.0, -5.0, -7.0])
    whole = gradient(dpo(reference), model_of(0), batch)
    split = gradient(dpo(reference), model_of(0), rows_of(batch, slice(0, 1)), rows_of(batch, slice(1, 2)))
    assert split[0] == pytest.approx(whole[0], rel=1e-5)
    torch.testing.assert_close(split[1], whole[1], atol=1e-5, rtol=1e-4)
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


def test_sft_and_chat(journey, monkeypatch):
    """From the pretrained model of the same run, answers only, to a model that `sample.py` chats with."""
    stages_in(journey, monkeypatch)
    found = records("out/demo/sft", "val_loss")
    assert found[-1]["val_loss"] < found[0]["val_loss"] and {"ended", "distinct_2", "repeated_4"} <= found[-1].keys()
    for arguments, typed, expected in ((["--auto", "--max-new-tokens", "5"], None, "请介绍一下自己。"),
                                       (["--prompt", "天地玄黄<|im_end|>", "--system", "宇宙", "--max-new-tokens", "5"], None, "天地玄黄<|im_end|>"),
                                       (["--compare", "out/demo/pretrain", "out/demo/sft", "--prompt", "天", "--max-new-tokens", "4"], None, "out/demo/sft: 天")):
        result = subprocess.run([sys.executable, str(ROOT / "sample.py"), *arguments], capture_output=True, text=True, timeout=120, input=typed)
        assert result.returncode == 0 and expected in result.stdout, result.stderr


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


def test_dpo_stage_and_exact_resume(journey, monkeypatch):
    """A reference recomputed after a resume is the half-trained policy: the loss jumps back to ln 2. Stopped in the middle and resumed must equal
    uninterrupted, bit by bit."""
    stages_in(journey, monkeypatch)
    for run in ("whole", "halves"):
        real, count = train.Trainer.take_step, [0]

        def counted(self, begin):
            count[0] += 1
            self.stop_asked = run == "halves" and count[0] == 5
            return real(self, begin)
        monkeypatch.setattr(train.Trainer, "take_step", counted)
        code = train.main(settings("dpo", run=run, init="out/demo/sft", lr=1e-3, steps=24))
        monkeypatch.setattr(train.Trainer, "take_step", real)
        assert code == (130 if run == "halves" else 0)
    assert train.main(dict(stage="dpo", run="halves", resume=True)) == 0
    a, b = (load_file(f"out/{run}/dpo/model.safetensors") for run in ("whole", "halves"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    found = records("out/whole/dpo", "val_loss")
    assert found[0]["val_loss"] == pytest.approx(math.log(2), abs=1e-4) and found[-1]["val_loss"] < found[0]["val_loss"]
    assert found[-1]["accuracy"] >= found[0]["accuracy"] and found[-1]["margin"] > 0


def test_teacher_answers_as_data(journey, monkeypatch):
    """data_prep.distill writes chats that data_prep.chat reads, and goes on where it was stopped."""
    stages_in(journey, monkeypatch)
    arguments = [sys.executable, "-m", "data_prep.distill", "--teacher", "out/demo/sft", "--prompts", "chat.jsonl", "--max-new-tokens", "40", "--batch-size", "16"]
    def answer(out):
        return subprocess.run([*arguments, "--out", out], capture_output=True, text=True, timeout=200, env={**__import__("os").environ, "PYTHONPATH": str(ROOT)})
    first = answer("answers.jsonl")
    assert first.returncode == 0, first.stderr
    lines = Path("answers.jsonl").read_text(encoding="utf-8").splitlines()
    for line in lines:
        assert [m["role"] for m in json.loads(line)["conversations"]] == ["user", "assistant"]
    assert answer("answers.jsonl").returncode == 2  # never written over
    Path("again.jsonl.part").write_text("\n" * 16 + "half a line")
    assert answer("again.jsonl").returncode == 0
    again = Path("again.jsonl").read_text(encoding="utf-8").splitlines()
    assert set(again) <= set(lines) and len(again) >= len(lines) - 16


def test_flags_of_other_stages_are_refused(journey, monkeypatch):
    monkeypatch.chdir(journey)
    with pytest.raises(ValueError, match="--beta .of --stage dpo."):
        train.main(settings("sft", beta=0.2))
    with pytest.raises(ValueError, match="data folder of pairs"):
        train.main(settings("sft", data="data/pairs", run="x", init="out/demo/pretrain"))
    with pytest.raises(FileNotFoundError, match="starts from out/nobody/pretrain"):
        train.main(settings("sft", run="nobody"))
