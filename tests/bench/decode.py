"""Tokens per second of writing: ours, MiniMind's own generate, transformers' generate; 128 new tokens after a prompt of 32, random weights.
In: a preset, and for MiniMind the path of a checkout (none of its code is here). Out: a table with ratios.
`python tests/bench/decode.py --preset base --minimind CHECKOUT`
Next: README.md

The time is that of the whole call, the prompt included. MiniMind's eval_llm.py halves the weights (fp16) whatever the device; its fp32 and
bf16 are measured too, and greedily its filters are off: the best of the rows is what counts against us. Nobody may stop early.
"""

import argparse
import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

from tests.bench.train import llama_model, minimind_model
from tests.bench.turns import Contestant, alternate, chosen, table

CONTESTANTS = (
    Contestant("ours", "ours, as sample.py prepares it: greedy"),
    Contestant("ours-sampling", "ours: sampling as sample.py does by default"),
    Contestant("ours-fp32", "ours: fp32, greedy"),
    Contestant("ours-int8", "ours: --int8, greedy"),
    Contestant("ours-batch32", "ours: 32 prompts at once, greedy"),
    Contestant("ours-int8-batch32", "ours: --int8, 32 prompts at once, greedy"),
    Contestant("minimind-fp32", "MiniMind: fp32, greedy"),
    Contestant("minimind-fp16", "MiniMind: fp16, greedy"),
    Contestant("minimind-bf16", "MiniMind: bf16, greedy"),
    Contestant("minimind-eval", "MiniMind: fp16, sampling as its eval_llm.py does by default"),
    Contestant("transformers-bf16", "transformers: bf16, greedy"),
    Contestant("transformers-fp32", "transformers: fp32, greedy"),
)


def our_writer(args, name):
    """-> function(new tokens) that writes them."""
    from nanomind.config import load_preset
    from nanomind.generate import Sampling, generate, prepare
    from nanomind.model import LanguageModel
    model = LanguageModel(load_preset(args.preset)[0]).init_weights()
    prepare(model, "cpu", "fp32" if name == "ours-fp32" else "auto", args.threads, "int8" in name)
    prompts = [list(range(100 + row, 100 + row + args.prompt)) for row in range(rows(name))]
    sampling = Sampling() if name == "ours-sampling" else Sampling(temperature=0, repetition_penalty=1.0)

    def write(new):
        written = list(generate(model, prompts, new, (), sampling))
        assert len(written) == new, f"{len(written)} steps instead of {new}"
    return write


def peer_writer(args, name):
    import torch
    kind, precision = name.split("-")
    model = llama_model(args.preset) if kind == "transformers" else minimind_model(args.minimind, args.preset)
    model = model.to({"fp32": torch.float32, "bf16": torch.bfloat16}.get(precision, torch.float16)).eval()
    ids = torch.arange(100, 100 + args.prompt)[None]
    if kind == "transformers":
        how = dict(do_sample=False, attention_mask=torch.ones_like(ids), pad_token_id=0)
        model.generation_config.eos_token_id = None
    elif precision == "eval":
        how = dict(do_sample=True, temperature=0.85, top_p=0.95, attention_mask=torch.ones_like(ids), eos_token_id=None)
    else:
        how = dict(do_sample=False, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=None)

    def write(new):
        length = model.generate(ids, max_new_tokens=new, **how).size(1) - ids.size(1)
        assert length == new, f"{length} tokens instead of {new}"
    return write


def rows(name):
    return 32 if name.endswith("batch32") else 1


def turn(args):
    """One contestant, in this process: a short call to warm up, then --repeats timed ones. -> figures."""
    import torch
    from nanomind.device import peak_memory
    if args.threads:
        torch.set_num_threads(args.threads)
    write = (our_writer if args.turn.startswith("ours") else peer_writer)(args, args.turn)
    write(8)
    seconds = []
    for _ in range(args.repeats):
        began = time.perf_counter()
        write(args.new)
        seconds.append(time.perf_counter() - began)
    return {"rate": rows(args.turn) * args.new / sorted(seconds)[len(seconds) // 2], "memory": peak_memory(torch.device("cpu"))}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="base")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens to write")
    parser.add_argument("--minimind", default="", help="path of a checkout of MiniMind")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contestant")
    parser.add_argument("--repeats", type=int, default=1, help="timed calls in a turn; the median counts")
    parser.add_argument("--threads", type=int, default=0, help="0: all cores")
    parser.add_argument("--only", default="", help="names of contestants, separated by commas: " + ", ".join(c.name for c in CONTESTANTS))
    parser.add_argument("--turn", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.turn:
        return print(json.dumps(turn(args)))
    contestants = chosen(parser, CONTESTANTS, args.only)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in vars(args).items() if name not in ("rounds", "only", "turn")]
    results = alternate(__file__, contestants, args.rounds, flags)
    print(f"\n{args.preset}, {args.new} new tokens after {args.prompt}; medians of {args.rounds} turns\n")
    table(contestants, results, contestants[0].name, {"rate": ("tokens/s", "{:,.1f}"), "memory": ("peak memory, MB", "{:,.0f}")})


if __name__ == "__main__":
    main()
