"""Fetches MiniMind's public data sets by name: python -m data_prep.download NAME ... --out data/raw
In: names of the table below, and a Hugging Face hub or a mirror of it. Out: raw files for the other data_prep commands, their SHA-256 compared with
the hub's; what broke off goes on where it stopped, and nothing unfinished or wrong ever stands under a file's own name.
Next: data_prep/demo/world.py
"""

import hashlib
import os
import re
import shutil
from pathlib import Path

from nanomind.cli import Parser, run

HUB, MIRROR = "https://huggingface.co", "https://hf-mirror.com"
WORDS, PICTURES = "minimind_dataset", "minimind-v_dataset"  # of jingyaogong on Hugging Face, of gongjy on ModelScope
SETS = {  # name: (data set, file, size as far as its README tells it, stage it is for)
    "pretrain_t2t_mini": (WORDS, "pretrain_t2t_mini.jsonl", "1.2 GB", "pretrain"),
    "pretrain_t2t": (WORDS, "pretrain_t2t.jsonl", "10 GB", "pretrain"),
    "sft_t2t_mini": (WORDS, "sft_t2t_mini.jsonl", "1.6 GB", "sft"),
    "sft_t2t": (WORDS, "sft_t2t.jsonl", "14 GB", "sft"),
    "rlaif": (WORDS, "rlaif.jsonl", "24 MB", "distill"),
    "dpo": (WORDS, "dpo.jsonl", "53 MB", "dpo"),
    "pretrain_i2t": (PICTURES, "pretrain_i2t.parquet", "1.27M captions", "vlm"),
    "sft_i2t": (PICTURES, "sft_i2t.parquet", "2.90M chats", "vlm"),
}
NEXT = {  # stage: what to type then
    "pretrain": "python bpe.py train {file} --out tok && python -m data_prep.text --input {file} --tokenizer tok --out data/{name}",
    "sft": "python -m data_prep.chat --input {file} --tokenizer tok --out data/{name} --max-bad 0.5   (chats with tool calls are left out and counted)",
    "distill": "python -m data_prep.distill --teacher out/real/sft --prompts {file} --out {answers} --max-bad 0.5   (questions without answers: let your own model answer)",
    "dpo": "python -m data_prep.pairs --input {file} --tokenizer tok --out data/{name}",
    "vlm": "python -m data_prep.images --input {file} --tokenizer tok --out data/{name}   (.parquet needs: pip install pyarrow)",
}


def main():
    parser = Parser(prog="python -m data_prep.download", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("names", nargs="*", metavar="NAME", help="data sets to fetch (default: list them)")
    parser.add_argument("--out", default="data/raw", metavar="DIR", help="folder for the files (default: data/raw)")
    parser.add_argument("--endpoint", default=os.environ.get("HF_ENDPOINT") or HUB, metavar="URL", help=f"another hub, for example {MIRROR} (default: $HF_ENDPOINT, else {HUB})")
    parser.add_argument("--revision", default="main", help="branch, tag or commit of the data set (default: main)")
    args = parser.parse_args()
    unknown = [name for name in args.names if name not in SETS]
    if unknown:
        raise ValueError(f"no data set {', '.join(unknown)}; there are {', '.join(SETS)}")
    if not re.match(r"https?://[^/]", args.endpoint):
        raise ValueError(f"--endpoint {args.endpoint}: expected a URL, for example {MIRROR}")
    for name in args.names:
        file = fetch(name, Path(args.out), args.endpoint.rstrip("/"), args.revision)
        print("next: " + NEXT[SETS[name][3]].format(name=name, file=file, answers=file.with_name(f"{name}_answers.jsonl")), flush=True)
    if not args.names:
        for name, (repository, file, size, stage) in SETS.items():
            print(f"{name:18} {size:>14}  for {stage:9} {page(HUB, repository)}: {file}")
        print(f"fetch with: python -m data_prep.download NAME [NAME ...] [--out data/raw] [--endpoint {MIRROR}]; the licences stand on those pages")


def page(endpoint, repository):
    return f"{endpoint}/datasets/jingyaogong/{repository}"


def fetch(name, out, endpoint, revision="main"):
    """The path of a data set's file in the folder `out`, fetched there if need be. Its name is ours, whatever the server calls it."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url  # here, because the list must not wait for it
    from huggingface_hub.file_download import http_get

    repository, file = SETS[name][:2]
    target = out / file

    def link(revision):
        return hf_hub_url(f"jingyaogong/{repository}", file, repo_type="dataset", revision=revision, endpoint=endpoint)

    try:
        found = get_hf_file_metadata(link(revision), token=False)
    except Exception as problem:  # of the HTTP library, which changes with the version of huggingface_hub
        raise ValueError(advice(problem, link(revision), repository, target)) from problem
    expected = found.etag if re.fullmatch("[0-9a-f]{64}", found.etag or "") else None  # an LFS file's ETag is its SHA-256
    size = "unknown size" if found.size is None else f"{found.size / 1e6:,.1f} MB"
    if target.exists():
        check(target, found.size, expected, "move it away, or choose another --out")
        print(f"{target} is there already: {size}, {told(expected)}")
        return target
    out.mkdir(parents=True, exist_ok=True)
    # hf_hub_download would begin anew after a broken run (since version 1.18), so the unfinished file is ours, and bears the version it is a part of
    part = target.with_name(f"{file}.{hashlib.sha256((found.etag or link(revision)).encode()).hexdigest()[:12]}.part")
    have = part.stat().st_size if part.exists() else 0
    free = shutil.disk_usage(out).free
    if found.size is not None and found.size - have > free:
        raise ValueError(f"{target} needs {(found.size - have) / 1e9:.1f} GB more, and {free / 1e9:.1f} GB are free there; choose another --out")
    print(f"{link(revision)} ({size})" + (f" goes on at {have / 1e6:,.1f} MB" if have else ""), flush=True)
    with open(part, "ab") as unfinished:
        try:
            if found.size is None or have < found.size:
                # by the commit, so that a branch that moves on meanwhile changes nothing; "identity", because ranges of compressed bytes do not fit together
                http_get(link(found.commit_hash or revision), unfinished, resume_size=have, expected_size=found.size, displayed_filename=file,
                         headers={"Accept-Encoding": "identity"})
        except Exception as problem:
            if isinstance(problem, OSError) and problem.strerror:  # not the net: no space left, for example
                raise
            unfinished.flush()
            raise ValueError(f"broken off after {part.stat().st_size / 1e6:,.1f} MB of {size}: the same command goes on there; "
                             + advice(problem, link(revision), repository, target)) from problem
        unfinished.flush()
        os.fsync(unfinished.fileno())
    try:
        check(part, found.size, expected, f"it is removed: try again, or another --endpoint such as {MIRROR}")
    except ValueError:
        part.unlink()
        raise
    os.replace(part, target)
    print(f"{target}: {size}, {told(expected)}")
    return target


def check(path, size, expected, then):
    """ValueError unless the file has this size and this SHA-256 (None: not known)."""
    from tqdm import tqdm

    if size is not None and path.stat().st_size != size:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes and the hub's file {size:,}; {then}")
    digest = hashlib.sha256()
    if expected:
        with open(path, "rb") as file, tqdm(total=path.stat().st_size, unit="B", unit_scale=True, desc="check", disable=None) as bar:
            while block := file.read(1 << 22):
                digest.update(block)
                bar.update(len(block))
        if digest.hexdigest() != expected:
            raise ValueError(f"{path} has SHA-256 {digest.hexdigest()[:16]}... and the hub's file {expected[:16]}...; {then}")


def told(expected):
    return f"SHA-256 {expected[:16]}... as the hub says" if expected else "checked by its size only, the hub gives no SHA-256"


def advice(problem, url, repository, target):
    """One line: what went wrong, and how to get the file all the same."""
    status = getattr(getattr(problem, "response", None), "status_code", None)
    reason = "HF_HUB_OFFLINE is set" if type(problem).__name__ == "OfflineModeIsEnabled" else " ".join(str(problem).split())[:150] or type(problem).__name__
    if status in (401, 403, 404):
        reason = f"{status}, so there is no such file or revision, or it is not public"
    return (f"cannot fetch {url} ({reason}); try --endpoint {MIRROR}, or get the file from {page(HUB, repository)} or "
            f"https://www.modelscope.cn/datasets/gongjy/{repository} by other means and put it at {target}")


if __name__ == "__main__":
    run(main)
