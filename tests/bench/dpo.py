"""Time per preference pair and peak memory of DPO: ours with stored reference log-probabilities, and MiniMind's own train_epoch of its train_dpo.py.
In: files of pairs, a tokenizer, the path of a checkout of MiniMind (none of its code is here). Out: a table, and the two ratios.
`python tests/bench/dpo.py --input FILES --tokenizer DIR --minimind CHECKOUT`. Target: 0.55 of the time, 0.6 of the memory.
Next: README.md

What is equal: pairs (those whose two conversations have at most --max-length tokens), their tokens, shape, AdamW, a step per batch. What is each one's own:
precision (MiniMind on a CPU computes in fp32; one row shows it under bf16 autocast), batches, how the loss is computed. MiniMind pads each conversation to
--max-length and reads policy and reference, 2 x 4 rows a step as is its default. Ours packs pairs into rows of 2 x --max-length; with 2 rows a step there
are about as many pairs in it as in MiniMind's. The reference is there already, as from the second epoch on; the first costs one forward pass more.
MiniMind's batches are made before the clock starts, and `datasets` is not imported: its loader's time and memory do not count against it.
"""

import argparse
import json
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

from tests.bench.train import loop_step, minimind_model
from tests.bench.turns import Contestant, alternate, chosen, table

CONTESTANTS = (
    Contestant("ours", "ours: 2 rows"),
    Contestant("ours-4", "ours: 4 rows, the default"),
    Contestant("ours-fp32", "ours: 2 rows, fp32"),
    Contestant("minimind", "MiniMind: fp32"),
    Contestant("minimind-bare", "MiniMind: the same, the allocator as it is", tuned=False),
    Contestant("minimind-bf16", "MiniMind under bf16 autocast"),
)


def our_steps(args):
    """-> seconds and pairs of each step."""
    import torch
    from nanomind import bins, device
    from nanomind.config import settle
    from nanomind.data import PackedTokens
    from nanomind.model import LanguageModel
    from nanomind.objectives import DPO
    from nanomind.stages import STAGES, Run

    folder = bins.open_folder(Path(args.data) / "folder")
    cfg, shape = settle(dict(stage="dpo", preset=args.preset, threads=args.threads, steps=10_000, precision="fp32" if args.turn.endswith("fp32") else "auto"),
                        {**STAGES["dpo"].defaults, "seq_len": 2 * args.max_length, "batch_size": 4 if args.turn.endswith("4") else 2})
    rows = PackedTokens(folder.train, folder.tokenizer, cfg.seq_len, cfg.batch_size, whole=True, group=2)
    assert not rows.left_out, rows.left_out
    machine = device.choose_device("cpu", cfg.precision, cfg.threads)
    model = LanguageModel(shape).init_weights().train()
    reference = torch.full((len(rows.starts),), -200.0)  # what the numbers are changes nothing about time and memory
    step = loop_step(cfg, "dpo", DPO(Run(cfg, reference={"train": reference})), machine, model, model, rows)
    pairs = len(rows.starts) / 2 / rows.rows * cfg.batch_size  # rows hold 2 to 18 of them and take equally long: the mean is that of an epoch
    for number in range(args.warm_up + args.steps):
        began = time.perf_counter()
        step(number)
        yield time.perf_counter() - began, pairs


def minimind_steps(args):
    """Its own dataset, collation and epoch. -> seconds and pairs of each step."""
    import copy
    import torch
    from transformers import AutoTokenizer

    model = minimind_model(args.minimind, args.preset).train()
    datasets = sys.modules["datasets"] = ModuleType("datasets")
    datasets.Features = datasets.Sequence = datasets.Value = None
    datasets.load_dataset = lambda kind, data_files, split: [json.loads(line) for line in open(data_files, encoding="utf-8")]
    from trainer import train_dpo
    tokenizer = AutoTokenizer.from_pretrained(args.data + "/folder")
    tokenizer.bos_token, tokenizer.eos_token = "<|im_start|>", "<|im_end|>"  # how MiniMind finds the answers
    data = train_dpo.DPODataset(args.data + "/pairs.jsonl", tokenizer, max_length=args.max_length)
    count, size = args.warm_up + args.steps, args.batch
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).repeat(1 + count * size // len(data)).tolist()
    batches = [torch.utils.data.default_collate([data[i] for i in order[step * size:(step + 1) * size]]) for step in range(count)]
    reference = copy.deepcopy(model).eval().requires_grad_(False)
    train_dpo.args = SimpleNamespace(device="cpu", epochs=1, learning_rate=4e-8, accumulation_steps=1, grad_clip=1.0, log_interval=10**9, save_interval=10**9)
    train_dpo.autocast_ctx = torch.autocast("cpu", dtype=torch.bfloat16) if args.turn.endswith("bf16") else nullcontext()
    train_dpo.model, train_dpo.optimizer = model, torch.optim.AdamW(model.parameters(), lr=4e-8)
    train_dpo.scaler = torch.amp.GradScaler("cpu", enabled=False)
    ticks = []

    def loader():
        for batch in batches:
            ticks.append(time.perf_counter())
            yield batch
        ticks.append(time.perf_counter())
    train_dpo.train_epoch(0, loader(), 10**9, reference, model.config)
    return [(end - begin, size) for begin, end in zip(ticks, ticks[1:])]


def turn(args):
    """One contestant, in this process: --warm-up steps, then --steps timed ones. -> figures."""
    import torch
    from nanomind.device import peak_memory
    if args.threads:
        torch.set_num_threads(args.threads)
    steps = list((our_steps if args.turn.startswith("ours") else minimind_steps)(args))[args.warm_up:]
    seconds, pairs = (sum(column) for column in zip(*steps))
    return {"rate": pairs / seconds, "seconds": seconds / pairs, "pairs": pairs / args.steps, "memory": peak_memory(torch.device("cpu"))}


def write_pairs(args, place):
    """The pairs whose two conversations fit --max-length, as raw file for MiniMind and as data folder for ours."""
    from data_prep import pairs
    from data_prep.common import prepare
    from nanomind.records import Reader
    from nanomind.tokenizer import Tokenizer
    tokenizer, used = Tokenizer.load(args.tokenizer), 0
    with open(place / "pairs.jsonl", "w", encoding="utf-8") as file:
        for _, both, _ in pairs.items(Reader(args.input, max_bad=1)):
            if all(1 + len(tokenizer.render_chat(messages)[0]) <= args.max_length for messages in both):
                file.write(json.dumps(dict(zip(("chosen", "rejected"), both)), ensure_ascii=False) + "\n")
                used += 1
    prepare("pairs", [place / "pairs.jsonl"], args.tokenizer, place / "folder", val_share=0)
    return used


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", nargs="+", default=[], help="files of preference pairs")
    parser.add_argument("--tokenizer", default="", help="tokenizer folder")
    parser.add_argument("--minimind", default="", help="path of a checkout of MiniMind")
    parser.add_argument("--preset", default="small")
    parser.add_argument("--max-length", type=int, default=512, help="most tokens of a conversation; MiniMind pads to it")
    parser.add_argument("--batch", type=int, default=4, help="pairs in a step of MiniMind")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contestant")
    parser.add_argument("--steps", type=int, default=6, help="timed steps in a turn, timed together")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before them")
    parser.add_argument("--threads", type=int, default=0, help="0: all cores")
    parser.add_argument("--only", default="", help="names of contestants, separated by commas: " + ", ".join(c.name for c in CONTESTANTS))
    parser.add_argument("--data", default="", help=argparse.SUPPRESS)
    parser.add_argument("--turn", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.turn:
        return print(json.dumps(turn(args)))
    if not args.input or not args.tokenizer:
        parser.error("give --input FILES and --tokenizer DIR")
    contestants = chosen(parser, CONTESTANTS, args.only)
    with tempfile.TemporaryDirectory() as place:
        used = write_pairs(args, Path(place))
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in vars(args).items() if name not in ("input", "tokenizer", "rounds", "only", "data", "turn")]
        results = alternate(__file__, contestants, args.rounds, [*flags, f"--data={place}"])
    print(f"\n{args.preset}, {used:,} pairs with at most {args.max_length} tokens a conversation; medians of {args.rounds} turns\n")
    table(contestants, results, contestants[0].name, {"rate": ("pairs/s", "{:.2f}"), "seconds": ("seconds a pair", "{:.3f}"), "pairs": ("pairs in a step", "{:.1f}"),
                                                      "memory": ("peak memory, MB", "{:,.0f}")})
    peers = [results[name] for name in ("minimind", "minimind-bare") if "seconds" in results.get(name, {})]
    for name in ("ours", "ours-4"):
        if peers and "seconds" in results.get(name, {}):
            ratios = (results[name][figure] / min(peer[figure] for peer in peers) for figure in ("seconds", "memory"))
            print("\n{}: {:.2f} of the time per pair and {:.2f} of the peak memory of MiniMind's better fp32 row".format(name, *ratios))


if __name__ == "__main__":
    main()
