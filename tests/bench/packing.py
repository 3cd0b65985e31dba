"""Packed rows against one conversation in each padded row: how full the rows are, and real tokens a second through train.py's own step.
In: files of chats and a tokenizer. Out: a table. Target: rows at least 95 % full, 1.7 times the real tokens a second.
`python tests/bench/packing.py --input FILES --tokenizer DIR`
Next: dpo.py

What is equal: conversations (those that fit a row), model, optimiser, precision, rows in a step, how the loss is computed (only targets reach the
vocabulary head). Padded rows need no document mask, so theirs is plain causal attention. A real token is one that is not padding.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

from tests.bench.train import loop_step
from tests.bench.turns import Contestant, alternate, table

CONTESTANTS = (Contestant("packed", "packed whole, document mask"), Contestant("padded", "one conversation a row, padded"))


def turn(args):
    """One contestant, in this process: --warm-up steps, then --steps timed ones. -> figures."""
    from nanomind import bins, device
    from nanomind.config import settle
    from nanomind.data import PackedTokens
    from nanomind.model import LanguageModel
    from nanomind.objectives import NextToken
    from nanomind.stages import STAGES

    class Causal(LanguageModel):
        def forward(self, tokens, doc_ids=None, **more):
            return super().forward(tokens, None, **more)

    folder = bins.open_folder(args.data)
    cfg, shape = settle(dict(stage="sft", preset=args.preset, batch_size=args.batch, seq_len=args.seq_len, threads=args.threads, steps=10_000), STAGES["sft"].defaults)
    rows = PackedTokens(folder.train, folder.tokenizer, cfg.seq_len, cfg.batch_size, whole=True)
    if args.turn == "padded":
        rows.bins = [[document] for packed in rows.bins for document in packed]
        rows.rows, rows.places = len(rows.bins), len(rows.bins) * cfg.seq_len
    machine = device.choose_device("cpu", cfg.precision, cfg.threads)
    model = (Causal if args.turn == "padded" else LanguageModel)(shape).init_weights().train()
    step = loop_step(cfg, "sft", NextToken(), machine, model, model, rows)
    for number in range(args.warm_up):
        step(number)
    began = time.perf_counter()
    for number in range(args.steps):
        step(args.warm_up + number)
    real = rows.used / rows.rows * cfg.batch_size  # tokens in a step, the mean of an epoch; every row takes as long
    return {"rate": args.steps * real / (time.perf_counter() - began), "full": 100 * rows.used / rows.places, "rows": rows.rows,
            "memory": device.peak_memory(machine.device)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", nargs="+", default=[], help="files of chats")
    parser.add_argument("--tokenizer", default="", help="tokenizer folder")
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--batch", type=int, default=4, help="rows in a step")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contestant")
    parser.add_argument("--steps", type=int, default=20, help="timed steps in a turn, timed together")
    parser.add_argument("--warm-up", type=int, default=3, help="steps before them")
    parser.add_argument("--threads", type=int, default=0, help="0: all cores")
    parser.add_argument("--data", default="", help=argparse.SUPPRESS)
    parser.add_argument("--turn", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.turn:
        return print(json.dumps(turn(args)))
    if not args.input or not args.tokenizer:
        parser.error("give --input FILES and --tokenizer DIR")
    from data_prep.common import prepare
    with tempfile.TemporaryDirectory() as place:
        prepare("chat", args.input, args.tokenizer, Path(place) / "data", val_share=0, max_bad=1)
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in vars(args).items() if name not in ("input", "tokenizer", "rounds", "data", "turn")]
        results = alternate(__file__, CONTESTANTS, args.rounds, [*flags, f"--data={place}/data"])
    print(f"\n{args.preset}, {args.batch} rows of {args.seq_len} a step; medians of {args.rounds} turns\n")
    table(CONTESTANTS, results, "packed", {"rate": ("real tokens/s", "{:,.0f}"), "full": ("% of the places are real tokens", "{:.1f}"), "rows": ("rows", "{:,.0f}"),
                                           "memory": ("peak memory, MB", "{:,.0f}")})


if __name__ == "__main__":
    main()
