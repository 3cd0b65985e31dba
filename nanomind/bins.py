"""The data folder that every stage trains on: written once by data_prep, memory-mapped by data.py, verified when opened.
In: batches of token ids with document starts (and a loss mask). Out: tokens.bin, starts.bin [, mask.bin] for train/ and val/,
the tokenizer, and meta.json, which is written last: a folder that an interrupted run left behind cannot be opened.

    tokens.bin  uint16 or uint32   3 ids ... | 3 ids ... | 3 ids ...     every document begins with <|endoftext|>
    starts.bin  int64              0           5           9             where in tokens.bin
    mask.bin    uint8              0 0 1 ... | 0 0 1 ... | ...           1: this token is a target

With images (kind "images") a <|endoftext|> inside a document stands for one; no text can produce that id there. Besides:

    images.bin        uint8        the image files, one after the other, equal ones once
    image_starts.bin  int64        where each begins
    refs.bin          int64        for every slot, in the order of the tokens, the number of its image
Next: data_prep/common.py
"""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanomind.tokenizer import Tokenizer

FORMAT = 1  # counts up when the layout changes
SPLITS = ("train", "val")


class Writer:
    """Collects a data folder beside its final place and puts it there as a whole; use it in a `with` block.

    Leaving the block by an exception removes everything written; a kill leaves `.<name>.unfinished`, which the next run
    removes. A finished folder at the same place stays usable until the new one is complete (and needs `overwrite`).
    """

    def __init__(self, folder, tokenizer, kind, mask=False, overwrite=False):
        self.folder = Path(folder).resolve()
        self.temporary, self.old = _beside(self.folder)
        self.tokenizer, self.kind, self.mask = tokenizer, kind, mask
        self.dtype = np.dtype("<u2" if tokenizer.vocab_size <= 65_535 else "<u4")
        self.token_lengths = np.array([len(raw) for raw in tokenizer.token_bytes])
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{folder}: this is a file; --out needs the name of a folder")
        if self.folder.exists() and any(self.folder.iterdir()):
            if not _is_ours(self.folder):
                raise ValueError(f"{folder}: the folder is not empty and holds no data folder; choose another --out")
            if not overwrite:
                raise ValueError(f"{folder}: there is a finished data folder already; add --overwrite to replace it or choose another --out")
        for leftover in (self.temporary, self.old):
            if leftover.exists():
                shutil.rmtree(leftover)
        self.totals = {split: {"documents": 0, "tokens": 0, "bytes": 0, "targets": 0, "largest_id": 0} for split in SPLITS}
        self.files, self.known = {}, {}  # known: (split, digest of an image) -> its number
        names = ("tokens", "starts", "mask") if mask else ("tokens", "starts")
        if kind == "images":
            names += ("images", "image_starts", "refs")
            for total in self.totals.values():
                total.update({"images": 0, "image_bytes": 0, "slots": 0})
        for split in SPLITS:
            (self.temporary / split).mkdir(parents=True)
            for name in names:
                self.files[split, name] = open(self.temporary / split / f"{name}.bin", "wb")
        try:
            tokenizer.save(self.temporary)
        except BaseException as problem:
            self.__exit__(type(problem), problem, None)
            raise

    def add(self, split, ids, starts, mask=None, images=()):
        """Append documents: `ids` of all of them in a row, `starts` of each within `ids` (the first is 0), `mask` like ids; `images`: the
        bytes of the image file for each slot."""
        assert (mask is not None) == self.mask and len(starts) and starts[0] == 0
        total = self.totals[split]
        self.files[split, "tokens"].write(ids.astype(self.dtype).data)
        self.files[split, "starts"].write((starts.astype("<i8") + total["tokens"]).data)
        if self.mask:
            assert len(mask) == len(ids)
            self.files[split, "mask"].write(mask.astype(np.uint8).data)
        if self.kind == "images":
            assert len(images) + len(starts) == np.count_nonzero(ids == self.tokenizer.end_of_text), "an image for every slot"
            self.files[split, "refs"].write(np.array([self._image(split, data) for data in images], "<i8").data)
            total["slots"] += len(images)
        total["documents"] += len(starts)
        total["tokens"] += len(ids)
        total["bytes"] += int(self.token_lengths[ids].sum())  # the tokenizer loses nothing: these are the text's UTF-8 bytes
        total["targets"] += int(mask.sum()) if self.mask else len(ids)
        total["largest_id"] = max(total["largest_id"], int(ids.max()))

    def _image(self, split, data):
        """The number of an image file, written when it is new."""
        total, digest = self.totals[split], (split, hashlib.sha256(data).digest())
        if digest not in self.known:
            self.known[digest] = total["images"]
            self.files[split, "images"].write(data)
            self.files[split, "image_starts"].write(np.array([total["image_bytes"]], "<i8").data)
            total["images"] += 1
            total["image_bytes"] += len(data)
        return self.known[digest]

    def close(self, sources=(), skipped=None):
        """Finish: sync everything to the disk, write meta.json, move the folder to its place."""
        if not self.totals["train"]["documents"]:
            raise ValueError(f"{self.folder}: no document is left for train; give more data or a smaller --val-share")
        if self._taken_over():
            raise ValueError(f"{self.folder}: another run is making the same folder")
        for file in self.files.values():
            file.close()
        meta = {
            "format": FORMAT,
            "kind": self.kind,
            "dtype": self.dtype.name,
            "mask": self.mask,
            "vocab_size": self.tokenizer.vocab_size,
            "tokenizer": self.tokenizer.hash,
            "sources": list(sources),
            "skipped": dict(skipped or {}),
            "splits": self.totals,
        }
        _sync(*self.temporary.rglob("*"))
        (self.temporary / "meta.json").write_text(json.dumps(meta, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        _sync(self.temporary / "meta.json", self.temporary)
        if self.folder.exists():
            os.rename(self.folder, self.old)  # killed right here, `_beside` takes it back next time
        os.rename(self.temporary, self.folder)
        _sync(self.folder.parent)
        shutil.rmtree(self.old, ignore_errors=True)
        self.files = {}

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if not self.files or self._taken_over():
            return
        for file in self.files.values():
            try:
                file.close()
            except OSError:  # a full disk was reported by the write already
                pass
        shutil.rmtree(self.temporary, ignore_errors=True)
        if isinstance(error, OSError) and not error.filename:  # "No space left on device" does not say where
            error.filename = str(self.folder)

    def _taken_over(self):
        """Did another run with the same --out remove our files and begin anew?"""
        path, file = self.temporary / "train" / "tokens.bin", self.files["train", "tokens"]
        return not file.closed and not (path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()))


@dataclass(frozen=True)
class Split:
    """Documents as they lie on the disk; document i is tokens[starts[i] : starts[i] + lengths[i]]."""

    tokens: np.ndarray  # [tokens], memory-mapped, uint16 or uint32
    starts: np.ndarray  # [documents], int64
    mask: np.ndarray | None  # [tokens], memory-mapped, uint8; None: every token is a target
    images: np.ndarray | None = None  # [bytes], memory-mapped, uint8; None: a folder without images
    image_starts: np.ndarray | None = None  # [images], int64
    refs: np.ndarray | None = None  # [slots], int64: numbers of images

    def __len__(self):
        return len(self.starts)

    @property
    def lengths(self):
        return np.diff(self.starts, append=len(self.tokens))

    def image(self, number):
        """The bytes of an image file."""
        end = self.image_starts[number + 1] if number + 1 < len(self.image_starts) else len(self.images)
        return self.images[self.image_starts[number]:end].tobytes()


@dataclass(frozen=True)
class Folder:
    path: Path
    meta: dict
    tokenizer: Tokenizer
    train: Split
    val: Split  # may have no documents


def open_folder(path):
    """Open and verify a data folder. Each thing that can be wrong is one clear ValueError (FileNotFoundError: no folder)."""
    again = "make it again with python -m data_prep.text (chat, pairs, images) --overwrite"
    folder = Path(path).resolve()
    _beside(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{path}: no such data folder; make one with python -m data_prep.text --out {path}")
    if not (folder / "meta.json").exists():
        raise ValueError(f"{path}: no meta.json, so this is no finished data folder; {again}")
    if not _is_ours(folder):
        raise ValueError(f"{path}/meta.json: this is not the description of a data folder of format {FORMAT}; {again}")
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    tokenizer = Tokenizer.load(folder)
    if tokenizer.hash != meta["tokenizer"]:
        raise ValueError(f"{path}/tokenizer.json: not the tokenizer that wrote these tokens; {again}")
    splits = []
    for split in SPLITS:
        total = meta["splits"][split]
        if total["largest_id"] >= tokenizer.vocab_size:
            raise ValueError(f"{path}/{split}: token id {total['largest_id']} is outside the vocabulary of {tokenizer.vocab_size}; {again}")
        arrays = []
        for name, dtype, count in (("tokens", meta["dtype"], "tokens"), ("starts", "<i8", "documents"), ("mask", "uint8", "tokens"),
                                   ("images", "uint8", "image_bytes"), ("image_starts", "<i8", "images"), ("refs", "<i8", "slots")):
            if name == "mask" and not meta["mask"] or count not in total:
                arrays.append(None)
                continue
            file, expected = folder / split / f"{name}.bin", total[count] * np.dtype(dtype).itemsize
            size = file.stat().st_size if file.exists() else 0
            if size != expected:
                raise ValueError(f"{path}/{split}/{name}.bin: {size:,} bytes where meta.json says {expected:,}: cut off or changed; {again}")
            arrays.append(np.memmap(file, np.dtype(dtype), "r") if size else np.zeros(0, dtype))  # nothing cannot be mapped
        arrays[1] = np.array(arrays[1])
        if arrays[5] is not None and len(arrays[5]) and not 0 <= arrays[5].min() <= arrays[5].max() < total["images"]:
            raise ValueError(f"{path}/{split}/refs.bin: names an image that is not in images.bin; {again}")
        if len(arrays[1]) and (arrays[1][0] != 0 or np.any(np.diff(arrays[1], append=total["tokens"]) <= 0)):
            raise ValueError(f"{path}/{split}/starts.bin: the document starts do not ascend from 0; {again}")
        splits.append(Split(*arrays))
    return Folder(folder, meta, tokenizer, *splits)


def _is_ours(folder):
    """Is there a finished data folder of this format?"""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        return meta["format"] == FORMAT and all(key in meta["splits"][split] for split in SPLITS for key in ("tokens", "documents", "largest_id"))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _beside(folder):
    """The two folders a Writer uses next to `folder`; puts the old one back if a kill came between the two renames of close()."""
    temporary, old = (folder.with_name(f".{folder.name}.{what}") for what in ("unfinished", "replaced"))
    if old.exists() and not folder.exists():
        os.rename(old, folder)
    return temporary, old


def _sync(*paths):
    for path in paths:
        if os.name != "nt" or path.is_file():  # Windows cannot sync a folder
            handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
