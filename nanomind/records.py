"""Reads raw data: .txt, .jsonl, .json (each also as .gz or .xz) and .parquet files, one record at a time in bounded memory.
In: files or folders as a user types them. Out: (where, record) pairs, where = "file:line" and record = a dict; what cannot
be used is counted, shown as file:line with a reason and skipped, and too large a share of it is an error.
Next: nanomind/tokenizer_json.py
"""

import codecs
import gzip
import importlib
import io
import json
import lzma
import re
import sys
import zlib
from collections import Counter
from pathlib import Path

ENDINGS = (".txt", ".jsonl", ".json", ".parquet")
EXPECTED = f"expected names ending in {' '.join(ENDINGS)} (also + .gz .xz)"
DOCUMENT = 4_000  # a .txt document ends at the first blank line after so many characters (any line after 4 x) ...
SEPARATOR = "<|endoftext|>"  # ... or where this stands
LONGEST = 64_000_000  # bytes of one line or record: what is longer is no text, and must not fill the memory
CHUNK = 1_000_000  # characters of a JSON list looked at in one go
NOT_UTF8 = ("not UTF-8", "; if the file is GBK: iconv -f GB18030 -t UTF-8 FILE > NEW")
NUL = ("a NUL byte, so this is no text", "; if the file is UTF-16: iconv -f UTF-16 -t UTF-8 FILE > NEW")
SHOWN = 5  # bad records printed one by one, and reasons given; all are counted
FIELDS = ("conversations", "messages", "prompt", "chosen", "rejected", "instruction", "input", "output")  # with text, besides "text"


def find_files(paths):
    """The data files among `paths` in a fixed order: files as given, folders searched through, hidden names left out."""
    files = []
    for path in map(Path, paths):
        found = [path]
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.is_file() and _ending(p) in ENDINGS)
            found = [p for p in found if not any(part.startswith(".") for part in p.relative_to(path).parts)]
        elif not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder; {EXPECTED}")
        elif _ending(path) not in ENDINGS:
            raise ValueError(f"{path}: cannot read this kind of file; {EXPECTED}")
        if not found:
            raise ValueError(f"{path}: no data file in this folder; {EXPECTED}")
        files += found
    for path in files:
        if path.stat().st_size == 0:
            raise ValueError(f"{path}: the file is empty")
    return files


def _ending(path):
    """'a.jsonl.xz' -> '.jsonl'."""
    return (Path(path.stem) if path.suffix in (".gz", ".xz") else path).suffix


class Reader:
    """Iterate for (where, record); call `reject(where, reason)` for a record that turns out to be of no use later on.

    `progress(n)` is told about every n bytes read of the files as they lie on disk (`total_bytes` in all), for a bar.
    Ends with ValueError when more than the share `max_bad` of the records was bad, or a file had no good one.
    """

    def __init__(self, paths, max_bad=0.01, progress=None):
        self.files = find_files(paths)
        self.total_bytes = sum(path.stat().st_size for path in self.files)
        self.max_bad, self.progress = max_bad, progress
        self.seen = 0  # records, good and bad
        self.reasons = Counter()  # reason -> how many were skipped for it
        self.first = {}  # file -> its first bad record
        self.told = set()  # (reason, detail) of those printed

    @property
    def bad(self):
        return self.reasons.total()

    def reject(self, where, reason, detail=""):
        """Count a record as unusable; `reason` is what is counted, `detail` says more about this one."""
        message = f"{where}: {reason}{detail}"
        self.first.setdefault(where.rpartition(":")[0], message)
        if self.bad < SHOWN:
            print(f"skipped {where}: {reason}{'' if (reason, detail) in self.told else detail}", file=sys.stderr)
            self.told.add((reason, detail))
        self.reasons[reason] += 1

    def explain(self):
        """'3 of 100 records skipped: 2 not UTF-8, 1 broken JSON'"""
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in self.reasons.most_common(SHOWN))
        return f"{self.bad:,} of {self.seen:,} records skipped: {reasons}" + ", ..." * (len(self.reasons) > SHOWN)

    def __iter__(self):
        for path in self.files:
            seen, bad = self.seen, self.bad
            yield from self._file(path)
            if self.seen == seen:
                raise ValueError(f"{path}: there is nothing in this file")
            if self.seen - seen == self.bad - bad:
                raise ValueError(f"{self.first[str(path)]} (and no other record of this file can be used)")
        if self.bad > self.max_bad * self.seen:
            raise ValueError(f"{self.explain()}; that is more than --max-bad {self.max_bad:g} allows (first {next(iter(self.first.values()))})")

    def texts(self):
        """(where, text) for every record with a text."""
        for where, record in self:
            try:
                text = text_of(record)
            except ValueError as problem:
                self.reject(where, str(problem))
            else:
                yield where, text

    def _file(self, path):
        line = told = 0
        raw = open(path, "rb")
        try:
            with raw, {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, lambda file: file)(raw) as file:
                is_list = _ending(path) == ".json" and file.peek(64).lstrip(codecs.BOM_UTF8 + b" \t\r\n")[:1] == b"["
                parse = _parquet_rows if _ending(path) == ".parquet" else _text_documents if _ending(path) == ".txt" else _json_list if is_list else _json_lines
                for line, record in parse(file):
                    self.seen += 1
                    if self.progress:
                        self.progress(raw.tell() - told)
                        told = raw.tell()
                    if isinstance(record, dict):
                        yield f"{path}:{line}", record
                    else:
                        self.reject(f"{path}:{line}", *record)
        except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as problem:
            raise ValueError(f"{path}: damaged {path.suffix} file, cut off or changed after line {line} ({problem}); fetch it again") from None
        except UnicodeDecodeError:
            raise ValueError(f"{path}: after line {line}: {NOT_UTF8[0]}{NOT_UTF8[1]}") from None
        except _Broken as problem:
            raise ValueError(f"{path}:{problem}") from None


class _Broken(ValueError):
    """A place in a file behind which nothing can be understood any more."""


# The parsers below take a binary file and yield (line number, record), or (line number, (reason, detail)) for a bad one.


def _lines(file):
    """(number, text), or (number, (reason, detail)) for a bad line."""
    number = 0
    while line := file.readline(LONGEST):
        number += 1
        whole = len(line) < LONGEST or line.endswith(b"\n")
        while not (whole or not line or line.endswith(b"\n")):  # leave out the rest of it
            line = file.readline(LONGEST)
        try:
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8") if whole else (f"a line longer than {LONGEST:,} bytes",)
        except UnicodeDecodeError:
            yield number, NUL if b"\0" in line + file.peek(1)[:512] else NOT_UTF8  # a picture may begin with lines that have none


def _text_documents(file):
    parts, size, first = [], 0, 1  # of the document under way; `first` is its first line that is not blank
    for number, line in _lines(file):
        if not isinstance(line, str) or "\0" in line:
            yield number, NUL if isinstance(line, str) else line
            continue
        pieces = line.replace("\r\n", "\n").split(SEPARATOR)
        for i, part in enumerate(pieces):
            first = first if size else number
            parts.append(part)
            size += len(part) if size else len(part.strip())
            if i + 1 < len(pieces) or size > DOCUMENT and (size > 4 * DOCUMENT or not line.strip()):
                if size:
                    yield first, {"text": "".join(parts).strip("\n")}
                parts, size = [], 0
    if size:
        yield first, {"text": "".join(parts).strip("\n")}


def _json_lines(file):
    for number, line in _lines(file):
        if not isinstance(line, str):
            yield number, line
        elif line.strip():
            try:
                yield number, _object(json.loads(line), line)
            except (ValueError, RecursionError) as error:
                yield number, ("broken JSON", f" ({error})")


def _json_list(file):
    """One JSON list, whose objects are decoded one by one so that the list need not fit into memory."""
    source, decode = io.TextIOWrapper(file, "utf-8-sig"), json.JSONDecoder().raw_decode
    text = source.read(CHUNK)
    at, line = text.index("[") + 1, 1 + text[: text.index("[")].count("\n")
    while True:
        end = re.compile(r"[\s,]*").match(text, at).end()
        line, at = line + text.count("\n", at, end), end
        if text.startswith("]", at):
            return
        try:
            record, end = decode(text, at)
            problem = "the list does not end" if end == len(text) else None  # also: "12" may go on as "123"
        except (ValueError, RecursionError) as error:  # broken, or not all of it is in `text` yet
            problem = error
        if problem is None:
            yield line, _object(record, text[at:end])
            line, at = line + text.count("\n", at, end), end
            continue
        more = source.read(max(CHUNK, len(text) - at)) if len(text) - at < LONGEST else ""
        if not more:
            raise _Broken(f"{line}: broken JSON list, the record here cannot be read ({str(problem).split(':')[0]})")
        text, at = text[at:] + more, 0


def _parquet_rows(file):
    """The rows of a table; a text that is JSON where messages are expected is read as such."""
    try:
        parquet = importlib.import_module("pyarrow.parquet")  # no package of ours: only who has such files needs it
    except ImportError:
        raise ValueError(f"{file.name}: reading .parquet needs one more package: pip install pyarrow") from None
    number = 0
    for batch in parquet.ParquetFile(file).iter_batches(64):
        for record in batch.to_pylist():
            number += 1
            try:
                yield number, {name: json.loads(value) if name in ("conversations", "messages") and isinstance(value, str) else value
                               for name, value in record.items()}
            except ValueError as problem:
                yield number, ("broken JSON", f" ({problem})")


def _object(record, source):
    """The record that json made of `source`, or what is bad about it."""
    if not isinstance(record, dict):
        return (f"a JSON {type(record).__name__}, where an object {{...}} is expected",)
    if "\\ud" in source or "\\uD" in source:  # \ud83d without its other half is no character and could not be encoded
        try:
            json.dumps(record, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            return ("half of a surrogate pair",)
    return record


def text_of(record):
    """All text of a record in one string, whatever kind of data it is; ValueError when it has none."""
    fields = ["text"] if "text" in record else [field for field in FIELDS if field in record]
    if not fields:
        found = " ".join(", ".join(record).split())[:200]  # a name may be of any length, and have line ends
        raise ValueError(f"fields found: {found or 'none'}; expected text, conversations, messages, chosen + rejected or instruction + output")
    texts = []
    for field in fields:
        value = record[field]
        for message in value if isinstance(value, list) else [{"content": value}]:
            texts.append(message.get("content", message.get("value")) if isinstance(message, dict) else None)  # ShareGPT: value
            if not isinstance(texts[-1], str):
                raise ValueError(f"field {field}: expected a text or a list of messages with a text as content")
    if not any(map(str.strip, texts)):
        raise ValueError("the text is empty")
    return "\n".join(filter(None, texts))
