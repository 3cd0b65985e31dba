"""--stage all: every stage with its defaults, gone on with after any interruption, nothing done or measured twice, and a report that needs only itself.
In: the real stages, on tiny data and with a tiny model. Out: pass or fail.
Next: ../nanomind/journey.py
"""

import json
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from conftest import ROOT, TINY, sentences
from data_prep.common import prepare
from data_prep.demo.scenes import write_scenes
from nanomind import checkpoint, device, journey, report, stages

ROWS = stages.GROUPS[stages.JOURNEY]
GIVEN = {"stage": "all", "precision": "fp32", "threads": 1}


@pytest.fixture(scope="module")
def tiny_table(data_folder, tokenizer_folder, tmp_path_factory):
    """The table of stages with defaults that make each a second; beside it the raw files of a run. -> (table, folder of raw files)"""
    place = tmp_path_factory.mktemp("journey")
    (place / "config.json").write_text(json.dumps({**TINY, "max_position_embeddings": 512}))
    texts = list(sentences(200, seed=5))
    chat = [{"conversations": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]} for a, b in zip(texts[::2], texts[1::2])]
    pairs = [{"chosen": c["conversations"], "rejected": [c["conversations"][0], {"role": "assistant", "content": "啊啊啊"}]} for c in chat[:40]]
    for name, records in (("chat", chat), ("pairs", pairs)):
        (place / f"{name}.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
        prepare(name, [place / f"{name}.jsonl"], tokenizer_folder, place / name, val_share=0.15, workers=1)
    write_scenes(place / "raw", train=12, val=6)
    exam = [{"question": texts[i], "answers": ["天"] * (i < 4), "category": ("seen", "read", "unknown")[i // 2]} for i in range(6)]
    (place / "raw" / "exam-first.jsonl").write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in exam), encoding="utf-8")
    common = dict(preset=str(place / "config.json"), seq_len=256, batch_size=2, steps=6, eval_tokens=256.0, save_every=2, eval_every=3)
    folders = {"text": str(data_folder), "chat": str(place / "chat"), "pairs": str(place / "pairs"), "images": ""}
    return {name: replace(stage, defaults={**stage.defaults, **common, "data": folders[stage.kind]}, demo={}, replay=()) for name, stage in stages.STAGES.items()}, place / "raw"


def test_a_model_that_gets_eyes_replays_what_it_says(tmp_path, monkeypatch, capsys):
    """Trained on pictures alone, a model that knew 85 % of its world knew none of it three minutes later. What it said itself goes on being trained."""
    from nanomind.config import TrainConfig
    (tmp_path / "raw/scenes").mkdir(parents=True)
    (tmp_path / "raw/scenes/train.jsonl").write_text("")
    (tmp_path / "raw/replay.jsonl").write_text('{"prompt": "?"}\n')
    cfg, asked = TrainConfig(stage="vlm-1"), []

    def answer(model, prompts, out, **how):
        asked.append((model, prompts))
        if len(asked) == 1:
            raise ValueError("none of them ended")
        out.write_text("{}")
    monkeypatch.setattr(stages, "write_answers", answer)
    scenes = tmp_path / "raw/scenes/train.jsonl"
    assert stages.raw_files(cfg, stages.STAGES["vlm-1"], tmp_path) == [scenes] and not asked, "there is no model to replay"
    for name in ("sft", "dpo"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text(name)
    assert stages.raw_files(cfg, stages.STAGES["vlm-1"], tmp_path) == [scenes] and "none of them ended" in capsys.readouterr().out
    files = stages.raw_files(cfg, stages.STAGES["vlm-1"], tmp_path)
    assert files[0] == scenes and files[1].read_text() == "{}" and asked[1] == (tmp_path / "dpo", [tmp_path / "raw/replay.jsonl"])
    assert stages.raw_files(cfg, stages.STAGES["vlm-2"], tmp_path) == files and len(asked) == 2, "both phases use one file"


@pytest.fixture
def here(tiny_table, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "STAGES", tiny_table[0])
    return enter(tiny_table[1], tmp_path, monkeypatch)


def enter(raw, folder, patch):
    patch.chdir(folder)
    Path("out/demo").mkdir(parents=True)
    Path("out/demo/raw").symlink_to(raw)
    return folder


@pytest.fixture(scope="module")
def whole(tiny_table, tmp_path_factory):
    """An uninterrupted journey: its folder, and what it printed."""
    import contextlib
    import io
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(stages, "STAGES", tiny_table[0])
        place = enter(tiny_table[1], tmp_path_factory.mktemp("whole"), patch)
        assert train.main(dict(GIVEN)) == 0
    return place, printed.getvalue()


def state(place):
    """What a journey leaves behind, without the times: weights, logs, measurements."""
    run = place / "out/demo"
    weights = {(name, key): value for name in ROWS for key, value in load_file(run / name / "model.safetensors").items()}
    logs = {name: [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")} for line in checkpoint.read_log(run / name / "log.jsonl")] for name in ROWS}
    measured = [{k: v for k, v in json.loads(line).items() if k not in ("seconds", "model", "peak_mb")} for line in (run / "journey.jsonl").read_text("utf-8").split("\n") if line]
    return weights, logs, measured


def same(interrupted, whole):
    """Weights, steps and measurements are equal. Of the validations one may be missing (killed between a save and it) or be there twice (killed after
    the last one, before the end was noted)."""
    (first, logs, measured), (second, all_logs, all_measured) = state(interrupted), state(whole)
    assert first.keys() == second.keys() and all(torch.equal(value, second[key]) for key, value in first.items())
    assert measured == all_measured
    for name in ROWS:
        assert [line for line in logs[name] if "loss" in line] == [line for line in all_logs[name] if "loss" in line], name
        assert all(line in all_logs[name] for line in logs[name]) and logs[name][-1] == all_logs[name][-1], name


# ---- the whole way

def test_every_stage_is_run_and_measured(whole):
    """Stages of one run, each from the one before; of each three answers before and after, and the exams where the language model has changed."""
    place, printed = whole
    measured = {record["stage"]: record for record in state(place)[2]}
    assert tuple(measured) == ROWS
    assert [measured[name]["from"] for name in ROWS] == ["random weights", "out/demo/pretrain", "random weights", "out/demo/sft", "out/demo/dpo", "out/demo/vlm-1"]
    assert all(len(record["samples"]) == 3 for record in measured.values())
    assert [name for name in ROWS if "exam" in measured[name]] == [name for name in ROWS if name != "vlm-1"]
    assert set(measured["sft"]["exam"]["right"]) == {"seen", "read", "unknown"} and measured["sft"]["exam"]["n"]["seen"] == 2
    pictures = measured["vlm-2"]["pictures"]
    assert set(pictures["right"]) == set(pictures["blind"]) == set(pictures["chance"]) and pictures["n"]["colour"] == 6 and pictures["chance"]["time"] == 0.5
    assert {sample["before"] for sample in measured["vlm-1"]["samples"]} == {"(no eyes yet)"} and "image" in measured["vlm-2"]["samples"][0]
    for number, name in enumerate(ROWS, 1):
        assert f"[{number} of 6] {name}\n" in printed


def test_before_is_what_the_stage_started_from(whole, tiny_table, monkeypatch):
    """The random weights of 'before' must be those of step 0, not other ones: made again from the seed they are the same."""
    place, _ = whole
    monkeypatch.setattr(stages, "STAGES", tiny_table[0])
    monkeypatch.chdir(place)
    made, real = [], stages.build
    monkeypatch.setattr(stages, "build", lambda *given: made.append({n: p.detach().clone() for n, p in real(*given).named_parameters()}) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.train({**GIVEN, "stage": "pretrain", "run": "other", "seed": 0})
    older, real_load = [], journey.LanguageModel.init_weights
    monkeypatch.setattr(journey.LanguageModel, "init_weights", lambda self, seed: older.append(real_load(self, seed)) or older[-1])
    monkeypatch.setattr(journey.generate, "prepare", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        journey.measure({"stage": "pretrain"}, Path("out/demo"))
    assert all(torch.equal(made[0][name], value) for name, value in older[0].named_parameters())


def test_the_table_says_what_the_logs_say(whole):
    place, printed = whole
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        table = journey.summary([{"stage": name} for name in ROWS], Path("out/demo"), journey.measurements(Path("out/demo")))
    assert [row[0] for row in table] == ["stage", *ROWS, "measuring", "together"] and report.lines(table) in printed
    for row in table[1:-2]:
        cell, lines = dict(zip(table[0], row)), checkpoint.read_log(place / "out/demo" / row[0] / "log.jsonl")
        losses = [line["val_loss"] for line in lines if "val_loss" in line]
        bits = [line["bpb"] for line in lines if "bpb" in line]
        assert cell["loss"] == f"{losses[0]:.2f} -> {losses[-1]:.2f}"
        assert cell["bits/byte"] == (f"{bits[0]:.2f} -> {bits[-1]:.2f}" if bits else "-")
        assert cell["tokens"] == f"{max(line['tokens'] for line in lines if 'tokens' in line) / 1e6:.2f}M"
        last = [line["seconds"] for line in lines if "seconds" in line][-1]
        assert last / 60 <= float(cell["minutes"]) + 0.01 and 50 < float(cell["peak MB"].removeprefix("<= ").replace(",", "")) < 50_000
        exam = [json.loads(line).get("exam") for line in (place / "out/demo/journey.jsonl").read_text("utf-8").split("\n") if f'"stage": "{row[0]}"' in line][0]
        assert cell["seen"] == (f"{100 * exam['right']['seen']:.1f} %" if exam else "-") and cell["ended"] == (f"{100 * exam['ended']:.1f} %" if exam else "-")
    assert "preferred" in table[4][10] and "kl" in table[3][10] and "image_gain" in table[6][10]
    assert float(table[-1][1]) == pytest.approx(sum(float(row[1]) for row in table[1:-1]), abs=0.05)


def test_a_finished_journey_does_nothing_again(whole, tiny_table, monkeypatch, capsys):
    """The same command again: no data, no model, no exam, within a moment the table and how to begin again. Another seed is refused, not ignored."""
    place, _ = whole
    monkeypatch.setattr(stages, "STAGES", tiny_table[0])
    monkeypatch.chdir(place)
    for module, name in ((journey, "measure"), (stages, "find_data"), (checkpoint, "load_model"), (train, "train")):
        monkeypatch.setattr(module, name, lambda *given: pytest.fail("done again"))
    began = time.process_time()
    assert train.main(dict(GIVEN)) == 0 and time.process_time() - began < 1
    printed = capsys.readouterr().out
    assert printed.count("already finished") == 6 and "peak MB" in printed and "python train.py --stage all --precision fp32 --threads 1 --overwrite" in printed
    with pytest.raises(ValueError, match="cannot be resumed with another --seed 3"):
        train.main({**GIVEN, "seed": 3})


# ---- interrupted

class Killed(BaseException):
    """What ends the process at once, here without a process."""


def killing(at, real):
    """A function that dies at its `at`-th call."""
    calls = []

    def function(*given, **named):
        calls.append(0)
        if len(calls) == at:
            raise Killed
        return real(*given, **named)
    return function


def test_interrupted_anywhere_it_goes_on(here, whole, monkeypatch, capsys):
    """A journey killed while data are prepared, between a stage's last save and its last evaluation, in an exam, and before a measurement is written:
    the same command each time, and in the end what an uninterrupted one leaves, bit for bit."""
    for module, name, at in ((train.Trainer, "take_step", 5),  # in pretraining, behind a save
                             (train.Trainer, "finish", 1),  # its last save made, its end not noted
                             (journey, "sit", 1),  # finished, not measured
                             (stages, "find_data", 1),  # of sft
                             (checkpoint, "write_tensors", 4),  # within a save: the state is written, the weights are not
                             (journey, "write_whole", 2),  # distill: measured, not written down (sft's is the first)
                             (journey, "write_report", 1),
                             (train.Trainer, "evaluate", 4)):
        real = getattr(module, name)
        with monkeypatch.context() as patch:
            patch.setattr(module, name, killing(at, real))
            with pytest.raises(Killed):
                train.main(dict(GIVEN))
    capsys.readouterr()
    assert train.main(dict(GIVEN)) == 0
    assert "already finished" in capsys.readouterr().out
    same(here, whole[0])


def test_kill_9_and_ctrl_c(here, whole, tiny_table, monkeypatch, capsys):
    """The real thing: SIGKILL in the middle of a stage, the same command, Ctrl-C in the next, which names the command that goes on, and again."""
    Path("table").write_bytes(pickle.dumps(tiny_table[0]))
    code = (f"import pickle, sys, time; sys.path.insert(0, {str(ROOT)!r}); import train; from nanomind import stages; from nanomind.cli import run\n"
            "stages.STAGES = pickle.load(open('table', 'rb')); step = train.Trainer.take_step\n"
            "train.Trainer.take_step = lambda self, begin: (time.sleep(0.15), step(self, begin))[1]\n"
            f"run(lambda: train.main({GIVEN!r}))")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    began = time.time()
    while not Path("out/demo/pretrain/model.safetensors").exists():
        assert time.time() - began < 60 and process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.kill()
    process.communicate(timeout=60)
    assert checkpoint.finished("out/demo/pretrain") is None and checkpoint.saved_step("out/demo/pretrain")
    real, steps = train.Trainer.take_step, []
    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "take_step", lambda self, begin: (steps.append(self.cfg.stage), steps.count("sft") == 3 and signal.raise_signal(signal.SIGINT),
                                                                        real(self, begin))[2])
        assert train.main(dict(GIVEN)) == 130
    assert 0 < steps.count("pretrain") < 6 and steps.count("sft") == 3
    assert capsys.readouterr().out.splitlines()[-1] == "go on with: python train.py --stage all --precision fp32 --threads 1"
    assert checkpoint.finished("out/demo/pretrain") and checkpoint.saved_step("out/demo/sft") == "3"
    assert train.main(dict(GIVEN)) == 0
    same(here, whole[0])


def test_overwrite_forgets_from_the_end(here, whole, monkeypatch):
    """Killed while it begins again, a later stage of the old journey must not pass for one of the new."""
    import shutil
    shutil.copytree(whole[0] / "out/demo", here / "out/demo", dirs_exist_ok=True, symlinks=True, ignore=lambda folder, names: {"raw"} & set(names))
    removed = []
    monkeypatch.setattr(Path, "unlink", lambda self, missing_ok=False: removed.append(self.parent.name) if len(removed) < 3 else (_ for _ in ()).throw(Killed()))
    with pytest.raises(Killed):
        train.main({**GIVEN, "overwrite": True})
    assert removed == ["vlm-2", "vlm-1", "dpo"]
    monkeypatch.undo()
    monkeypatch.chdir(here)
    journey.start_over([{"stage": name} for name in ROWS], Path("out/demo"))
    assert not any(checkpoint.finished(Path("out/demo") / name) for name in ROWS) and not Path("out/demo/journey.jsonl").exists()


# ---- flags

def test_minutes_are_shared_and_what_makes_no_sense_is_refused(monkeypatch):
    given = stages.rows({**GIVEN, "minutes": 10.0})
    total = sum(stages.STAGES[name].minutes for name in ROWS)
    assert [row["stage"] for row in given] == list(ROWS) and sum(row["time_limit"] for row in given) == pytest.approx(10)
    assert given[-1]["time_limit"] == pytest.approx(10 * stages.STAGES["vlm-2"].minutes / total) and not any("minutes" in row for row in given)
    assert not any("time_limit" in row for row in stages.rows(dict(GIVEN)))
    with pytest.raises(ValueError, match="does not know --steps, --data, --init: .* takes --stage, --run"):
        train.main({**GIVEN, "steps": 4, "data": "x", "init": "y"})
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="--minutes .*: expected more than 0"):
            stages.rows({**GIVEN, "minutes": wrong})
    with pytest.raises(ValueError, match="--minutes 3: is shared by several stages .* takes --time-limit"):
        stages.rows({"stage": "sft", "minutes": 3.0})


def test_plan_of_a_journey(tmp_path, monkeypatch, capsys):
    """All plans, before anything is there, and nothing is left behind."""
    monkeypatch.chdir(tmp_path)
    assert train.main({**GIVEN, "dry_run": True, "minutes": 5.0}) == 0
    printed = capsys.readouterr().out
    assert printed.count("length     ") == len(ROWS) and all(f"\n{name}\n" in printed for name in ROWS) and not Path("out").exists()


def test_peak_memory_is_that_of_the_stage():
    """The kernel's figure only rises: unless it is put back, every later stage has the peak of the largest before it."""
    if not device.reset_peak_memory():
        pytest.skip("only Linux can")
    big = torch.ones(60_000_000)
    with_it = device.peak_memory(torch.device("cpu"))
    del big
    assert device.reset_peak_memory() and device.peak_memory(torch.device("cpu")) < with_it - 150


# ---- the report

class Checker(HTMLParser):
    """Every element is closed in order, and nothing comes from elsewhere."""
    VOID = {"meta", "img", "br"}

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.sources = [], [], []
        self.feed(page)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href", "srcset", "data", "xlink:href")]
        assert not [name for name, _ in attributes if name.startswith("on")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag


def test_the_report_stands_alone(whole):
    """One file that opens anywhere: no script, no font, no address; the pictures are inside, a curve for each stage, the table of the screen."""
    place, printed = whole
    page = (place / "out/demo/report.html").read_text(encoding="utf-8")
    checker = Checker(page)
    assert checker.tags.count("svg") == len(ROWS) and checker.tags.count("img") == 6 and not {"script", "link", "iframe"} & set(checker.tags)
    assert all(source.startswith("data:image/png;base64,") for source in checker.sources)
    assert "http" not in page and "url(" not in page and "@import" not in page and "prefers-color-scheme: dark" in page
    for line in state(place)[2]:
        for sample in line["samples"]:
            assert report.text(sample["after"]) in page
    for name in ROWS:
        assert f"<h2>{name}</h2>" in page


def test_what_a_model_writes_cannot_harm_the_report(tmp_path):
    """A model repeats what it has read: a page that shows its words as they are runs whatever script stood in the data."""
    evil = "</td></table><script>alert(1)</script><img src=x onerror='alert(1)'>\"'&amp;\x00\x1b[31m\u2028天"
    stage = {"name": evil, "about": evil, "command": evil, "loss": [(1, 2.0)], "validation": [], "from": evil, "exams": [(evil, [[evil], [evil]])],
             "samples": [{"prompt": evil, "before": evil, "after": evil, "image": str(tmp_path / "none.png")}, {"prompt": evil, "before": evil, "after": evil}]}
    page = report.page(evil, evil, [[evil], [evil]], [stage])
    tags = Checker(page).tags
    assert not {"script", "img"} & set(tags) and "&lt;script&gt;" in page and "\x00" not in page and "\x1b" not in page and "&amp;amp;" in page


@pytest.mark.parametrize("loss, validation", [([], []), ([(1, 3.0)], []), ([(1, 3.0), (2, 3.0)], [(0, 3.0)]), ([(i, 9 - i / 100) for i in range(1, 700)], [(0, 9.0), (700, 2.0)]),
                                              ([(1, 1e-6), (2, 2e-6)], [(0, 3e-6)]), ([(1, 12345.0), (9, 11.0)], [(0, 0.01)])])
def test_curves(loss, validation):
    """A curve stays in its field, whatever its values; many points become few, with the same mean."""
    drawn = report.chart(loss, validation)
    assert bool(drawn) == bool(loss or validation)
    for points in [part.split('"')[0] for part in drawn.split('points="')[1:]]:
        for x, y in (map(float, point.split(",")) for point in points.split()):
            assert 0 <= x <= report.CHART[0] and 0 <= y <= report.CHART[1]
    thin = report.thinned(loss)
    assert len(thin) == min(len(loss), report.POINTS)
    if len(loss) > report.POINTS:
        assert sum(y for _, y in thin) / len(thin) == pytest.approx(sum(y for _, y in loss) / len(loss), rel=0.01)


@pytest.mark.parametrize("low, high", [(0.0, 1.0), (2.1, 9.3), (0.0, 1e-5), (0.0, 99999.0), (3.99, 4.01), (0.0, 10.0), (1.0, 2.0)])
def test_ticks_are_a_handful(low, high):
    found = report.ticks(low, high)
    assert 2 <= len(found) <= 8 and all(low <= tick <= high * (1 + 1e-9) for tick in found)
