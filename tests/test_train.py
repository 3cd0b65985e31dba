"""The loop: exact sums, exact resume, atomic saves, and every mistake one clear line. Most tests run the real command in a folder of their own."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from conftest import ROOT
from nanomind import bins, checkpoint, optim, plan, stages
from nanomind.config import ModelConfig, TrainConfig, load_preset, parse_flags, settle
from nanomind.model import LanguageModel
from nanomind.data import IGNORE, Batch, PackedTokens
from nanomind.objectives import HeadLoss, NextToken, cross_entropy, token_nll


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def fast(data_folder, tiny):
    """Flags of a run that takes a second."""
    return dict(data=str(data_folder), preset=str(tiny), seq_len=32, batch_size=2, eval_tokens=64.0, threads=1, precision="fp32", steps=20)


def weights(folder="out/demo/pretrain"):
    return load_file(Path(folder) / "model.safetensors")


def log(folder="out/demo/pretrain"):
    lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")} for line in lines]


def command(arguments, cwd, **more):
    return subprocess.run([sys.executable, str(ROOT / "train.py"), *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=120, **more)


def flags_of(values):
    return [x for name, value in values.items() for x in ["--" + name.replace("_", "-"), str(value)]]


# ---- the mathematics of a step

def test_accumulation_is_exact(data_folder, tiny):
    """A mean of means weighs a micro-batch with 10 targets like one with 1,000 (every peer but torchtune). The sum is divided once, by the
    targets of the whole step, so 8 x 1 equals 2 x 4 even with very unequal numbers of targets."""
    folder = bins.open_folder(data_folder)
    config = load_preset(str(tiny))[0]
    results = []
    for batch_size, accumulate in ((8, 1), (4, 2), (1, 8)):
        rows = PackedTokens(folder.train, folder.tokenizer, 32, batch_size)
        model = LanguageModel(config).init_weights(0)
        batches = [rows.batch(0, i, accumulate) for i in range(accumulate)]
        for i, batch in enumerate(batches):
            for row in range(batch_size):
                batch.labels[row, 4 * ((i * batch_size + row) % 8):] = IGNORE
        targets = sum(batch.n_targets for batch in batches)
        for batch in batches:
            (NextToken()(model, batch)[0] / targets).backward()
        results.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("rows", (0, 1, 5, 4999))
def test_fused_loss_equals_torch(rows, dtype):
    """The fast head must be cross_entropy(hidden @ weight.T): loss and both gradients, for any number of rows, none included."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(rows, 24), torch.randn(333, 24) * 0.3
    labels = torch.randint(0, 333, (rows,))
    found, expected = [], []
    for results, function in ((found, lambda h, w: HeadLoss.apply(h, w, cross_entropy(labels), dtype)),
                              (expected, lambda h, w: torch.nn.functional.cross_entropy(h @ w.T, labels, reduction="sum"))):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = function(h, w)
        (loss / 7).backward()
        results += [loss.detach(), h.grad, w.grad]
    precise = dict(atol=1e-4, rtol=1e-4) if dtype == torch.float32 else dict(atol=0.05 * max(1, rows) ** 0.5, rtol=0.03)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, **precise)
    torch.testing.assert_close(token_nll(hidden, weight, labels, dtype).sum(), expected[0], **precise)


def test_schedule():
    """nanoGPT runs one step too many and others never reach the peak: the first, the peak and the last step are stated, and counted in optimiser steps."""
    curve = [optim.schedule(s / 100, (s + 1) / 100, 0.1, 1.0) for s in range(100)]
    assert curve[0] == pytest.approx(0.1) and curve[9] == pytest.approx(1.0) and max(curve) == pytest.approx(1.0)
    assert curve[99] == pytest.approx(1 / 90) and all(a < b for a, b in zip(curve[:9], curve[1:10])) and all(a > b for a, b in zip(curve[11:], curve[12:]))
    flat = [optim.schedule(s / 100, (s + 1) / 100, 0.1, 0.2) for s in range(100)]
    assert flat[9:81] == [1.0] * 72 and flat[99] == pytest.approx(0.05)
    assert optim.schedule(0, 0.01, 0, 1.0) == 1.0 and optim.schedule(1.0, 1.0, 0.1, 1.0) == 0.0


def test_muon_equals_torch():
    """torch 2.9 and later have Muon; older ones are still supported, so ours is hand-written and must do the same."""
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon to compare with")
    torch.manual_seed(0)
    start = [torch.randn(24, 16), torch.randn(16, 24), torch.randn(24, 16)]
    results = []
    for kind in (lambda p: optim.Muon(p, lr=0.02, momentum=0.95, weight_decay=0.1, dtype=torch.bfloat16),
                 lambda p: torch.optim.Muon(p, lr=0.02, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")):
        params = [torch.nn.Parameter(x.clone()) for x in start]
        optimizer = kind(params)
        draw = torch.Generator().manual_seed(1)
        for _ in range(5):
            for p in params:
                p.grad = torch.randn(p.shape, generator=draw)
            optimizer.step()
        results.append(params)
    for a, b, was in zip(*results, start):
        assert (a - b).norm() / (b - was).norm() < 0.02  # both orthogonalise in bf16


def test_optimiser_groups(tiny):
    """Weight decay on norms, or Muon on the embedding, trains worse without any error."""
    model = LanguageModel(load_preset(str(tiny))[0])
    made = optim.Optimizer(model, TrainConfig())
    adamw, muon = made.parts
    names = [sorted(made.names[p] for group in part.param_groups for p in group["params"]) for part in (adamw, muon)]
    assert sorted(names[0] + names[1]) == sorted(name for name, _ in model.named_parameters())
    assert all(".layers." in name and "norm" not in name for name in names[1]) and len(names[1]) == 14
    assert all(group["weight_decay"] == 0 for group in adamw.param_groups)
    plain = optim.Optimizer(model, TrainConfig(optimizer="adamw")).parts[0]
    assert {group["weight_decay"] for group in plain.param_groups if group["params"][0].dim() < 2} == {0.0}


# ---- the loop itself

def test_each_optimiser_has_a_rate_of_its_own():
    """Muon's would tear the embeddings apart under AdamW. What is given, or what a stage was tuned with, stays."""
    assert [settle(given)[0].lr for given in ({}, {"preset": "small"}, {"optimizer": "adamw"}, {"optimizer": "adamw", "lr": 0.5})] == [0.02, 0.01, 0.003, 0.5]
    assert settle({}, {"optimizer": "adamw", "lr": 1e-4})[0].lr == 1e-4
    assert settle({})[0].seq_len == 256 and settle({}, stages.defaults({"stage": "sft", "data": "x"}))[0].seq_len == 512  # conversations are longer


def test_the_loop_divides_the_sum_once(here, fast, monkeypatch):
    """The same steps as 1 x 8 rows and as 8 x 1, with very unequal numbers of targets, must give the same weights: of the real loop."""
    real = PackedTokens.row

    def uneven(self, index):
        tokens, labels, documents = real(self, index)
        labels[2 + 5 * index % 30:] = IGNORE
        return tokens, labels, documents
    monkeypatch.setattr(PackedTokens, "row", uneven)
    for run, batch_size, accumulate in (("one", 8, 1), ("eight", 1, 8)):
        train.main({**fast, "run": run, "batch_size": batch_size, "accumulate": accumulate, "steps": 3, "optimizer": "adamw"})
    a, b = log("out/one/pretrain"), log("out/eight/pretrain")
    for x, y in zip(a, b):
        for key in x.keys() & {"loss", "grad_norm"}:
            assert x[key] == pytest.approx(y[key], rel=1e-4)


@pytest.mark.parametrize("accumulate", (1, 3))
def test_the_loop_clips_and_follows_the_curve(here, fast, monkeypatch, accumulate):
    """Flags that are parsed, logged and forgotten: what the optimiser gets is looked at."""
    seen, real = [], optim.Optimizer.step

    def step(self, scale):
        norm = torch.stack([p.grad.norm() for p in self.names]).norm().item()
        real(self, scale)
        seen.append((norm, self.parts[-1].param_groups[0]["lr"]))
    monkeypatch.setattr(optim.Optimizer, "step", step)
    train.main({**fast, "grad_clip": 0.01, "lr": 0.003, "warmup": 0.2, "accumulate": accumulate})
    assert len(seen) == 20 and all(norm == pytest.approx(0.01, rel=1e-3) for norm, _ in seen)
    assert [lr for _, lr in seen] == pytest.approx([0.003 * optim.schedule(s / 20, (s + 1) / 20, 0.2, 1.0) for s in range(20)])


def test_the_objective_keeps_documents_apart(tiny):
    """The mask is of no use if the objective forgets to hand over doc_ids: B's loss in a row behind A must be that of B alone."""
    model = LanguageModel(load_preset(str(tiny))[0]).init_weights(0)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3 if p.dim() == 2 else 1)
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 400, (1, 20), generator=draw)
    labels, docs = tokens.roll(-1, 1), torch.tensor([[0] * 8 + [1] * 12])
    behind = labels.clone()
    behind[:, :8] = IGNORE
    alone = NextToken()(model, Batch(tokens[:, 8:], labels[:, 8:], torch.zeros(1, 12, dtype=torch.long)))[0]
    torch.testing.assert_close(NextToken()(model, Batch(tokens, behind, docs))[0], alone, atol=1e-4, rtol=1e-5)


def test_bits_per_byte_is_what_its_name_says(here, fast):
    """Computed once more, document by document in plain words: -log2 p of every text token over the bytes of the text."""
    train.main({**fast, "steps": 5, "seq_len": 128, "eval_tokens": 1e6})
    folder = bins.open_folder(fast["data"])
    model = checkpoint.load_model("out/demo/pretrain").eval()
    rows = PackedTokens(folder.val, folder.tokenizer, 128, 1)
    bits = n = 0
    for index in range(rows.rows):
        tokens, labels, documents = (torch.from_numpy(x)[None] for x in rows.row(index))
        with torch.no_grad():
            p = model.logits(model(tokens, documents)).double().log_softmax(-1)
        for place, label in enumerate(labels[0].tolist()):
            if label > 2:
                bits -= p[0, place, label].item() / math.log(2)
                n += len(folder.tokenizer.token_bytes[label])
    assert [line for line in log() if "bpb" in line][-1]["bpb"] == pytest.approx(bits / n, rel=1e-3)
    assert n == folder.meta["splits"]["val"]["bytes"]


# ---- runs

def test_resume_is_exact(here, fast):
    """Resuming with fp16 weights, a lost optimiser or repeated batches looks like a small bump in the loss. 20 steps must equal 10, a stop, and
    10 more: weights, optimiser and log, bit by bit."""
    assert train.main({**fast, "run": "whole", "accumulate": 2}) == 0
    real, count = train.Trainer.take_step, [0]

    def stop_after_ten(self, begin):
        count[0] += 1
        self.stop_asked = count[0] == 10
        return real(self, begin)
    train.Trainer.take_step = stop_after_ten
    try:
        assert train.main({**fast, "run": "halves", "accumulate": 2}) == 130
    finally:
        train.Trainer.take_step = real
    assert checkpoint.load_progress(Path("out/halves/pretrain"))[1]["step"] == 10
    with open("out/halves/pretrain/log.jsonl", "a") as file:
        file.write('{"step": 11, "loss": 1.0}\n{"step": 12, "lo')  # what a killed run leaves behind its last save
    assert train.main({"run": "halves", "resume": True}) == 0
    for name in ("model.safetensors", "state-20.safetensors"):
        a, b = (load_file(Path(f"out/{run}/pretrain") / name) for run in ("whole", "halves"))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert log("out/whole/pretrain") == log("out/halves/pretrain")
    assert len(list(Path("out/halves/pretrain").glob("state-*"))) == 1


def test_changed_data_cannot_be_resumed(here, fast, corpus, tiny):
    """Resuming on other data trains on wrong ids, or ends in an IndexError hours later."""
    text = corpus.read_text(encoding="utf-8").splitlines(keepends=True)
    Path("raw.jsonl").write_text("".join(text), encoding="utf-8")
    given = {**fast, "data": "raw.jsonl", "vocab_size": 400}
    assert train.main(given) == 0
    Path("raw.jsonl").write_text("".join(text[:300]), encoding="utf-8")
    with pytest.raises(ValueError, match="not the data this run was trained on"):
        train.main({"resume": True, "steps": 30})
    assert train.main({**given, "vocab_size": 300, "overwrite": True}) == 0  # a tokenizer of its own, not the one that lies there
    assert weights()["model.embed_tokens.weight"].shape[0] == 300


def test_number_of_steps(here, fast):
    """The tail of an epoch must be trained on and saved: 10 micro-batches at accumulation 4 are 3 steps, and the file is the memory."""
    folder = bins.open_folder(fast["data"])
    rows = PackedTokens(folder.train, folder.tokenizer, 32, 2)
    given = {name: value for name, value in fast.items() if name != "steps"} | {"accumulate": 4}
    cfg, _ = settle({**given, "epochs": 20 / rows.rows})
    assert plan.total_steps(cfg, rows.rows) == 3
    kept = {}
    real = checkpoint.save
    try:
        checkpoint.save = lambda folder, model, *rest: (kept.update({n: p.detach().clone() for n, p in model.named_parameters()}), real(folder, model, *rest))
        train.main({**given, "epochs": 20 / rows.rows})
    finally:
        checkpoint.save = real
    assert checkpoint.load_progress(Path("out/demo/pretrain"))[1]["step"] == 3
    assert all(torch.equal(kept[name], value) for name, value in weights().items())


def test_it_learns(here, fast):
    """The whole way: the loss of the little language falls well below that of guessing, and the log says so."""
    train.main({**fast, "steps": 150, "batch_size": 8})
    lines = [line for line in log() if "val_loss" in line]
    assert abs(lines[0]["val_loss"] - math.log(400)) < 0.2 and lines[-1]["val_loss"] < lines[0]["val_loss"] - 1.5
    assert {"bpb", "bpb_zh", "bpb_en"} <= lines[-1].keys() and lines[-1]["bpb"] < lines[0]["bpb"]


@pytest.mark.parametrize("poison, said", (
    (lambda loss: loss * math.nan, "step 8: loss nan"),
    (lambda loss: loss + (loss - loss.detach()) * 1e38 * 1e38, "step 8: .*gradient norm")), ids=("loss", "gradient alone"))
def test_non_finite_step_stops_and_keeps_the_last_save(here, fast, monkeypatch, poison, said):
    """One NaN step poisons weights and moments, and the next save destroys the run. A finite loss may have an infinite gradient."""
    real = NextToken.__call__
    calls = [0]

    def poisoned(self, model, batch):
        calls[0] += 1
        loss, metrics = real(self, model, batch)
        return poison(loss) if calls[0] == 8 else loss, metrics
    monkeypatch.setattr(NextToken, "__call__", poisoned)
    with pytest.raises(ValueError, match=said):
        train.main({**fast, "save_every": 5})
    assert checkpoint.load_progress(Path("out/demo/pretrain"))[1]["step"] == 5
    assert all(w.isfinite().all() for w in weights().values())


def test_kill_at_any_moment_leaves_a_whole_checkpoint(here, fast):
    """A kill in the middle of a save left peers with half a file. Killed at random moments while it saves after every step, the folder must always
    open, weights and optimiser of one and the same step, and go on."""
    for moment in range(4):
        process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *flags_of({**fast, "steps": 100000, "save_every": 1, "eval_every": 1000000}),
                                    *(["--resume"] if moment else [])], cwd=here, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        began = time.time()
        before = checkpoint.load_progress(here / "out/demo/pretrain")[1]["step"] if moment else 0
        while time.time() - began < 60:
            time.sleep(0.05)
            saved = here / "out/demo/pretrain/model.safetensors"
            if saved.exists() and int(checkpoint.saved_step(saved.parent)) > before + moment:  # one file: its state may be replaced while one looks
                break
        time.sleep(0.013 * moment)
        process.send_signal(signal.SIGKILL)
        process.wait()
        tensors, progress = checkpoint.load_progress(here / "out/demo/pretrain")
        model = checkpoint.load_model(here / "out/demo/pretrain")
        optim.Optimizer(model, TrainConfig()).load(tensors)
        assert progress["step"] > before


def test_stop_by_signal_saves_and_says_how_to_go_on(here, fast):
    """Ctrl-C is how most runs on a laptop end."""
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *flags_of({**fast, "steps": 100000, "eval_every": 1000000})], cwd=here,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    began = time.time()
    while not (here / "out/demo/pretrain/log.jsonl").exists() or len(log(here / "out/demo/pretrain")) < 4:
        assert time.time() - began < 60
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 130 and "--resume" in out.splitlines()[-1]
    assert checkpoint.load_progress(here / "out/demo/pretrain")[1]["step"] >= 3


def test_full_disk_keeps_the_last_save(here, fast):
    """A save that does not fit must end in one line and leave the older checkpoint as it was."""
    assert train.main(fast) == 0
    before = weights()
    import resource
    result = command([*flags_of({**fast, "steps": 40}), "--resume"], here,
                     preexec_fn=lambda: (signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))))
    assert result.returncode == 2 and "Traceback" not in result.stderr and result.stderr.strip().splitlines()[-1].startswith("error: ")
    assert all(torch.equal(before[name], value) for name, value in weights().items())
    assert not list(Path("out/demo/pretrain").glob("*.tmp"))


def test_slow_preparation_leaves_half_of_the_time(here, fast, monkeypatch, capsys):
    """Drawing and encoding pictures once took all of a stage's minute, and the journey ended there with nothing trained."""
    from nanomind import stages
    find = stages.find_data
    monkeypatch.setattr(stages, "find_data", lambda *given: (time.sleep(4), find(*given))[1])
    del fast["steps"]
    assert train.main({**fast, "time_limit": 0.05, "run": "slow"}) == 0
    assert "training gets half of them all the same" in capsys.readouterr().out
    assert max(json.loads(line)["step"] for line in open("out/slow/pretrain/log.jsonl")) > 3


def test_time_limit_ends_inside(here, fast):
    """The schedule must reach its end inside the limit, not be cut off by it."""
    del fast["steps"]
    began = time.monotonic()
    train.main({**fast, "time_limit": 0.1})
    assert time.monotonic() - began < 6 + 1
    assert [line for line in log() if "lr" in line][-1]["lr"] < 0.001  # of 0.01: the curve has come down
    with pytest.raises(ValueError, match="over before the first step"):
        train.main({**fast, "time_limit": 1e-6, "run": "none"})


@pytest.mark.parametrize("name, dtype, gain", (("bf16", torch.bfloat16, 0.5), ("fp32", torch.float32, 3.0)))
def test_precision_is_what_was_asked(here, fast, capsys, monkeypatch, name, dtype, gain):
    """A precision flag that is parsed and forgotten: the linear layers must really compute in it, on a machine that would choose the other one."""
    monkeypatch.setattr("nanomind.device.product_rates", lambda: {torch.float32: 1.0, torch.bfloat16: gain})
    from nanomind.model import Attention
    kinds = []
    real = Attention.forward
    Attention.forward = lambda self, x, *rest: kinds.append(real(self, x, *rest).dtype) or real(self, x, *rest)
    try:
        train.main({**fast, "steps": 1, "precision": name})
    finally:
        Attention.forward = real
    assert kinds[0] == dtype and f"{name} (as asked)" in capsys.readouterr().out


def test_a_resumed_run_keeps_its_precision(here, fast, monkeypatch, capsys):
    """What was measured when it began may come out another way when it goes on."""
    for gain, more in ((0.5, {}), (3.0, {"resume": True, "steps": 30})):
        monkeypatch.setattr("nanomind.device.product_rates", lambda: {torch.float32: 1.0, torch.bfloat16: gain})
        train.main({**fast, "precision": "auto", **more})
        assert "fp32" in capsys.readouterr().out.splitlines()[0]


# ---- mistakes

def test_mistakes_are_one_line(here, fast, data_folder):
    """No traceback reaches a user, nothing is left behind, and the line says what to do."""
    broken = here / "broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"model_type": "llama",')
    for arguments, expected in (
            (["--stage", "pretend"], "--stage pretend: expected"),
            (["--data", "nowhere"], "nowhere: no such file or folder"),
            (["--steps", 5, "--epochs", 1, "--warmup", 2], "--steps, --tokens and --epochs"),
            (["--preset", "huge"], "--preset huge: expected"),
            (["--preset", broken], "config.json:1: broken JSON"),
            (["--init", "nowhere", "--data", data_folder], "nowhere"),
            (["--device", "cuda:9", "--data", data_folder], "--device cuda:9"),
            (["--seq-len", 4096], "at most 2048"),
            (["--tokens", "inf"], "--tokens inf: expected a finite number"),
            (["--data", data_folder, "--val", "x.txt"], "holds its validation text already"),
            (["--data", data_folder, "--tokenizer", here], "tokenizer.json not found")):
        result = command(arguments, here)
        assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
        assert result.stderr.strip().splitlines()[-1].startswith("error:") and expected in result.stderr, result.stderr
    assert not (here / "out").exists() or not list((here / "out").rglob("model.safetensors"))
    both = command(["--wrong", "--also-wrong"], here)
    assert both.returncode == 2 and "--wrong" in both.stderr and "--also-wrong" in both.stderr


def test_a_finished_run_is_not_overwritten(here, fast):
    """The same command twice must not destroy an hour of work."""
    train.main(fast)
    with pytest.raises(ValueError, match="--resume goes on, --overwrite begins again"):
        train.main(fast)
    with pytest.raises(ValueError, match="cannot be resumed with another --batch-size 4"):
        train.main({"resume": True, "batch_size": 4})
    assert train.main({**fast, "overwrite": True}) == 0


def test_plan_and_batch_without_training(here, fast, capsys):
    """--dry-run and --show-batch look, and leave nothing behind."""
    assert not train.main({"preset": "base", "dry_run": True})
    assert "104.03M parameters (104,030,976)" in capsys.readouterr().out and not Path("out").exists()
    assert not train.main({"stage": "sft", "preset": "demo", "dry_run": True})
    assert "about 7.2M tokens in the data" in capsys.readouterr().out  # of the built-in world's chats, not of its running text
    assert not train.main({**fast, "dry_run": True}) and not Path("out").exists()
    assert "20 steps" in capsys.readouterr().out
    assert not train.main({**fast, "show_batch": True}) and not Path("out").exists()
    assert len(capsys.readouterr().out.splitlines()) >= 32


def test_checkpoint_folder_is_complete(here, fast):
    """Weights without a config, or a tokenizer that stays in a cache, cannot be used a month later. transformers must open the folder as it is."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    train.main(fast)
    model, tokenizer = checkpoint.load("out/demo/pretrain")
    theirs, words = AutoModelForCausalLM.from_pretrained("out/demo/pretrain").eval(), AutoTokenizer.from_pretrained("out/demo/pretrain")
    ids = tokenizer.encode("天地玄黄 the quick fox")
    assert words("天地玄黄 the quick fox")["input_ids"] == ids
    with torch.no_grad():
        torch.testing.assert_close(model.eval().logits(model(torch.tensor([ids]))), theirs(torch.tensor([ids])).logits, atol=1e-4, rtol=0)


def test_pickles_are_never_opened(here, fast):
    """torch.load runs code from the file. A folder with a poisoned pytorch_model.bin must be refused unopened."""
    train.main(fast)
    folder = Path("out/demo/pretrain")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch poisoned'\ntR.")
    with pytest.raises(FileNotFoundError, match="pytorch_model.bin is not read here"):
        checkpoint.load_model(folder)
    assert not Path("poisoned").exists()


def test_foreign_weights_are_refused_by_name(here, fast):
    """strict=False turns a total mismatch into a randomly initialised model."""
    train.main(fast)
    folder = Path("out/demo/pretrain")
    found = weights()
    renamed = {name.replace("self_attn", "attention"): value for name, value in found.items()}
    renamed["model.norm.weight"] = renamed["model.norm.weight"][:5].clone()
    checkpoint.write_tensors(folder / "model.safetensors", renamed, {"format": "pt", "step": "20"})
    with pytest.raises(ValueError, match="missing model.layers.0.self_attn.*"):
        checkpoint.load_model(folder)
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        checkpoint.load_model(folder)


def test_compiled_model_saves_plain_names(here, fast):
    """torch.compile prefixes every name with _orig_mod; saved so, nobody can load it. (The compiler itself needs a C++ compiler, so a stand-in
    with the same wrapper is used.)"""
    real = torch.compile
    torch.compile = lambda model: real(model, backend="eager")
    try:
        train.main({**fast, "steps": 2, "compile": True})
    finally:
        torch.compile = real
    assert not [name for name in weights() if "_orig_mod" in name] and checkpoint.load_model("out/demo/pretrain")


def test_tied_head_is_one_tensor(here, fast):
    """A tied head that became two tensors after loading trains apart."""
    train.main(fast)
    model = checkpoint.load_model("out/demo/pretrain")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr() and "lm_head.weight" not in weights()


def test_raw_files_as_data(here, corpus, tiny, capsys):
    """--data may name raw files: a tokenizer is trained, the folder is made once and found again."""
    given = dict(data=str(corpus), preset=str(tiny), vocab_size=400, seq_len=32, batch_size=2, steps=2, eval_tokens=64.0, threads=1)
    assert train.main({**given, "run": "mine"}) == 0
    made = list(Path("out/mine/data").glob("*/meta.json"))
    stamp = made[0].stat().st_mtime_ns
    assert len(made) == 1 and train.main({**given, "run": "mine", "overwrite": True}) == 0
    assert [path.stat().st_mtime_ns for path in Path("out/mine/data").glob("*/meta.json")] == [stamp]
