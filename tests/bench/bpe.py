"""Measures the tokenizer trainer and the encoders against Hugging Face `tokenizers`, gigabpe and tiktoken, on the same texts.
In: .jsonl files of {"text"}, Chinese first. Out: a table of seconds (medians), peak memory and whether the merges are the same;
folder1, folder2: a data folder by data_prep with one and with two worker processes.

    python tests/bench/bpe.py ZH.jsonl.xz EN.jsonl.xz [--sizes 5 20 75] [--zh 57] [--grow 300 1000] [--runs 3] [--memory 2]

Every measurement is a process of its own, ours and the others' in turn. Peers that are not installed are left out. `--grow` makes larger
corpora: Chinese clauses are cut in two and joined anew at random, so that the number of different words grows as in real text.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import io
import json
import os
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]
VOCAB = 6400
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*")
    parser.add_argument("--sizes", type=float, nargs="*", default=[5, 20, 75], help="MB of mixed text")
    parser.add_argument("--zh", type=float, nargs="*", default=[20, 57], help="MB of the first file alone")
    parser.add_argument("--grow", type=float, nargs="*", default=[], help="MB of grown text (ours and gigabpe only above 100)")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--memory", type=float, help="also train the largest corpus with this limit in GB")
    parser.add_argument("--only", nargs="*", default=[], help="only these measurements, e.g. ours encode")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(*args.worker, args.memory)
    names = [name for name in ("tokenizers", "gigabpe", "tiktoken", "numpy", "regex") if importlib.util.find_spec(name)]
    print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in names), f"- {os.cpu_count()} cores, medians of {args.runs}")
    with tempfile.TemporaryDirectory() as folder:
        texts = [read(path) for path in args.files]
        everything = sum(texts, [])
        random.Random(0).shuffle(everything)
        corpora = [write(folder, f"mixed{size:g}", everything, size) for size in args.sizes]
        corpora += [write(folder, f"zh{size:g}", texts[0], size) for size in args.zh]
        corpora += [write(folder, f"grown{size:g}", grow(everything, size), size) for size in args.grow]
        del texts, everything
        for corpus in corpora:
            compare(corpus, args)
    return 0


# ---- corpora


def read(path):
    import lzma
    with (lzma.open if path.endswith(".xz") else open)(path, "rt", encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def grow(texts, megabytes):
    """First the texts as they are; then again and again with every Chinese clause of four characters or more cut at random, and the
    halves joined with those of other clauses of the same thousand texts."""
    yield from texts
    draw = random.Random(0)
    clause = re.compile(r"[\u4e00-\u9fff]{4,}")
    while True:
        for begin in range(0, len(texts), 1000):
            part = texts[begin:begin + 1000]
            halves = []
            for text in part:
                for match in clause.finditer(text):
                    middle = draw.randint(1, len(match.group()) - 1)
                    halves.append((match.group()[:middle], match.group()[middle:]))
            tails = [tail for _, tail in halves]
            draw.shuffle(tails)
            joined = iter([head + tail for (head, _), tail in zip(halves, tails)])
            for text in part:
                yield clause.sub(lambda match: next(joined), text)


def write(folder, name, texts, megabytes):
    """Both forms the trainers read: .jsonl with a document per line, .txt."""
    size = 0
    base = Path(folder) / name
    with open(f"{base}.jsonl", "w", encoding="utf-8") as lines, open(f"{base}.txt", "w", encoding="utf-8") as plain:
        for text in texts:
            lines.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            plain.write(text + "\n")
            size += len(text.encode())
            if size >= megabytes * 1e6:
                break
    return str(base), size


# ---- measurements, each in its own process


def compare(corpus, args):
    base, size = corpus
    kinds = ["ours", "ours-gpt4"]
    if size < 1.1e8:
        kinds += ["hf1", "hf2"]
    if importlib.util.find_spec("gigabpe"):
        kinds += ["gigabpe"]
    if "mixed" in base or "zh" in base:
        kinds += ["encode", "encode-hf"] + ["encode-tiktoken"] * bool(importlib.util.find_spec("tiktoken"))
        if size > 1.5e7:
            kinds += ["folder1", "folder2"]
    if base.endswith("mixed5"):
        kinds += ["online"]
    if args.memory and "grown" in base:
        kinds += ["ours-memory"]
    kinds = [kind for kind in kinds if not args.only or kind in args.only]
    results = {kind: [] for kind in kinds}
    for _ in range(args.runs):
        for kind in kinds:
            results[kind].append(run(kind, base, args.memory))
    print(f"\n{Path(base).name}: {size / 1e6:.1f} MB")
    median = {kind: statistics.median(r["seconds"] for r in rows) for kind, rows in results.items() if "seconds" in rows[0]}
    hf = min((kind for kind in ("hf1", "hf2") if kind in median), key=median.get, default=None)
    for kind, rows in results.items():
        line = f"  {kind:16s}"
        if kind in median:
            spread = f"{min(r['seconds'] for r in rows):.2f}..{max(r['seconds'] for r in rows):.2f}"
            peak = statistics.median(r["peak"] for r in rows)
            line += f" {median[kind]:8.2f} s ({spread}) {size / 1e6 / median[kind]:7.1f} MB/s  peak {peak:6.0f} MB (its Python {rows[0]['before']:.0f})"
            for other in (hf, "gigabpe", "ours"):
                if other in median and kind.startswith("ours") and kind != other:
                    line += f"  {median[kind] / median[other]:.2f} of {other}"
            if hf and kind == "ours":
                line += f", memory {peak / statistics.median(r['peak'] for r in results[hf]):.2f}"
            for other in ("encode-hf", "encode-tiktoken"):
                if kind == "encode" and other in median:
                    line += f"  {median[other] / median[kind]:.2f} x {other}"
            if kind == "folder2" and "folder1" in median:
                line += f"  {median['folder1'] / median[kind]:.2f} x folder1"
        print(line + "".join(f"  {key} {value}" for key, value in rows[-1].items() if key not in ("seconds", "peak", "before")), flush=True)


def run(kind, base, memory):
    threads = "2" if kind == "hf2" else "1"
    env = os.environ | {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": str(threads != "1").lower()}
    command = [sys.executable, __file__, *(["--memory", str(memory)] if memory else []), "--worker", kind, base]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{kind} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def work(kind, base, memory):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    import bpe
    from data_prep.common import prepare
    from nanomind import tokenizer_json
    from nanomind.tokenizer import Tokenizer as Ours
    saved, extra = Path(f"{base}.{kind}"), {}
    if kind.startswith("encode") or kind == "online":
        texts = [json.loads(line)["text"] for line in open(f"{base}.jsonl", encoding="utf-8")]
        ours = Ours.load(f"{base}.ours")
    if kind == "encode-tiktoken":
        import tiktoken
        ranks = {data: i for i, data in enumerate(ours.token_bytes) if data}
        encoding = tiktoken.Encoding("ours", pat_str=tokenizer_json.GPT2, mergeable_ranks=ranks, special_tokens=ours.special)
    elif kind == "encode-hf":
        reference = Tokenizer.from_file(f"{base}.ours/tokenizer.json")
        reference.encode_special_tokens = True
    if kind == "encode":
        ours.encode_many(["warm"])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    began, cpu = time.perf_counter(), sum(os.times()[:4])
    if kind.startswith("ours"):
        lines = []
        pattern = "gpt4" if kind == "ours-gpt4" else "gpt2"
        bpe.train([f"{base}.jsonl"], VOCAB, pattern, memory=memory if kind == "ours-memory" else None, log=lines.append).save(saved)
        extra = {"said": lines} if kind == "ours-memory" else {}
    elif kind.startswith("hf"):
        reference = Tokenizer(models.BPE())
        reference.pre_tokenizer, reference.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        texts = (json.loads(line)["text"] for line in open(f"{base}.jsonl", encoding="utf-8"))
        reference.train_from_iterator(texts, trainers.BpeTrainer(
            vocab_size=VOCAB, special_tokens=SPECIALS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
        saved.mkdir(exist_ok=True)
        reference.save(str(saved / "tokenizer.json"), pretty=True)
    elif kind == "gigabpe":
        import gigabpe
        gigabpe.train_tokenizer([f"{base}.txt"], vocab_size=VOCAB, output=str(saved), pretokenizer="bytelevel", special_tokens=SPECIALS, threads=1)
    elif kind.startswith("folder"):
        with contextlib.redirect_stdout(io.StringIO()):
            prepare("text", [f"{base}.jsonl"], f"{base}.ours", saved, workers=int(kind[-1]), overwrite=True)
    elif kind == "encode":
        ids = ours.encode_many(texts)[0]
    elif kind == "encode-hf":
        rows = reference.encode_batch(texts, add_special_tokens=False)
    elif kind == "encode-tiktoken":
        encoding.encode_ordinary_batch(texts, num_threads=1)
    elif kind == "online":
        print(json.dumps(online(ours, texts)))
        return 0
    seconds = time.perf_counter() - began
    extra["CPU s"] = round(sum(os.times()[:4]) - cpu, 2)  # far from the seconds on one thread: the machine was busy, run it again
    if kind.startswith("hf"):
        extra["same file as ours"] = (saved / "tokenizer.json").read_bytes() == Path(f"{base}.ours/tokenizer.json").read_bytes()
    if kind == "encode":
        extra["second call MB/s"] = round(megabytes_per_second(ours.encode_many, texts), 1)
        (Path(f"{base}.ids")).write_bytes(ids.tobytes())
    if kind == "encode-hf":
        import numpy as np
        extra["same ids as ours"] = np.array([i for row in rows for i in row.ids], np.uint16).tobytes() == Path(f"{base}.ids").read_bytes()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(json.dumps({"seconds": seconds, "peak": peak, "before": before, **extra}))
    return 0


def megabytes_per_second(function, texts):
    began = time.perf_counter()
    function(texts)
    return sum(len(text.encode()) for text in texts) / 1e6 / (time.perf_counter() - began)


def online(tokenizer, texts):
    """Milliseconds of the first call and of later ones with 100 new characters of Chinese each."""
    text = "".join(text for text in texts if text and "\u4e00" <= text[0] <= "\u9fff")
    times = []
    for begin in range(0, 200_000, 100):
        began = time.perf_counter()
        tokenizer.encode(text[begin:begin + 100])
        times.append(1e3 * (time.perf_counter() - began))
    ordered = sorted(times[1:])
    return {"first call ms": round(times[0], 2), "then median ms per 100 characters": round(statistics.median(ordered), 3),
            "mean": round(statistics.mean(ordered), 3), "99 %": round(ordered[len(ordered) * 99 // 100], 3)}


if __name__ == "__main__":
    sys.exit(main())
