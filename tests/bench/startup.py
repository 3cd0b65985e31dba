"""Seconds from `sample.py --prompt` to the first token on the screen, and what they are made of; random weights.
In: a preset. Out: a table: the whole, importing torch, reading the weights, and what is left, our own share.
`python tests/bench/startup.py --preset base`
Next: README.md

Each turn is a fresh process, in alternation; the files are warm in the system's cache. Importing and reading are measured by processes that do
only that.
"""

import argparse
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

READ = """
from safetensors import safe_open
with safe_open({path!r}, framework="pt") as file:
    for name in file.keys():
        file.get_tensor(name).to(torch.bfloat16)
"""


def make_folder(folder, preset):
    """A checkpoint folder of random weights, with a small tokenizer."""
    import bpe
    from nanomind import checkpoint
    from nanomind.config import load_preset
    from nanomind.model import LanguageModel
    text, draw = folder / "text.txt", random.Random(0)
    text.write_text(" ".join("".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(3, 8))) for _ in range(40_000)), encoding="utf-8")
    model = LanguageModel(load_preset(preset)[0]).init_weights()
    tokenizer = bpe.train([text], vocab_size=model.config.vocab_size)  # every id the model may choose has a text
    checkpoint.begin_folder(folder, model.config, tokenizer, chat=False)
    weights = model.state_dict()
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    checkpoint.write_tensors(folder / "model.safetensors", weights, {"format": "pt", "step": "0"})


def seconds(command, first=0):
    """Until a process has written `first` bytes and one more, or has ended when `first` is 0."""
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        if first:
            assert len(process.stdout.read(first + 1)) == first + 1, process.stderr.read().decode()
            found = time.perf_counter() - began
            process.kill()
        else:
            process.communicate()
            assert process.returncode == 0
            found = time.perf_counter() - began
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="base")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    prompt = "The quick brown fox"
    with tempfile.TemporaryDirectory() as place:
        make_folder(Path(place), args.preset)
        sample = [sys.executable, str(ROOT / "sample.py"), "--ckpt", place, "--prompt", prompt]
        weights = str(Path(place) / "model.safetensors")
        runs = {"--help": lambda: seconds([sys.executable, str(ROOT / "sample.py"), "--help"]),
                "importing torch": lambda: seconds([sys.executable, "-c", "import torch"]),
                "importing torch, reading the weights as bf16": lambda: seconds([sys.executable, "-c", "import torch" + READ.format(path=weights)]),
                "to the first token": lambda: seconds(sample, len(prompt)),
                "to the first token, --int8": lambda: seconds([*sample, "--int8"], len(prompt))}
        found = {name: [] for name in runs}
        for number in range(args.rounds + 1):
            for name, run in runs.items():
                found[name].append(run())
        middle = {name: statistics.median(times[1:]) for name, times in found.items()}  # the first round warms the files
    read = middle["importing torch, reading the weights as bf16"]
    print(f"{args.preset}, medians of {args.rounds} turns, seconds\n")
    for name, value in middle.items():
        print(f"{name:46} {value:.2f}" + (f"   of which our own share {value - read:.2f}" if "first" in name else ""))


if __name__ == "__main__":
    main()
