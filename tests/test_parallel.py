"""Two processes (gloo, CPU) train what one trains: started by torchrun as a user would, on a tiny model."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from conftest import ROOT


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    return tmp_path_factory.mktemp("parallel")


def command(processes, data_folder, tiny, run, *flags):
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "--"] if processes > 1 else [sys.executable]
    return [*start, str(ROOT / "train.py"), "--stage", "pretrain", "--data", str(data_folder), "--preset", str(tiny), "--run", run, "--seq-len", "32", "--batch-size", "2",
            "--accumulate", "4", "--device", "cpu", "--precision", "fp32", "--eval-tokens", "200", "--threads", "1", *map(str, flags)]


def train(here, *args):
    done = subprocess.run(command(*args), cwd=here, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[:4000] + done.stderr[-2000:]  # what a process says comes first, torchrun's summary last
    return done.stdout


def weights(here, run):
    return load_file(here / "out" / run / "pretrain" / "model.safetensors")


def log(here, run):
    return [json.loads(line) for line in (here / "out" / run / "pretrain" / "log.jsonl").read_text().splitlines()]


def test_two_processes_equal_one(here, data_folder, tiny):
    """Clipping before the reduction, means of means, or a different order of the data: each makes two processes train another model than one."""
    train(here, 1, data_folder, tiny, "one", "--steps", 6)
    out = train(here, 2, data_folder, tiny, "two", "--steps", 6)
    assert out.count("done: 6 steps") == 1, "one process speaks for all"
    one, two = weights(here, "one"), weights(here, "two")
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=1e-4)
    for a, b in zip(log(here, "one"), log(here, "two")):
        assert a["step"] == b["step"]
        for figure in ("loss", "grad_norm", "val_loss", "tokens", "lr"):
            assert (figure in a) == (figure in b) and b.get(figure, 0) == pytest.approx(a.get(figure, 0), rel=1e-4)


def test_resume_with_another_number_of_processes(here, data_folder, tiny):
    """The place in the data is a step number, so a run may go on with more or fewer processes than it began with."""
    train(here, 2, data_folder, tiny, "moved", "--steps", 3, "--decay", 0)
    train(here, 1, data_folder, tiny, "moved", "--steps", 6, "--resume")
    train(here, 1, data_folder, tiny, "stayed", "--steps", 6, "--decay", 0)
    one, two = weights(here, "stayed"), weights(here, "moved")
    assert [line["step"] for line in log(here, "moved") if "loss" in line] == [1, 2, 3, 4, 5, 6]
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("body, code", (("return None", 0), ("return 3", 3), ("raise ValueError('wrong')", 2)))
def test_a_process_of_a_group_is_not_shut_down_under_its_threads(body, code):
    """One run in six ended with SIGABRT: gloo's threads were still letting go of tensors while the interpreter shut down. What is printed
    arrives, the exit code too, and no part of the shutdown (here an atexit function) takes place."""
    script = f"import atexit\nfrom nanomind.cli import run\natexit.register(print, 'shut down')\ndef main():\n    print('done')\n    {body}\nrun(main)\n"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, env={**os.environ, "LOCAL_RANK": "0"})
    assert (done.returncode, done.stdout) == (code, "done\n") and ("wrong" in done.stderr) == (code == 2)
    alone = {name: value for name, value in os.environ.items() if name != "LOCAL_RANK"}
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, env=alone).stdout == "done\nshut down\n"


def test_accumulation_must_be_shared_evenly(here, data_folder, tiny):
    """Processes that took different numbers of micro-batches would wait for each other for ever."""
    done = subprocess.run(command(2, data_folder, tiny, "uneven", "--steps", 1, "--accumulate", 3), cwd=here, capture_output=True, text=True)
    assert done.returncode and "give a multiple of 2" in done.stderr


def test_a_killed_process_ends_the_run_and_leaves_a_good_checkpoint(here, data_folder, tiny):
    """A process that dies must not leave the others waiting, nor half a checkpoint."""
    process = subprocess.Popen(command(2, data_folder, tiny, "killed", "--steps", 100000, "--save-every", 5, "--eval-every", 100000), cwd=here, text=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
    folder, until = here / "out" / "killed" / "pretrain", time.monotonic() + 120
    while not (folder / "model.safetensors").is_file() and time.monotonic() < until:
        time.sleep(0.1)
    workers = [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and parent(pid) == process.pid and b"train.py" in command_line(pid)]
    os.kill(max(workers), signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode and ("another process of this run has ended" in errors or "stopping after this step" in errors), errors[-2000:]
    steps = max(line["step"] for line in log(here, "killed") if "loss" in line)
    train(here, 1, data_folder, tiny, "killed", "--resume", "--steps", steps + 2)
    assert log(here, "killed")[-1]["step"] == steps + 2


def parent(pid):
    try:
        return int(open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[1])
    except (OSError, ValueError):
        return -1


def command_line(pid):
    try:
        return open(f"/proc/{pid}/cmdline", "rb").read()
    except OSError:
        return b""
