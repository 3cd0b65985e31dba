"""Talks to a model: continues prompts, in a terminal as an endless conversation, or with fixed prompts that show what it can do.
In: a checkpoint folder, ours or any Llama or Qwen3 with a byte-level BPE tokenizer.json. Out: text, streamed token by token.
Next: tests/
"""

import argparse
import sys
import time
from pathlib import Path

from nanomind.cli import run

PROMPTS = ("马克思主义基本原理", "人类大脑的主要功能", "万有引力原理是", "世界上最高的山峰是", "二氧化碳在空气中", "地球上最大的动物有", "杭州市的美食有",
           "The capital of China is", "Water boils at", "The largest ocean on Earth is")


def flags(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--run", default="", help="name of the run (default: the one saved last)")
    parser.add_argument("--stage", default="", help="stage of the run (default: the one saved last)")
    parser.add_argument("--ckpt", default="", metavar="FOLDER", help="a checkpoint folder, instead of --run and --stage")
    parser.add_argument("--prompt", help="continue this text and stop; - reads it from standard input")
    parser.add_argument("--auto", action="store_true", help="continue the fixed prompts and stop")
    parser.add_argument("--temperature", type=float, default=0.7, help="0: always the likeliest token (default: 0.7)")
    parser.add_argument("--top-k", type=int, default=50, help="choose among so many tokens; 0: all (default: 50)")
    parser.add_argument("--top-p", type=float, default=0.95, help="choose among the likeliest that make up this share; 1: all (default: 0.95)")
    parser.add_argument("--min-p", type=float, default=0.0, help="choose among those at least this likely, relative to the likeliest (default: 0)")
    parser.add_argument("--repetition-penalty", type=float, default=1.1, help="make what has occurred less likely; 1: off (default: 1.1)")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="tokens to write at most, not counting the prompt (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed writes the same text (default: 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"), help="auto: bf16 where it is faster or saves memory traffic")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: all")
    args = parser.parse_args(argv)
    problems = [text for wrong, text in (
        (args.ckpt and (args.run or args.stage), "--ckpt names a folder, --run and --stage another: give one"),
        (args.auto and args.prompt is not None, "--auto and --prompt exclude each other"),
        (args.max_new_tokens < 1, f"--max-new-tokens {args.max_new_tokens}: expected at least 1")) if wrong]
    if problems:
        raise ValueError("; ".join(problems))
    return args


def main():
    args = flags(sys.argv[1:])
    from nanomind import checkpoint, generate  # after the flags: importing torch takes seconds, --help should not
    sampling = generate.Sampling(args.temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty, args.seed)
    folder = Path(args.ckpt) if args.ckpt else checkpoint.newest("out", args.run, args.stage)
    model, tokenizer = checkpoint.load(folder)
    machine = generate.prepare(model, args.device, args.precision, args.threads)
    print(f"{folder}: {model.config.parameters() / 1e6:.2f}M parameters, {machine}", file=sys.stderr)
    writer = Writer(model, tokenizer, sampling, args.max_new_tokens)
    if args.prompt is not None:
        if args.prompt == "" and tokenizer.begin is None:
            raise ValueError("--prompt is empty, and this model needs at least one token to start from")
        writer.show(sys.stdin.read().rstrip("\n") if args.prompt == "-" else args.prompt)
    elif args.auto or not sys.stdin.isatty() or input("[0] automatic\n[1] manual\n> ").strip() in ("", "0"):
        for prompt in PROMPTS:
            print()
            writer.show(prompt)
    else:
        print("an empty line ends it")
        while prompt := read_line():
            writer.show(prompt)


def read_line():
    try:
        return input("\n> ")
    except EOFError:
        return ""


class Writer:
    """Continues texts and prints them as they come."""

    def __init__(self, model, tokenizer, sampling, max_new_tokens):
        self.model, self.tokenizer, self.sampling, self.max_new_tokens = model, tokenizer, sampling, max_new_tokens
        self.stop = {number for number in (tokenizer.end_of_text, tokenizer.im_end) if number is not None}

    def show(self, prompt):
        """Print the prompt and, token by token, its continuation."""
        ids = ([] if self.tokenizer.begin is None else [self.tokenizer.begin]) + self.tokenizer.encode(prompt)
        print(prompt, end="", flush=True)
        text, count, began = self.tokenizer.stream(), 0, time.monotonic()
        for (token,) in self.steps(ids):
            print(text.push(token), end="", flush=True)
            count += 1
        print(text.end())
        if sys.stdout.isatty():
            print(f"\033[2m{count} tokens, {count / (time.monotonic() - began):.0f} a second\033[0m")

    def steps(self, ids):
        """New tokens after `ids`; when they leave no room, the oldest are forgotten, with a notice."""
        from nanomind.generate import generate
        size = self.model.config.max_position_embeddings
        room = size - min(self.max_new_tokens, size // 2)
        if len(ids) > room:
            print(f"[the prompt has {len(ids)} tokens, the model sees {size}: only its last {room} are used]", file=sys.stderr)
            ids = ids[-room:]
        return generate(self.model, [ids], self.max_new_tokens, self.stop, self.sampling)


if __name__ == "__main__":
    run(main)
