"""Command line of the demo world: `python -m data_prep.demo --out data/demo-raw`.
In: flags. Out: DIR/pretrain.jsonl with {"text": ...} for data_prep.text, DIR/sft.jsonl with conversations for data_prep.chat (and DIR/recall.jsonl
with text beside them), and DIR/dpo.jsonl with pairs for data_prep.pairs, one object a line; `exam --out DIR`: DIR/exam-*.jsonl.
Next: nanomind/data.py
"""

from pathlib import Path

from data_prep.demo import write
from data_prep.demo.exam import write_exam
from nanomind.cli import Parser, run


def main():
    parser = Parser(prog="python -m data_prep.demo", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("what", nargs="?", default="world", choices=("world", "exam"), help="training files (default), or the exams about it")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write into (made when missing)")
    parser.add_argument("--seed", type=int, default=0, help="another seed mixes the same world differently (default: 0)")
    parser.add_argument("--exposures", type=int, default=140, metavar="N",
                        help="times each fact is stated in Chinese, and half as many again in English; sets the size (default: 140)")
    parser.add_argument("--asked", type=int, default=36, metavar="N",
                        help="times each fact that is not held out is asked about in Chinese, and half as many again in English (default: 36)")
    parser.add_argument("--mixed", type=int, default=8, metavar="N",
                        help="the same for dialogues written out in the pretraining text (default: 8)")
    flags = parser.parse_args()
    if flags.what == "exam" and vars(flags) != vars(parser.parse_args(["exam", "--out", flags.out])):
        raise ValueError("exams are the same for all: leave out --seed, --exposures, --asked and --mixed")
    for path in write_exam(flags.out) if flags.what == "exam" else write(Path(flags.out), flags.seed, flags.exposures, flags.asked, flags.mixed):
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run(main)
