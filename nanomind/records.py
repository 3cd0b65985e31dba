"""Reads raw data: .txt, .jsonl and .json files, each also as .gz or .xz, one record at a time in bounded memory.
In: files or folders as a user types them. Out: (where, record) pairs, where = "file:line" and record = a dict; what cannot
be used is counted, shown as file:line with a reason and skipped, and too large a share of it is an error.
Next: tokenizer.py
"""

import codecs
import gzip
import io
import json
import lzma
import re
import sys
import zlib
from collections import Counter
from pathlib import Path

ENDINGS = (".txt", ".jsonl", ".json")
DOCUMENT = 4_000  # a .txt document ends at the first blank line after so many characters (any line after 4 x) ...
SEPARATOR = "<|endoftext|>"  # ... or where this stands
LONGEST = 64_000_000  # bytes of one line or record: what is longer is no text, and must not fill the memory
CHUNK = 1_000_000  # characters of a JSON list looked at in one go
NOT_UTF8 = ("not UTF-8", "; if the file is GBK: iconv -f GB18030 -t UTF-8 FILE > NEW")
SHOWN = 5  # bad records printed one by one; all are counted


def find_files(paths):
    """The data files among `paths` in a fixed order: files as given, folders searched through, hidden names left out."""
    files = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.is_file() and _ending(p) in ENDINGS)
            inside = [p for p in inside if not any(part.startswith(".") for part in p.relative_to(path).parts)]
            if not inside:
                raise ValueError(f"{path}: no data file in this folder; expected names ending in {' '.join(ENDINGS)} (also + .gz .xz)")
            files += inside
        elif not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder; give existing {' '.join(ENDINGS)} files (also + .gz .xz)")
        elif _ending(path) not in ENDINGS:
            raise ValueError(f"{path}: cannot read this kind of file; expected a name ending in {' '.join(ENDINGS)} (also + .gz .xz)")
        else:
            files.append(path)
    for path in files:
        if path.stat().st_size == 0:
            raise ValueError(f"{path}: the file is empty")
    if not files:
        raise ValueError(f"no input files; give {' '.join(ENDINGS)} files (also + .gz .xz) or folders with such files")
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
        self.max_bad = max_bad
        self.progress = progress
        self.seen = 0  # records, good and bad
        self.reasons = Counter()  # reason -> how many were skipped for it
        self.first = None  # the first bad record, for the final error

    @property
    def bad(self):
        return self.reasons.total()

    def reject(self, where, reason, detail=""):
        """Count a record as unusable; `reason` is what is counted, `detail` says more about this one."""
        message = f"{where}: {reason}{detail}"
        self.first = self.first or message
        if self.bad < SHOWN:
            print(f"skipped {message}", file=sys.stderr)
        self.reasons[reason] += 1

    def explain(self):
        """'3 of 100 records skipped: 2 not UTF-8, 1 broken JSON'"""
        return f"{self.bad:,} of {self.seen:,} records skipped: " + ", ".join(f"{n:,} {reason}" for reason, n in self.reasons.most_common())

    def __iter__(self):
        for path in self.files:
            seen, bad, first = self.seen, self.bad, self.first
            self.first = None
            yield from self._file(path)
            if self.seen == seen:
                raise ValueError(f"{path}: there is nothing in this file")
            if self.seen - seen == self.bad - bad:
                raise ValueError(f"{self.first} (and no other record of this file can be used)")
            self.first = first or self.first
        if self.bad > self.max_bad * self.seen:
            raise ValueError(f"{self.explain()}; that is more than --max-bad {self.max_bad:g} allows (first {self.first})")

    def texts(self):
        """The text of every record that has one: (where, text)."""
        for where, record in self:
            try:
                text = text_of(record)
            except ValueError as problem:
                self.reject(where, str(problem))
                continue
            if text.strip():
                yield where, text
            else:
                self.reject(where, "the text is empty")

    def _file(self, path):
        line = told = 0
        raw = open(path, "rb")
        try:
            with raw, {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, lambda file: file)(raw) as file:
                is_list = _ending(path) == ".json" and file.peek(64).lstrip(codecs.BOM_UTF8 + b" \t\r\n")[:1] == b"["
                parse = _text_documents if _ending(path) == ".txt" else _json_list if is_list else _json_lines
                for line, record, problem in parse(file):
                    self.seen += 1
                    if self.progress:
                        self.progress(raw.tell() - told)
                        told = raw.tell()
                    if problem:
                        self.reject(f"{path}:{line}", *problem)
                    else:
                        yield f"{path}:{line}", record
        except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as problem:
            raise ValueError(f"{path}: damaged {path.suffix} file, cut off or changed after line {line} ({problem}); fetch it again") from None
        except UnicodeDecodeError:
            raise ValueError(f"{path}: after line {line}: {NOT_UTF8[0]}{NOT_UTF8[1]}") from None
        except _Broken as problem:
            raise ValueError(f"{path}:{problem}") from None


class _Broken(ValueError):
    """A place in a file behind which nothing can be understood any more."""


def _utf8_lines(file):
    """(line number, text, None) or (line number, None, problem) for each line of a binary file."""
    number = 0
    while line := file.readline(LONGEST):
        number += 1
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if len(line) == LONGEST and not line.endswith(b"\n"):
            while (rest := file.readline(LONGEST)) and not rest.endswith(b"\n"):
                pass
            yield number, None, (f"a line longer than {LONGEST:,} bytes",)
            continue
        try:
            yield number, line.decode("utf-8"), None
        except UnicodeDecodeError:
            yield number, None, NOT_UTF8


def _text_documents(file):
    parts, size, first = [], 0, 1  # of the document under way; `first` is its first line that is not blank
    for number, line, problem in _utf8_lines(file):
        if problem or "\0" in line:
            yield number, None, problem or ("a NUL byte, so this is no text file",)
            continue
        pieces = line.replace("\r\n", "\n").split(SEPARATOR)
        for i, part in enumerate(pieces):
            first = first if size else number
            parts.append(part)
            size += len(part) if size else len(part.strip())
            if i + 1 < len(pieces) or size > DOCUMENT and (size > 4 * DOCUMENT or not line.strip()):
                if size:
                    yield first, {"text": "".join(parts).strip("\n")}, None
                parts, size = [], 0
    if size:
        yield first, {"text": "".join(parts).strip("\n")}, None


def _json_lines(file):
    for number, line, problem in _utf8_lines(file):
        if problem:
            yield number, None, problem
        elif line.strip():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield number, None, ("broken JSON", f" ({error})")
            else:
                yield number, *_checked(record, line)


def _json_list(file):
    """The objects of one JSON list, decoded one by one so that the list need not fit into memory."""
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
            yield line, *_checked(record, text[at:end])
            line, at = line + text.count("\n", at, end), end
            continue
        more = source.read(max(CHUNK, len(text) - at)) if len(text) - at < LONGEST else ""
        if not more:
            raise _Broken(f"{line}: broken JSON list, the record here cannot be read ({str(problem).split(':')[0]})")
        text, at = text[at:] + more, 0


def _checked(record, source):
    """(record, problem) for what json made of `source`."""
    if not isinstance(record, dict):
        return None, (f"a JSON {type(record).__name__}, where an object {{...}} is expected",)
    if "\\ud" in source or "\\uD" in source:  # "\\ud83d" without its other half is no character and could not be encoded
        try:
            json.dumps(record, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            return None, ("half of a surrogate pair",)
    return record, None


TEXT_FIELDS = (  # the first row whose fields are all there
    ("text",),
    ("conversations",),
    ("messages",),
    ("prompt", "chosen", "rejected"),
    ("chosen", "rejected"),
    ("instruction", "input", "output"),
    ("instruction", "output"),
)


def text_of(record):
    """All text of a record in one string, whatever kind of data it is; ValueError when it has no known fields."""
    for names in TEXT_FIELDS:
        if all(name in record for name in names):
            return "\n".join(filter(None, (_contents(record[name], name) for name in names)))
    raise ValueError(f"fields found: {', '.join(record) or 'none'}; expected text, conversations, messages, chosen + rejected or instruction + output")


def _contents(value, name):
    if isinstance(value, list):  # messages; ShareGPT says "value" for "content"
        value = [m.get("content", m.get("value")) if isinstance(m, dict) else None for m in value]
    for text in value if isinstance(value, list) else [value]:
        if not isinstance(text, str):
            raise ValueError(f"field {name}: expected a string or a list of messages with a string as content")
    return "\n".join(value) if isinstance(value, list) else value


def documents(paths, max_bad=0.01, progress=None):
    """The texts of all records of `paths` in order; `progress(n)` hears of every n bytes read."""
    return (text for _, text in Reader(paths, max_bad, progress).texts())
