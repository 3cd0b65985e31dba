"""Every stage under two processes: one pair of them, started once as torchrun would, runs them all on a tiny model."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import train
from conftest import ROOT, sentences
from data_prep.common import prepare
from test_vision import clip, pictures  # noqa: F401  (fixtures)

SCRIPT = """import json, sys
sys.path.insert(0, sys.argv[1])
import train
from nanomind import parallel
from nanomind.cli import run
leave, parallel.leave = parallel.leave, lambda: None  # one group for all the runs
def main():
    for given in json.loads(sys.argv[2]):
        train.main(given)
    leave()
run(main)
"""
FROM = {"sft": "pretrain", "dpo": "pretrain", "vlm-1": "pretrain", "vlm-2": "vlm-1"}  # distill begins with random weights
STAGES = ("sft", "distill", "dpo", "vlm-1", "vlm-2")


def side_by_side(cwd, runs, world=2):
    """Do the runs, one after the other, in `world` processes that form one group; what any of them says on stderr is shown when one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = [subprocess.Popen([sys.executable, "-c", SCRIPT, str(ROOT), json.dumps(runs)], cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={
        **os.environ, "OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}) for rank in range(world)]
    try:
        said = [process.communicate(timeout=180) for process in started]
    finally:
        for process in started:
            process.kill()
    assert not any(process.returncode for process in started), [(p.returncode, errors[-1500:]) for p, (_, errors) in zip(started, said)]
    return said


@pytest.fixture(scope="module")
def world(tmp_path_factory, data_folder, tokenizer_folder, tiny, pictures, clip):  # noqa: F811
    """A folder where each stage has run three times: by one process ("one"), begun by two ("begun"), gone on with by two ("ended")."""
    here, texts = tmp_path_factory.mktemp("stages"), list(sentences(240, seed=5))
    chats = [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in zip(texts[::2], texts[1::2])]
    raw = {"chat": [{"conversations": chat} for chat in chats],
           "pairs": [{"chosen": chat, "rejected": [chat[0], {"role": "assistant", "content": chat[1]["content"] + "啊啊"}]} for chat in chats]}
    for name, records in raw.items():
        (here / f"{name}.jsonl").write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
        prepare(name, [here / f"{name}.jsonl"], tokenizer_folder, here / "data" / name, val_share=0.15, workers=1)
    data = {"pretrain": data_folder, "dpo": here / "data" / "pairs", "vlm-1": pictures, "vlm-2": pictures}

    def given(stage, run, steps, **more):
        known = {"clip": str(clip), "projector_lr": 0.01} if stage.startswith("vlm") else {}
        start = {"init": f"out/start/{FROM[stage]}"} if stage in FROM else {"preset": str(tiny)}
        start.update({"teacher": "out/start/pretrain"} if stage == "distill" else {})
        return {**dict(stage=stage, run=run, data=str(data.get(stage, here / "data" / "chat")), seq_len=96, batch_size=2, accumulate=4, steps=steps, decay=0.0, device="cpu",
                       eval_tokens=100.0, eval_every=100, threads=1, precision="fp32"), **known, **start, **more}

    def resumed(stage, run, steps):
        return {name: value for name, value in given(stage, run, steps, resume=True).items() if name != "init"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        train.main(given("pretrain", "start", 8))
        train.main(given("vlm-1", "start", 2))
        for stage in STAGES:
            train.main(given(stage, "one", 6))
            train.main(given(stage, "ended", 3))
        side_by_side(here, [run for stage in STAGES for run in (given(stage, "begun", 3), resumed(stage, "ended", 6))])
        for stage in STAGES:
            train.main(resumed(stage, "begun", 6))
    return here


@pytest.mark.parametrize("run", ("begun", "ended"))
@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_with_two_processes_equals_one(world, stage, run):
    """Three steps by two processes and three by one, in either order, are six by one: weights, optimiser, log. A stage that forgot a
    process (a reference computed by each, a projector without gradient where a row has no picture) trains another model, or waits for ever."""
    one, other = world / "out" / "one" / stage, world / "out" / run / stage
    names = {path.name for path in one.glob("*.safetensors")}
    assert names == {path.name for path in other.glob("*.safetensors")}
    for name in names:
        expected, found = load_file(one / name), load_file(other / name)
        assert expected.keys() == found.keys()
        for key in expected:
            torch.testing.assert_close(found[key], expected[key], atol=2e-5, rtol=1e-3, equal_nan=True, msg=lambda text: f"{name} {key}: {text}")
    logs = [[json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] for folder in (one, other)]
    losses = [[(line["step"], line["loss"], line["grad_norm"]) for line in lines if "loss" in line] for lines in logs]
    assert [step for step, _, _ in losses[1]] == [1, 2, 3, 4, 5, 6]
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), atol=1e-4, rtol=1e-3)
