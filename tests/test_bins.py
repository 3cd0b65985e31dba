"""The data folder: whole or not at all, and whatever was changed in it afterwards is noticed when it is opened.
Next: test_prep.py
"""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from nanomind import bins, tokenizer
from nanomind.bins import Writer, open_folder

MERGES = [(b"t", b"h"), (b"th", b"e"), (b"\xe4", b"\xb8"), (b"\xe4\xb8", b"\xad")]


@pytest.fixture
def tok():
    return tokenizer.new(MERGES)


def write(folder, tok, texts=("the 中 cat", "two"), val=("the",), **options):
    with Writer(folder, tok, "text", **options) as writer:
        for split, some in (("train", texts), ("val", val)):
            for text in some:
                ids = np.array([tok.end_of_text, *tok.encode(text)], np.uint16)
                writer.add(split, ids, np.array([0]), np.ones(len(ids)) if options.get("mask") else None)
        writer.close(["a.txt"], {"not UTF-8": 2})
    return open_folder(folder)


def test_what_was_written_is_what_is_read(tmp_path, tok):
    folder = write(tmp_path / "x", tok, mask=True)
    assert folder.tokenizer.decode(folder.train.tokens) == "<|endoftext|>the 中 cat<|endoftext|>two"
    assert isinstance(folder.train.tokens, np.memmap) and folder.train.tokens.dtype == np.uint16
    assert folder.train.starts.tolist() == [0, len(tok.encode("the 中 cat")) + 1] and len(folder.train) == 2
    assert folder.train.lengths.sum() == len(folder.train.tokens) == len(folder.train.mask)
    assert folder.meta["splits"]["train"]["bytes"] == len("the 中 cattwo".encode())
    assert folder.meta["sources"] == ["a.txt"] and folder.meta["skipped"] == {"not UTF-8": 2} and folder.meta["kind"] == "text"
    assert sorted(p.name for p in (tmp_path / "x").iterdir()) == ["meta.json", "tokenizer.json", "tokenizer_config.json", "train", "val"]
    assert os.listdir(tmp_path) == ["x"]
    empty = write(tmp_path / "y", tok, val=())
    assert len(empty.val) == 0 and len(empty.val.tokens) == 0 and empty.val.mask is None


def test_large_ids_fit(tmp_path, tok):
    """Ids of a vocabulary over 65,535 were written as uint16 and came back as other tokens."""
    tok.vocab_size, tok.token_bytes = 70_000, [b"x"] * 70_000
    with Writer(tmp_path / "x", tok, "text") as writer:
        assert writer.dtype.itemsize == 4
        writer.add("train", np.array([0, 69_999], np.uint32), np.array([0]))
        writer.close()
    assert np.fromfile(tmp_path / "x/train/tokens.bin", "<u4").tolist() == [0, 69_999]
    with pytest.raises(ValueError, match="token id 69999 is outside the vocabulary of 263"):
        open_folder(tmp_path / "x")


def test_nobodys_folder_is_overwritten(tmp_path, tok):
    """`--out .` must not replace somebody's home."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.doc").write_text("10 years")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="home: the folder is not empty and holds no data folder"):
            Writer(tmp_path / "home", tok, "text", overwrite=overwrite)
    with pytest.raises(ValueError, match="thesis.doc: this is a file"):
        Writer(tmp_path / "home" / "thesis.doc", tok, "text")
    write(tmp_path / "x", tok)
    with pytest.raises(ValueError, match="add --overwrite"):
        write(tmp_path / "x", tok)
    assert len(write(tmp_path / "x", tok, texts=["one"], overwrite=True).train) == 1
    assert sorted(os.listdir(tmp_path)) == ["home", "x"]


def test_a_failure_leaves_the_old_folder_and_nothing_else(tmp_path, tok):
    write(tmp_path / "x", tok)
    with pytest.raises(KeyboardInterrupt):
        with Writer(tmp_path / "x", tok, "text", overwrite=True) as writer:
            writer.add("train", np.array([0, 5]), np.array([0]))
            raise KeyboardInterrupt
    with pytest.raises(ValueError, match="no document is left for train"):
        write(tmp_path / "x", tok, texts=[], overwrite=True)
    assert len(open_folder(tmp_path / "x").train) == 2 and os.listdir(tmp_path) == ["x"]


CHILD = """
import sys, numpy as np
from nanomind.bins import Writer
from nanomind.tokenizer import Tokenizer
with Writer(sys.argv[1], Tokenizer.load(sys.argv[1]), "text", overwrite=True) as writer:
    for _ in range(100):
        writer.add("train", np.full(10_000, 5, np.uint16), np.array([0]))
    print("written", flush=True)
    if sys.argv[2] == "wait":
        sys.stdin.read()
    writer.close()
"""


def test_kill_leaves_the_old_folder(tmp_path, tok):
    """A data folder whose files were written in place was half old and half new after a kill, and it opened."""
    write(tmp_path / "x", tok)
    child = subprocess.Popen([sys.executable, "-c", CHILD, tmp_path / "x", "wait"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    child.stdout.readline()
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert len(open_folder(tmp_path / "x").train) == 2
    with pytest.raises(ValueError, match="no finished data folder"):
        open_folder(tmp_path / ".x.unfinished")
    write(tmp_path / "x", tok, overwrite=True)
    assert os.listdir(tmp_path) == ["x"]
    os.rename(tmp_path / "x", tmp_path / ".x.replaced")  # as a kill between the two renames leaves it
    assert len(open_folder(tmp_path / "x").train) == 2 and os.listdir(tmp_path) == ["x"]


def test_full_disk(tmp_path, tok):
    """A file size limit makes write() fail as a full disk does: one line, the old folder as it was, no remains."""
    resource = pytest.importorskip("resource")
    write(tmp_path / "x", tok)

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, 600_000))

    program = "from nanomind.cli import run\ndef main():\n" + "".join(f"    {line}\n" for line in CHILD.splitlines()) + "run(main)"
    child = subprocess.run([sys.executable, "-B", "-c", program, tmp_path / "x", "go"], preexec_fn=limit, capture_output=True, text=True)
    assert child.returncode == 2 and child.stderr == f"error: {tmp_path / 'x'}: File too large\n"
    assert len(open_folder(tmp_path / "x").train) == 2 and os.listdir(tmp_path) == ["x"]


def test_a_disk_that_is_full_from_the_start(tmp_path, tok, monkeypatch):
    def full(folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tok, "save", full)
    with pytest.raises(OSError, match="No space left on device: .*/x"):
        write(tmp_path / "x", tok)
    assert os.listdir(tmp_path) == []


def test_two_runs_with_one_name(tmp_path, tok):
    """Two runs filled the same files in turn, and the mixture had the right size."""
    with Writer(tmp_path / "x", tok, "text") as first:
        first.add("train", np.array([0, 5]), np.array([0]))
        write(tmp_path / "x", tok)
        second = Writer(tmp_path / "x", tok, "text", overwrite=True)  # under way
        with pytest.raises(ValueError, match="another run is making the same folder"):
            first.close()
    second.add("train", np.array([0, 5]), np.array([0]))
    second.close()
    assert len(open_folder(tmp_path / "x").train) == 1


def cut(path):
    path.write_bytes(path.read_bytes()[:-2])


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda x: cut(x / "train/tokens.bin"), r"train/tokens.bin: 22 bytes where meta.json says 24"),
        (lambda x: (x / "val/mask.bin").unlink(), r"val/mask.bin: 0 bytes where"),
        (lambda x: np.array([0, 0], "<i8").tofile(x / "train/starts.bin"), "starts do not ascend"),
        (lambda x: np.array([0, 99], "<i8").tofile(x / "train/starts.bin"), "starts do not ascend"),
        (lambda x: np.array([1, 2], "<i8").tofile(x / "train/starts.bin"), "starts do not ascend"),
        (lambda x: (x / "meta.json").unlink(), "no meta.json, so this is no finished"),
        (lambda x: cut(x / "meta.json"), "not the description of a data folder of format 1"),
        (lambda x: edit(x / "meta.json", '"format": 1', '"format": 0'), "not the description of a data folder of format 1"),
        (lambda x: edit(x / "meta.json", '"tokens"', '"tokes"'), "not the description"),
        (lambda x: tokenizer.new(MERGES[:2]).save(x), "not the tokenizer that wrote these tokens"),
        (lambda x: (x / "tokenizer.json").unlink(), "tokenizer.json not found"),
    ],
)
def test_opening_notices_every_change(tmp_path, tok, damage, message):
    """A truncated tokens.bin trained for hours on what was left of it, and another tokenizer trained on noise."""
    write(tmp_path / "x", tok, mask=True)
    damage(tmp_path / "x")
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        open_folder(tmp_path / "x")
    assert "\n" not in str(error.value)


def test_formatting_of_the_tokenizer_does_not_matter(tmp_path, tok):
    write(tmp_path / "x", tok)
    file = tmp_path / "x" / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8"))), encoding="utf-8")
    assert len(open_folder(tmp_path / "x").train) == 2


def test_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such data folder; make one with python -m data_prep.text"):
        open_folder(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no meta.json"):
        open_folder(tmp_path / "empty")
    assert bins.FORMAT == 1
