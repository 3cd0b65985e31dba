"""Command line of the demo world: `python -m data_prep.demo --out data/demo-raw`.
In: flags. Out: DIR/pretrain.jsonl, one {"text": ...} object a line, ready for bpe.py and data_prep.text; `exam --out DIR`: DIR/exam-*.jsonl.
Next: nanomind/data.py
"""

import argparse
from pathlib import Path

from data_prep.demo import write
from data_prep.demo.exam import write_exam
from nanomind.cli import run


def main():
    parser = argparse.ArgumentParser(prog="python -m data_prep.demo", description=__doc__.split("\n")[0])
    parser.add_argument("what", nargs="?", default="world", choices=("world", "exam"), help="training files (default), or the exams about it")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write into (made when missing)")
    parser.add_argument("--seed", type=int, default=0, help="another seed mixes the same world differently (default: 0)")
    parser.add_argument("--exposures", type=int, default=80, metavar="N",
                        help="times each fact is stated in Chinese (in English half of it); sets the size (default: 80)")
    flags = parser.parse_args()
    if flags.what == "exam" and (flags.seed, flags.exposures) != (parser.get_default("seed"), parser.get_default("exposures")):
        raise ValueError("exams are the same for all: leave out --seed and --exposures")
    for path in write_exam(flags.out) if flags.what == "exam" else write(Path(flags.out), flags.seed, flags.exposures):
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run(main)
