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
from nanomind import parallel
from test_vision import clip, pictures  # noqa: F401  (fixtures)

SCRIPT = """import json, sys
sys.path.insert(0, sys.argv[1])
import train
from nanomind import parallel
from nanomind.cli import run
def counted(model, device, shard=parallel.shard):
    shard(model, device)
    print("HELD", sum(p.to_local().numel() for p in model.parameters()), "of", sum(p.numel() for p in model.parameters()), file=sys.stderr)
    return model
parallel.shard = counted
def main():
    for given in json.loads(sys.argv[2]):
        train.train(given)  # one group for all the runs
    parallel.leave()
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
            train.main(given(stage, "shard-ended", 3))
        said = side_by_side(here, [run for stage in STAGES for run in (
            given(stage, "begun", 3), resumed(stage, "ended", 6), given(stage, "shard-begun", 3, shard=True), {**resumed(stage, "shard-ended", 6), "shard": True})])
        for stage in STAGES:
            train.main(resumed(stage, "begun", 6))
            train.main(resumed(stage, "shard-begun", 6))
    return here, [errors for _, errors in said]


@pytest.mark.parametrize("run", ("begun", "ended", "shard-begun", "shard-ended"))
@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_with_two_processes_equals_one(world, stage, run):
    """Three steps by two processes and three by one, in either order, are six by one: weights, optimiser, log. A stage that forgot a
    process (a reference computed by each, a projector without gradient where a row has no picture) trains another model, or waits for ever."""
    one, other = (world[0] / "out" / name / stage for name in ("one", run))
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


def test_each_process_holds_its_part(world):
    """A --shard that shards nothing trains the right model, too, and runs out of memory where it is needed."""
    held = [[tuple(map(int, line.split()[1::2])) for line in errors.splitlines() if line.startswith("HELD")] for errors in world[1]]
    assert len(held[0]) == len(held[1]) == 2 * len(STAGES)
    for (first, size), (second, _) in zip(*held):
        assert first + second == size and abs(first - second) < 0.1 * size


def test_sharded_run_with_checkpointing_an_own_head_and_a_clock(world, data_folder, tiny):
    """A head that is not the embedding, layers computed a second time in the backward pass, and a schedule by the clock, of which each process
    has its own: all must save and validate at the same steps, else they wait for each other for ever."""
    here = world[0]
    (here / "untied.json").write_text(json.dumps({**json.loads(tiny.read_text()), "tie_word_embeddings": False}))
    common = dict(stage="pretrain", data=str(data_folder), preset="untied.json", seq_len=32, batch_size=2, accumulate=2, checkpointing=True, device="cpu", eval_tokens=64.0,
                  threads=1, precision="fp32")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        train.main({**common, "run": "plain", "steps": 4})
    side_by_side(here, [{**common, "run": "parts", "steps": 4, "shard": True}, {**common, "run": "clock", "time_limit": 0.03, "shard": True}])
    expected, found = (load_file(here / "out" / run / "pretrain" / "model.safetensors") for run in ("plain", "parts"))
    assert "lm_head.weight" in found and expected.keys() == found.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=2e-5, rtol=1e-3)
    assert (here / "out" / "clock" / "pretrain" / "model.safetensors").is_file()


def test_shard_alone_or_with_compile_is_refused(data_folder, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = dict(data=str(data_folder), preset=str(tiny), seq_len=32, steps=1, shard=True)
    with pytest.raises(ValueError, match="only one process"):
        train.main(given)
    with pytest.raises(ValueError, match="exclude each other"):
        train.main({**given, "compile": True})


# ---- what a GPU would see, as far as a computer without one can tell

@pytest.mark.parametrize("device, local_world, gpus, problem", (
    ("cuda:1", 2, 2, "a device of its own"), ("mps", 2, 0, "a device of its own"), ("auto", 4, 2, "--nproc_per_node 2"), ("cuda", 4, 2, "--device cpu")))
def test_processes_and_gpus_that_do_not_fit(device, local_world, gpus, problem, monkeypatch):
    """Two processes on one GPU wait for each other inside NCCL without a word."""
    for name, value in (("RANK", 0), ("WORLD_SIZE", local_world), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", local_world)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(ValueError, match=problem):
        parallel.join(device)


@pytest.mark.parametrize("device, gpus, backend", (("auto", 2, "nccl"), ("cuda", 2, "nccl"), ("cpu", 2, "gloo"), ("auto", 0, "gloo")))
def test_backend_goes_with_the_device(device, gpus, backend, monkeypatch):
    """--device cpu on a computer with GPUs sent CPU tensors to NCCL, which takes none."""
    for name, value in (("RANK", 1), ("WORLD_SIZE", 2), ("LOCAL_RANK", 1), ("LOCAL_WORLD_SIZE", 2)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda name, timeout: chosen.append(name))
    assert parallel.join(device) == parallel.Group(1, 2, 1, 2) and chosen == ([1, backend] if backend == "nccl" else [backend])


def test_masked_attention_off_the_cpu_repeats_keys(monkeypatch):
    """Of CUDA's fused kernels that take a mask not all share keys among queries; the one that is then left holds T x S scores for every head. On
    the meta device only shapes are computed, which is enough to see what the kernel is given."""
    from nanomind import model
    seen = []
    monkeypatch.setattr(model.F, "scaled_dot_product_attention", lambda q, k, v, attn_mask, is_causal, enable_gqa: seen.append((k.shape, v.shape, is_causal, enable_gqa)) or q)
    q, k = torch.zeros(2, 6, 8, 16, device="meta"), torch.zeros(2, 2, 8, 16, device="meta")
    model.attend(q, k, k, torch.zeros(2, 1, 8, 8, device="meta"))
    model.attend(q, k, k, None)
    assert seen == [(q.shape, q.shape, False, False), (k.shape, k.shape, True, True)]


@pytest.mark.parametrize("precision, expected", (("fp32", "highest"), ("auto", "high"), ("bf16", "high")))
def test_fp32_on_a_gpu_is_fp32(precision, expected, monkeypatch):
    """--precision fp32 on a GPU was TF32: ten bits of mantissa under the name of 23."""
    from nanomind import device
    chosen = []
    monkeypatch.setattr(torch, "empty", lambda *size, device: None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", chosen.append)
    threads = torch.get_num_threads()
    device.choose_device("cuda", precision, threads)
    assert chosen == [expected]
