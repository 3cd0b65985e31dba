"""Tokens per second and peak memory of whole optimiser steps: ours, MiniMind's own model and loop defaults, transformers' Llama.
In: a preset, and for MiniMind the path of a checkout (none of its code is here). Out: a table with ratios, and the share of the machine's
measured matrix-product rate that is reached. `python tests/bench/train.py --preset small --minimind CHECKOUT`
Next: loss.py

What is equal for all: shape, 8 rows of 512 random ids, one optimiser step per batch, gradients clipped at 1, all cores, and the allocator's
settings (one row shows MiniMind without them). What is each one's own: precision, optimiser, how the loss is computed, the loop.
MiniMind on a CPU computes in fp32 (its autocast context is empty there) with torch's plain AdamW at 5e-4. Its accumulation over 8 batches
is left out: everybody here steps after every batch. Its attention always normalises q and k, whatever the preset.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)  # so that `import train` is the project's loop, not this file

from tests.bench.turns import Contestant, alternate, chosen, table

CONTESTANTS = (
    Contestant("ours", "ours: Muon, document mask"),
    Contestant("ours-causal", "ours: Muon, plain causal"),
    Contestant("ours-adamw", "ours: AdamW, document mask"),
    Contestant("ours-adamw-causal", "ours: AdamW, plain causal"),
    Contestant("ours-compile", "ours: Muon, document mask, --compile"),
    Contestant("minimind", "MiniMind: fp32, AdamW"),
    Contestant("minimind-bare", "MiniMind: the same, the allocator as it is", tuned=False),
    Contestant("llama-fp32", "transformers' Llama: fp32, fused AdamW"),
    Contestant("llama-bf16", "transformers' Llama: bf16 autocast, fused AdamW"),
)


def our_step(args, name):
    """train.py's own step, on rows packed from documents of 30 to 2,000 random ids. -> function(step)."""
    import numpy as np
    from nanomind import device
    from nanomind.config import settle
    from nanomind.data import PackedTokens
    from nanomind.model import LanguageModel
    from nanomind.objectives import NextToken

    class Causal(LanguageModel):
        """Ignores documents: what the mask costs is the difference."""

        def forward(self, tokens, doc_ids=None, **more):
            return super().forward(tokens, None, **more)

    cfg, shape = settle(dict(preset=args.preset, batch_size=args.batch, seq_len=args.seq_len, threads=args.threads, steps=1000,
                             **({"optimizer": "adamw", "lr": 5e-4} if "adamw" in name else {})))
    random = np.random.default_rng(0)
    sizes = np.exp(random.uniform(np.log(30), np.log(2000), size=400)).astype(np.int64)
    starts = np.concatenate([[0], sizes.cumsum()[:-1]])
    split = SimpleNamespace(tokens=random.integers(3, shape.vocab_size, sizes.sum()).astype(np.uint16), starts=starts, mask=None)
    tokenizer = SimpleNamespace(end_of_text=0, token_bytes=[b"x"] * shape.vocab_size)
    rows = PackedTokens(split, tokenizer, cfg.seq_len, cfg.batch_size)
    machine = device.choose_device("cpu", cfg.precision, cfg.threads)
    model = (Causal if "causal" in name else LanguageModel)(shape).init_weights().train()
    if "compile" in name:
        import torch
        runner = torch.compile(model)
    else:
        runner = model
    return loop_step(cfg, "pretrain", NextToken(), machine, model, runner, rows)


def loop_step(cfg, stage, objective, machine, model, runner, rows):
    """train.py's own step on these rows. -> function(step), which gives the step's mean loss."""
    import train
    from nanomind import checkpoint, optim, stages
    log = checkpoint.Log(Path(tempfile.mkdtemp()) / "log.jsonl")
    trainer = train.Trainer(cfg, stages.STAGES[stage], objective, machine, None, model, runner, optim.Optimizer(model, cfg, machine.dtype), rows, None,
                            Path("."), {"step": 0, "tokens": 0, "seconds": 0.0}, log, time.monotonic())
    return lambda step: trainer.take_step(step / cfg.steps)


def peer_step(args, model, optimizer, autocast):
    """A step as MiniMind's train_epoch and the examples of transformers do it, on random ids. -> function(step)."""
    import torch
    rows = torch.randint(3, model.config.vocab_size, (16, args.batch, args.seq_len), generator=torch.Generator().manual_seed(0))

    def step(number):
        ids = rows[number % len(rows)]
        with autocast:
            out = model(ids, labels=ids)
            loss = out.loss + (getattr(out, "aux_loss", None) or 0.0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


def minimind_step(args):
    from contextlib import nullcontext
    import torch
    model = minimind_model(args.minimind, args.preset).train()
    return peer_step(args, model, torch.optim.AdamW(model.parameters(), lr=5e-4), nullcontext())


def minimind_model(checkout, preset):
    """MiniMind's model class, from its checkout, in the shape of our preset, random weights."""
    from nanomind.config import load_preset
    if not checkout:
        raise SystemExit("no checkout given: --minimind CHECKOUT")
    sys.path.insert(0, str(Path(checkout).resolve()))
    from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
    shape = load_preset(preset)[0]
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size", "head_dim",
             "max_position_embeddings", "tie_word_embeddings")
    return MiniMindForCausalLM(MiniMindConfig(**{name: getattr(shape, name) for name in names}))


def llama_model(preset):
    """transformers' Llama (Qwen3 for a preset with QK-norm) in the shape of our preset, random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from nanomind.config import load_preset
    values = load_preset(preset)[0].to_hf()
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**{name: value for name, value in values.items() if name != "torch_dtype"}))


def llama_step(args, dtype):
    import torch
    model = llama_model(args.preset).train()
    return peer_step(args, model, torch.optim.AdamW(model.parameters(), lr=5e-4, fused=True),
                     torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bf16"))


def product_rate(args, dtype):
    """GFLOP/s of this machine's matrix products in the shapes of the preset: up and down projections of one batch, 1 s."""
    import torch
    from nanomind.config import load_preset
    shape = load_preset(args.preset)[0]
    x = torch.randn(args.batch * args.seq_len, shape.hidden_size).to(dtype)
    up, down = torch.randn(shape.hidden_size, shape.intermediate_size).to(dtype), torch.randn(shape.intermediate_size, shape.hidden_size).to(dtype)
    x @ up @ down
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < 1.0:
        x @ up @ down
        count += 1
    return 4 * count * x.size(0) * up.numel() / (time.perf_counter() - began) / 1e9


def turn(args):
    """One contestant, in this process: --warm-up steps, then --steps timed ones. -> figures."""
    import torch
    from nanomind.device import peak_memory
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.turn == "machine":
        return {"fp32": product_rate(args, torch.float32), "bf16": product_rate(args, torch.bfloat16)}
    if args.turn.startswith("minimind"):
        step = minimind_step(args)
    elif args.turn.startswith("llama"):
        step = llama_step(args, args.turn.removeprefix("llama-"))
    else:
        step = our_step(args, args.turn)
    for number in range(args.warm_up):
        step(number)
    seconds = []
    for number in range(args.steps):
        began = time.perf_counter()
        step(args.warm_up + number)
        seconds.append(time.perf_counter() - began)
    rate = args.batch * args.seq_len / sorted(seconds)[len(seconds) // 2]
    return {"rate": rate, "memory": peak_memory(torch.device("cpu"))}


def flops_per_token(shape, T):
    """Forward and backward: 6 per weight (the tied embedding counts once, as the head) and causal attention, half of 12 L H D T."""
    return 6 * shape.parameters() + 6 * shape.num_hidden_layers * shape.num_attention_heads * shape.head_dim * T


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="small")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--minimind", default="", help="path of a checkout of MiniMind")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contestant")
    parser.add_argument("--steps", type=int, default=3, help="timed steps in a turn; the median counts")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before them")
    parser.add_argument("--threads", type=int, default=0, help="0: all cores")
    parser.add_argument("--only", default="", help="names of contestants, separated by commas: " + ", ".join(c.name for c in CONTESTANTS))
    parser.add_argument("--turn", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.turn:
        return print(json.dumps(turn(args)))
    contestants = chosen(parser, CONTESTANTS, args.only)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in vars(args).items() if name not in ("rounds", "only", "turn")]
    results = alternate(__file__, [Contestant("machine", "machine"), *contestants], args.rounds, flags)

    from nanomind.config import load_preset
    machine, flops = results["machine"], flops_per_token(load_preset(args.preset)[0], args.seq_len) / 1e9
    print(f"\n{args.preset}, {args.batch} x {args.seq_len} tokens a step; medians of {args.rounds} turns; matrix products here: "
          f"fp32 {machine['fp32']:,.0f} GFLOP/s, bf16 {machine['bf16']:,.0f}\n")
    best = max(machine.values())
    for result in results.values():
        if "rate" in result:
            result["share"] = 100 * result["rate"] * flops / best
    table(contestants, results, contestants[0].name,
          {"rate": ("tokens/s", "{:,.0f}"), "share": ("% of the faster product rate", "{:.0f}"), "memory": ("peak memory, MB", "{:,.0f}")})


if __name__ == "__main__":
    main()
