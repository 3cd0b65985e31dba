"""What the data_prep commands share: flags, the division into train and val, worker processes and the report.
In: raw files and a tokenizer folder. Out: a data folder (nanomind/bins.py), the same to the byte for any number of workers.
Each kind of data is a module with two functions, everything else happens here:
  items(reader)             raw records -> (key, item, characters); equal keys never end up on both sides of train and val
  encode(tokenizer, items)  items -> ids, starts, mask (or None) of their documents in a row
Next: data_prep/text.py
"""

import hashlib
import importlib
import multiprocessing
import os
import queue
import signal
import time
from collections import Counter, deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from nanomind.cli import Parser
from nanomind.records import Reader, find_files

VAL_SHARE = 0.01
BATCH = 2_000_000  # characters handed to a worker at a time
MOST_WORKERS = 8  # unless told otherwise: one process reads for all of them, and each needs memory
SMALL = 24_000_000  # bytes of input for which it does not pay to start processes, each of which imports what its parent did


def fingerprint(paths, *more):
    """A name for what is made of these files: another one as soon as a file, its size or its time changes. Paths among `more` count alike."""
    facts = [f"{item.resolve()} {item.stat().st_size} {item.stat().st_mtime_ns}" if isinstance(item, Path) else str(item) for item in (*paths, *more)]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:12]


def command(kind, description):
    """The command line of data_prep.<kind>."""
    parser = Parser(prog=f"python -m data_prep.{kind}", description=description, allow_abbrev=False)
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help=".txt .jsonl .json files (also .gz .xz) or folders with such files")
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="folder with tokenizer.json, made by bpe.py")
    parser.add_argument("--out", required=True, metavar="DIR", help="the data folder to make, for example data/x")
    parser.add_argument("--val", nargs="+", default=[], metavar="FILE", help="files to validate on; without them a share of the input is held out")
    parser.add_argument("--val-share", type=float, metavar="SHARE", help=f"share of the input held out for validation (default {VAL_SHARE})")
    parser.add_argument("--max-bad", type=float, default=0.01, metavar="SHARE", help="share of bad records that is still put up with (default 0.01)")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help=f"processes in all (default: 1, for more than {SMALL // 10**6} MB the cores there are, at most {MOST_WORKERS})")
    parser.add_argument("--overwrite", action="store_true", help="replace a finished data folder at --out")
    if kind == "images":
        parser.add_argument("--images", default="", metavar="DIR", help="folder of the pictures (default: that of the file that names them, or images/ there)")
    a = parser.parse_args()
    if a.val and a.val_share is not None:
        raise ValueError("--val and --val-share exclude each other: validate on files or on a share of the input")
    prepare(kind, a.input, a.tokenizer, a.out, VAL_SHARE if a.val_share is None else a.val_share, a.val, a.max_bad, a.workers, a.overwrite,
            getattr(a, "images", ""))


def prepare(kind, inputs, tokenizer, out, val_share=VAL_SHARE, val=(), max_bad=0.01, workers=0, overwrite=False, images=""):
    """Make the data folder `out` from raw files. kind: text, chat, pairs or images. With `val` files, `val_share` is not used. images: folder
    of the pictures, when it is not that of the files."""
    from tqdm import tqdm  # here, because --help must not wait for it

    from nanomind.bins import Writer
    from nanomind.tokenizer import Tokenizer

    if not 0 <= val_share < 1 or not 0 <= max_bad <= 1 or workers < 0:
        raise ValueError(f"--val-share {val_share:g}, --max-bad {max_bad:g}, --workers {workers}: expected shares from 0 to 1 and 0 or more workers")
    began = time.perf_counter()
    loaded = Tokenizer.load(tokenizer)
    if loaded.end_of_text is None:
        raise ValueError(f"{tokenizer}: the tokenizer has no <|endoftext|>, which has to begin every document; make one with python bpe.py train")
    size = sum(path.stat().st_size for path in find_files([*inputs, *val]))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = workers or (min(cores, MOST_WORKERS) if size > SMALL else 1)
    with Writer(out, loaded, kind, mask=kind != "text", overwrite=overwrite) as writer:
        with tqdm(total=size, unit="B", unit_scale=True, desc=f"prepare {kind}", disable=None) as bar:
            readers = {"train": Reader(inputs, max_bad, bar.update)}
            if val:
                readers["val"], val_share = Reader(val, max_bad, bar.update), 0
            for reader in readers.values():
                reader.images = images
            characters = Counter()
            for split, documents in _encoded(_batches(kind, readers, val_share, characters), kind, tokenizer, loaded, workers):
                writer.add(split, *documents)
        skipped = sum((reader.reasons for reader in readers.values()), Counter())
        writer.close([path.name for reader in readers.values() for path in reader.files], skipped)
    _report(out, writer.totals, readers, characters, time.perf_counter() - began, workers)


def _batches(kind, readers, val_share, characters):
    """(split, items) with about BATCH characters each; counts the characters of each split."""
    for source, reader in readers.items():
        waiting, sizes = {"train": [], "val": []}, Counter()
        for key, item, size, *memory in importlib.import_module(f"data_prep.{kind}").items(reader):
            split = "val" if source == "val" or val_share and _share(key) < val_share else "train"
            waiting[split].append(item)
            sizes[split] += memory[0] if memory else size  # pictures need more than their characters
            characters[split] += size
            if sizes[split] >= BATCH:
                yield split, waiting[split]
                waiting[split], sizes[split] = [], 0
        yield from ((split, items) for split, items in waiting.items() if items)


def _share(key):
    """A number in [0, 1) that depends on nothing but the text: file order, other documents and re-runs change nothing."""
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8"), digest_size=8).digest(), "big") / 2**64


def _encoded(batches, kind, folder, tokenizer, workers):
    """(split, (ids, starts, mask)) for each batch, in order. This process reads for all of them; when the others have enough to do, it encodes, too."""
    encode = importlib.import_module(f"data_prep.{kind}").encode
    if workers == 1:
        yield from ((split, encode(tokenizer, items)) for split, items in batches)
        return
    spawn, idle, processes = multiprocessing.get_context("spawn"), queue.SimpleQueue(), []
    for _ in range(workers - 1):  # each gets ready while the first batch is being read
        ours, theirs = spawn.Pipe()
        processes.append(spawn.Process(target=_work, args=(theirs, kind, str(folder)), daemon=True))
        processes[-1].start()
        theirs.close()
        idle.put(ours)

    def ask(items):
        """A pipe for each: when its process dies, however much of an answer it has written, reading ends. (A ProcessPoolExecutor then waits for ever.)"""
        pipe = idle.get()
        try:
            pipe.send(items)
            found = pipe.recv()
        except (EOFError, OSError):  # the latter in the middle of an answer
            raise ValueError("a worker process died, perhaps for want of memory; try --workers 1") from None
        finally:
            idle.put(pipe)
        if isinstance(found, Exception):
            raise found
        return found

    pool = ThreadPoolExecutor(workers - 1)
    try:
        under_way = deque()
        for split, items in batches:
            if sum(not future.done() for _, future in under_way) < workers:  # one waits while all are at work
                future = pool.submit(ask, items)
            else:
                future = Future()
                future.set_result(encode(tokenizer, items))
            under_way.append((split, future))
            while under_way and (under_way[0][1].done() or len(under_way) > 4 * workers):
                split, future = under_way.popleft()
                yield split, future.result()
        yield from ((split, future.result()) for split, future in under_way)
    finally:
        pool.shutdown(cancel_futures=True)
        while not idle.empty():
            idle.get().close()
        for process in processes:
            process.join()


def _work(pipe, kind, folder):
    """Answer until the pipe is closed, by the parent or by its death. Ctrl-C is the parent's business."""
    from nanomind.tokenizer import Tokenizer

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    tokenizer, encode = Tokenizer.load(folder), importlib.import_module(f"data_prep.{kind}").encode
    tokenizer.encode_many([])  # makes the corpus encoder
    try:
        while True:
            items = pipe.recv()
            try:
                found = encode(tokenizer, items)
            except Exception as problem:  # which the parent raises
                found = problem
            pipe.send(found)
    except (EOFError, OSError):  # the latter in the middle of a question
        pass


def _report(out, totals, readers, characters, seconds, workers):
    for reader in readers.values():
        if reader.bad:
            print(reader.explain())
    for split, total in totals.items():
        if total["tokens"]:
            print(
                f"{split:5} {total['documents']:,} documents, {total['tokens']:,} tokens, {total['bytes']:,} bytes; "
                f"{characters[split] / total['tokens']:.2f} characters and {total['bytes'] / total['tokens']:.2f} bytes per token"
                + (f"; {total['images']:,} pictures, {total['image_bytes'] / 1e6:.1f} MB" if total.get("images") else "")
                + (f"; {total['targets'] / total['tokens']:.0%} of the tokens are targets" if total["targets"] < total["tokens"] else "")
            )
    everything = {name: sum(total[name] for total in totals.values()) for name in ("tokens", "bytes")}
    print(f"val is {totals['val']['tokens'] / everything['tokens']:.2%} of the tokens" + ("" if totals["val"]["tokens"] else ": nothing to validate on; raise --val-share or give --val"))
    print(f"{everything['bytes'] / 1e6:.1f} MB in {seconds:.1f} s = {everything['bytes'] / 1e6 / seconds:.1f} MB/s with {workers} worker{'s' * (workers > 1)}{_peak(workers)}")
    print(f"data folder: {out}")


def _peak(workers):
    try:
        import resource
    except ImportError:  # Windows
        return ""
    own, worker = (resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return f"; peak memory {own:.0f} MB" + (f" + {workers - 1} x {worker:.0f} MB" if workers > 1 else "")
