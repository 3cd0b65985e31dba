"""Bits per byte against minutes of training: train.py's own step, MiniMind's own train_epoch, nanoGPT's recipe; one run of one contestant.
In: a data folder of text made by data_prep.text, for a peer the path of its checkout (none of its code is here). Out: a JSON file of the run in --out;
`table` prints those that are there. Target: MiniMind's figure after 20 minutes in 4, nanoGPT's in 7.
Next: decode.py

    python tests/bench/loss.py ours     --data DIR --out DIR --minutes 4 -- --lr 0.02          (behind -- any flags of train.py)
    python tests/bench/loss.py minimind --data DIR --out DIR --minutes 20 --checkout CHECKOUT --batch 8
    python tests/bench/loss.py nanogpt  --data DIR --out DIR --minutes 20 --checkout CHECKOUT --batch 12 --block 256
    python tests/bench/loss.py table    --out DIR

What is equal: ids, shape (nanoGPT: number of parameters), threads, the allocator's settings (--bare: without), gradients clipped at 1, no accumulation, the
clock. It runs while a contestant trains and stands still while it is measured, and every contestant's learning rate follows it, so that each one's own curve
ends exactly with its minutes. What is each one's own:
- ours: all the defaults of the preset; rows cut from the stream of documents, with the document mask.
- MiniMind: its model, train_epoch and get_lr, AdamW at 5e-4, fp32 (on a CPU its autocast context is empty); a row is the first 338 tokens of one document
  between begin and end, padded to its default of 340. Rows are made of ids that are there already: its loader's tokenising does not count against it.
- nanoGPT: its model and optimiser, the curve of its train.py, the settings of its config/train_shakespeare_char.py (1e-3, beta2 0.99, 100 steps of warm-up, a
  tenth of the rate at the end) with the dropout of 0 it advises for CPUs; random windows of the stream of ids. Under bf16 autocast with --bf16 (on a CPU its own
  context is empty). A layer fewer and as wide as ours has the same number of parameters: its layers have 12 C^2, its positions are learnt.

Measured by our own code in fp32, on the same held-out documents, in two ways. `documents`: the first 256 tokens of each document alone in a row, which all of them
can read as they do in training. `stream`: all tokens of these documents, in rows of a contestant's own length cut from the stream; ours looks inside documents
only, the others see what stands before. Targets and bytes are the same for everyone in each of the two, special tokens are no text and do not count.
"""

import argparse
import itertools
import json
import math
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

from nanomind.cli import keep_memory

HEAD = 256  # tokens of a document in `documents`


class Clock:
    """Runs from step to step; stands still while the contestant is measured, at `points` equal distances. With one thread it counts the time the
    processor spends on this process: the wall clock of a core that nobody else uses, whatever else runs on the machine."""

    def __init__(self, args, measure):
        self.now = time.process_time if args.threads == 1 else time.monotonic
        self.limit, self.measure, self.points, self.began = args.minutes * 60, measure, args.points, time.monotonic()
        self.spent, self.since, self.done, self.steps, self.tokens, self.targets, self.curve = 0.0, None, 0, -1, 0, 0, []

    def tick(self, tokens=0, targets=0):
        """Call it between steps, with the places and targets of the step just done. -> share of the time that is over, or None: stop."""
        if self.since is not None:
            self.spent += self.now() - self.since
        self.steps, self.tokens, self.targets = self.steps + 1, self.tokens + tokens, self.targets + targets
        share = self.spent / self.limit
        if share >= self.done / max(1, self.points) and self.points and share < 1:
            self.curve.append({"minutes": self.spent / 60, "tokens": self.tokens, **self.measure()})
            print(f"{self.spent / 60:6.2f} minutes {self.steps:>6} steps {self.targets / max(self.spent, 1e-9):>7,.0f} targets/s  bpb {self.curve[-1]['bpb']:.4f}  "
                  f"{self.curve[-1]['product_rate']:.0f} GFLOP/s", flush=True)
            self.done += 1
        self.since = self.now()
        return share if share < 1 else None


def ours(args, folder, flags, start):
    """train.py's own step, its optimiser, rows and schedule."""
    import tempfile
    import train
    from nanomind import checkpoint, device, optim, stages
    from nanomind.config import TrainConfig, parse_flags, settle
    from nanomind.data import PackedTokens
    from nanomind.model import LanguageModel
    from nanomind.objectives import NextToken

    class Causal(LanguageModel):
        def forward(self, tokens, doc_ids=None, **more):
            return super().forward(tokens, None, **more)

    given = parse_flags(TrainConfig, flags, "")
    cfg, shape = settle({"preset": args.preset, "time_limit": args.minutes, "threads": args.threads, **given})
    rows = PackedTokens(folder.train, folder.tokenizer, cfg.seq_len, cfg.batch_size, cfg.seed)
    machine = device.choose_device("cpu", cfg.precision, cfg.threads)
    model = (Causal if args.causal else LanguageModel)(shape, cfg.checkpointing).init_weights(cfg.seed).train()
    for part, factor in (text.split("=") for text in args.scale):
        for name, p in model.named_parameters():
            if part in name:
                p.data.mul_(float(factor))
    runner, clock = torch.compile(model) if cfg.compile else model, start(model, cfg.seq_len)
    trainer = train.Trainer(cfg, stages.STAGES["pretrain"], NextToken(), machine, folder.tokenizer, model, runner, optim.Optimizer(model, cfg, machine.dtype), rows, None,
                            Path("."), {"step": 0, "tokens": 0, "seconds": 0.0}, checkpoint.Log(Path(tempfile.mkdtemp()) / "log.jsonl"), time.monotonic())
    count, share = cfg.batch_size * cfg.accumulate * cfg.seq_len, clock.tick()
    while share is not None:
        trainer.take_step(share)
        before, share = share, clock.tick(count, count)
        trainer.step_share = (share or 1.0) - before
    return {"machine": machine.reasons, "given": given, "scale": args.scale, "causal": args.causal}


def minimind(args, folder, flags, start):
    """Its train_epoch over its kind of rows; the loader it is given looks at the clock."""
    from tests.bench.train import minimind_model
    model = minimind_model(args.checkout, args.preset).train()
    sys.modules["datasets"] = ModuleType("datasets")  # of its loader, which is not used
    for name in ("load_dataset", "Features", "Sequence", "Value"):
        setattr(sys.modules["datasets"], name, None)
    from trainer import train_pretrain
    random, split, T = torch.Generator().manual_seed(42), folder.train, args.block or 340
    ends = np.append(split.starts[1:], len(split.tokens))

    class Hidden:
        lm_head = model.lm_head

        def __call__(self, tokens, doc_ids):
            return model.model(tokens)[0]

    clock = start(Hidden(), T, model)

    def row(document):
        """Begin, the text, end, padding, as PretrainDataset makes it of a document's text."""
        ids = split.tokens[split.starts[document]:ends[document]][:T - 1].astype(np.int64)
        tokens, labels = np.zeros(T, dtype=np.int64), np.full(T, -100)
        tokens[:len(ids)], labels[:len(ids)] = ids, ids
        labels[len(ids)] = folder.tokenizer.end_of_text  # begin, end and padding are one id here: what counts is decided by place
        return torch.from_numpy(tokens), torch.from_numpy(labels)

    def loader():
        share = clock.tick()
        while True:
            order = torch.randperm(len(split.starts), generator=random).tolist()
            for at in range(0, len(order), args.batch):
                if share is None:
                    return
                rates.append(share)
                tokens, labels = map(torch.stack, zip(*map(row, order[at:at + args.batch])))
                yield tokens, labels
                share = clock.tick(tokens.numel(), int((labels[:, 1:] >= 0).sum()))

    rates, get_lr = [], train_pretrain.get_lr
    train_pretrain.get_lr = lambda step, total, lr: get_lr(rates[-1], 1.0, lr)
    lr = args.lr or 5e-4
    train_pretrain.args = SimpleNamespace(device="cpu", epochs=1, learning_rate=lr, accumulation_steps=1, grad_clip=1.0, log_interval=100, save_interval=10**9)
    train_pretrain.autocast_ctx = torch.autocast("cpu", dtype=torch.bfloat16) if args.bf16 else nullcontext()
    train_pretrain.model, train_pretrain.optimizer = model, torch.optim.AdamW(model.parameters(), lr=lr)
    train_pretrain.scaler, train_pretrain.Logger = torch.amp.GradScaler("cpu", enabled=False), lambda text: None
    train_pretrain.train_epoch(0, loader(), 10**9)
    return {"batch": args.batch, "row": T, "lr": lr, "bf16": args.bf16}


def nanogpt(args, folder, flags, start):
    """The loop of its train.py with its model and optimiser."""
    from nanomind.config import load_preset
    sys.path.insert(0, str(Path(args.checkout).resolve()))
    from model import GPT, GPTConfig
    shape, T, ids = load_preset(args.preset)[0], args.block or 256, folder.train.tokens
    C, vocabulary = shape.hidden_size, shape.vocab_size
    layers = round((shape.parameters() - (vocabulary + T) * C) / (12 * C * C))
    torch.manual_seed(1337)
    model = GPT(GPTConfig(block_size=T, vocab_size=vocabulary, n_layer=layers, n_head=shape.num_attention_heads, n_embd=C, dropout=0.0, bias=False)).train()
    lr = args.lr or 1e-3
    optimizer = model.configure_optimizers(0.1, lr, (0.9, args.beta2), "cpu")
    autocast = torch.autocast("cpu", dtype=torch.bfloat16) if args.bf16 else nullcontext()

    class Hidden:
        lm_head, kept = model.lm_head, []

        def __call__(self, tokens, doc_ids):
            hook = model.transformer.ln_f.register_forward_hook(lambda module, given, out: self.kept.append(out))
            model(tokens)
            hook.remove()
            return self.kept.pop()

    clock, warm, warm_share = start(Hidden(), T, model), 100, 0.0
    share = clock.tick()
    while share is not None:
        if clock.steps < warm:
            rate, warm_share = lr * (clock.steps + 1) / (warm + 1), share
        else:
            rate = lr / 10 + 0.5 * (1 + math.cos(math.pi * (share - warm_share) / (1 - warm_share))) * (lr - lr / 10)
        for group in optimizer.param_groups:
            group["lr"] = rate
        places = torch.randint(len(ids) - T, (args.batch,)).tolist()
        x, y = (torch.stack([torch.from_numpy(ids[i + shift:i + shift + T].astype(np.int64)) for i in places]) for shift in (0, 1))
        with autocast:
            loss = model(x, y)[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        share = clock.tick(x.numel(), x.numel())
    return {"batch": args.batch, "row": T, "lr": lr, "layers": layers, "beta2": args.beta2, "bf16": args.bf16}


class Ruler:
    """The held-out text, and bits per byte on it. `model`: (tokens, doc_ids) -> hidden, with lm_head."""

    def __init__(self, folder, groups, size=32):
        """`groups` times `size` documents in a row, spread over the validation text."""
        self.tokenizer, val = folder.tokenizer, folder.val
        groups = min(groups, len(val.starts) // size)
        chosen = np.concatenate([np.arange(first, first + size) for first in np.linspace(0, len(val.starts) - size, groups).astype(int)])
        ends = np.append(val.starts[1:], len(val.tokens))
        self.texts = [np.asarray(val.tokens[val.starts[i]:ends[i]]) for i in chosen]
        self.size = size

    def rows(self, texts, T, whole=False):
        from nanomind.data import PackedTokens
        split = SimpleNamespace(tokens=np.concatenate(texts), starts=np.cumsum([0, *map(len, texts)])[:-1], mask=None)
        rows = PackedTokens(split, self.tokenizer, T, 16, whole=whole)
        if whole:
            rows.bins = [[i] for i in np.argsort([len(text) for text in texts], kind="stable") if len(texts[i]) > 1]
            rows.rows = len(rows.bins)
        return rows

    def bpb(self, model, rows):
        """-> {"bpb", "bpb_zh", "bpb_en", "bytes"} over every row."""
        from nanomind.objectives import NextToken
        judge, sums = NextToken(), {}
        for at in range(0, rows.rows, rows.B):
            batch = rows._collate(range(at, min(at + rows.B, rows.rows)), languages=True)
            for name, value in judge.validate(model, batch).items():
                sums[name] = sums.get(name, 0.0) + float(value)
        total = sum(value for name, value in sums.items() if name.startswith("bytes"))
        assert total == rows.token_bytes[rows.split.tokens].sum()
        return {**{name: float(value) for name, value in judge.summary(sums).items() if name.startswith("bpb")}, "bytes": int(total)}

    def documents(self, model, thin=1):
        return self.bpb(model, self.rows([text[:HEAD] for text in self.texts[::thin]], HEAD, whole=True))

    def stream(self, model, T):
        return self.bpb(model, self.rows(self.texts, T))


def contest(args, flags):
    """Train one contestant, measure it, write what came out."""
    from nanomind import bins, device
    torch.set_num_threads(args.threads or torch.get_num_threads())
    folder, seen = bins.open_folder(args.data), {}
    ruler = Ruler(folder, args.groups)

    def start(readable, T, module=None):
        module = module or readable

        def measure():
            module.eval()
            figures = ruler.documents(readable, thin=6)
            module.train()
            return {"bpb": figures["bpb"], "product_rate": device.product_rates()[torch.float32] / 1e9}
        seen.update(readable=readable, module=module, T=T, clock=Clock(args, measure))
        return seen["clock"]

    settings = {"ours": ours, "minimind": minimind, "nanogpt": nanogpt}[args.who](args, folder, flags, start)
    clock, memory = seen["clock"], device.peak_memory(torch.device("cpu"))
    seen["module"].eval()
    result = {"who": args.who, "name": args.name, "settings": settings, "limit": args.minutes, "threads": torch.get_num_threads(), "allocator": not args.bare,
              "parameters": sum(p.numel() for p in seen["module"].parameters()), "minutes": clock.spent / 60, "wall_minutes": (time.monotonic() - clock.began) / 60, "steps": clock.steps, "tokens": clock.tokens,
              "places_per_second": clock.tokens / clock.spent, "targets_per_second": clock.targets / clock.spent, "memory": memory,
              "documents": ruler.documents(seen["readable"]), "stream": ruler.stream(seen["readable"], seen["T"]), "curve": clock.curve,
              "product_rate": device.product_rates()[torch.float32] / 1e9}
    Path(args.out).mkdir(parents=True, exist_ok=True)
    (Path(args.out) / f"{args.name}.json").write_text(json.dumps(result, indent=1))
    print(json.dumps({name: value for name, value in result.items() if name != "curve"}))


def table(out):
    """Print a line for every run in the folder, and the curves below it."""
    runs = [json.loads(path.read_text()) for path in sorted(Path(out).glob("*.json"), key=lambda path: path.stat().st_mtime)]
    print("| run | minutes | steps | M tokens | targets/s | peak MB | documents: bpb | zh | en | stream: bpb |\n|" + "---|" * 10)
    for run in runs:
        documents = run["documents"]
        print(f"| {run['name']} | {run['minutes']:.2f} | {run['steps']:,} | {run['tokens'] / 1e6:.2f} | {run['targets_per_second']:,.0f} | {run['memory']:,.0f} | "
              f"{documents['bpb']:.4f} | {documents.get('bpb_zh', math.nan):.4f} | {documents.get('bpb_en', math.nan):.4f} | {run['stream']['bpb']:.4f} |")
    print()
    for run in runs:
        if run["curve"]:
            print(f"{run['name']}: " + ", ".join(f"{point['minutes']:.1f} min {point['bpb']:.3f}" for point in run["curve"][1:]))


def main():
    argv = sys.argv[1:]
    at = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("who", choices=("ours", "minimind", "nanogpt", "table"))
    parser.add_argument("--data", default="", help="data folder of text")
    parser.add_argument("--out", required=True, help="folder of the results")
    parser.add_argument("--name", default="", help="of the result; default: the contestant and its minutes")
    parser.add_argument("--minutes", type=float, default=4.0, help="of training")
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--threads", type=int, default=0, help="0: all cores")
    parser.add_argument("--points", type=int, default=10, help="measurements on the way, on a sixth of the documents")
    parser.add_argument("--groups", type=int, default=12, help="of 32 documents in a row, for the measurement at the end")
    parser.add_argument("--bare", action="store_true", help="leave the allocator as it is")
    parser.add_argument("--causal", action="store_true", help="ours without the document mask")
    parser.add_argument("--scale", nargs="*", default=[], metavar="PART=FACTOR", help="ours: initial weights whose names hold PART times FACTOR")
    parser.add_argument("--checkout", default="", help="of the peer")
    parser.add_argument("--batch", type=int, default=8, help="rows in a step of the peer")
    parser.add_argument("--block", type=int, default=0, help="tokens in a row of the peer; default: 340 MiniMind, 256 nanoGPT")
    parser.add_argument("--lr", type=float, default=0.0, help="of the peer; default: its own")
    parser.add_argument("--beta2", type=float, default=0.99, help="of nanoGPT")
    parser.add_argument("--bf16", action="store_true", help="autocast for the peer")
    args = parser.parse_args(argv[:at])
    args.name = args.name or f"{args.who}-{args.minutes:g}"
    if args.who == "table":
        return table(args.out)
    contest(args, argv[at + 1:])


if __name__ == "__main__":
    if "--bare" not in sys.argv:
        keep_memory()
    import numpy as np
    import torch
    main()
