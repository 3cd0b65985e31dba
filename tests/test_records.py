"""Raw files as users have them: every ending, every kind of damage, in bounded memory.
Next: test_tokenizer.py
"""

import gzip
import json
import lzma
import random
import subprocess
import sys

import pytest

from nanomind import records
from nanomind.records import Reader, find_files, text_of


def file(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def documents(paths, max_bad=0.01):
    return [text for _, text in Reader(paths, max_bad).texts()]


def lines(*objects):
    return "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in objects)


@pytest.mark.parametrize("ending, pack", [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress)])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_every_ending(tmp_path, ending, pack, bom):
    """A byte order mark in front of a file made json fail on its first line, and that record was lost without a word."""
    wanted = ["中文 one", "two\n\nlines"]
    objects = [{"text": text} for text in wanted]
    file(tmp_path, "a.jsonl" + ending, pack(bom + lines(*objects).encode()))
    file(tmp_path, "b.json" + ending, pack(bom + json.dumps(objects, indent=1).encode()))
    file(tmp_path, "c.json" + ending, pack(bom + lines(*objects).encode()))
    file(tmp_path, "d.txt" + ending, pack(bom + "<|endoftext|>\n".join(wanted).encode()))
    told = []
    reader = Reader([tmp_path], progress=told.append)
    assert [text for _, text in reader.texts()] == wanted * 4
    assert sum(told) == reader.total_bytes and reader.bad == 0


def test_bad_lines_are_named_counted_and_skipped(tmp_path, capsys):
    """One GBK line in a large file used to end a run of hours with a traceback, or was replaced by question marks in silence."""
    good = lines({"text": "ok"})
    bad = ['{"text": "cut', "[1, 2]", '{"text": "\\ud83d"}', '{"text": 5}', '{"text": ""}', '{"a": 1, "b": 2}', "[" * 100_000]
    content = good.encode() + "\n".join(bad).encode() + b"\n\n" + '{"text": "中文"}\n'.encode("gbk") + good.encode()
    path = file(tmp_path, "x.jsonl", content)
    reader = Reader([path], max_bad=0.9)
    assert [where for where, _ in reader.texts()] == [f"{path}:1", f"{path}:11"]
    assert (reader.seen, reader.bad) == (10, 8)
    shown = capsys.readouterr().err
    assert f"{path}:2: broken JSON" in shown and f"{path}:3: a JSON list" in shown and f"{path}:4: half of a surrogate" in shown
    assert shown.count("\n") == records.SHOWN
    assert reader.reasons["not UTF-8"] == 1
    with pytest.raises(ValueError, match=r"8 of 10 records skipped.*--max-bad 0.01.*x.jsonl:2"):
        documents([path])


def test_a_file_without_any_good_record_is_an_error_whatever_the_share(tmp_path):
    """Among large files a small one of a wrong kind stays under the share of bad lines, and its data was missed much later."""
    file(tmp_path, "a.jsonl", lines({"text": "ok"}) * 1000)
    for name, content, message in (
        ("b.jsonl", lines({"question": "?", "answer": "!"}), "b.jsonl:1: fields found: question, answer; expected text, conversations"),
        ("b.jsonl", lines({"a\nb" * 999: 1}), r"b.jsonl:1: fields found: (a ba b)*.{,3}; expected text"),
        ("b.jsonl", "中文\n".encode("gbk"), "b.jsonl:1: not UTF-8.*iconv"),
        ("b.txt", bytes(range(256)) * 9, "b.txt:1: a NUL byte"),
        ("b.json", "[]", "nothing in this file"),
        ("b.txt", " \n\n", "nothing in this file"),
        ("b.json", '[{"text": "中文"}]'.encode("gbk"), "not UTF-8"),
    ):
        path = file(tmp_path, name, content)
        with pytest.raises(ValueError, match=message):
            documents([tmp_path], max_bad=1)
        path.unlink()


@pytest.mark.parametrize("name, pack", [("a.jsonl.gz", gzip.compress), ("a.jsonl.xz", lzma.compress)])
def test_a_cut_off_archive_is_an_error(tmp_path, name, pack):
    """A download that broke off is half a corpus; it must not pass for a small one."""
    whole = pack(b"".join(b'{"text": "%d"}\n' % (i * i) for i in range(50_000)))
    for content in (whole[: len(whole) // 2], whole[: len(whole) // 2] + b"\0" * 99 + whole[len(whole) // 2 :], b'{"text": "plain"}\n'):
        with pytest.raises(ValueError, match=f"{name}: damaged"):
            documents([file(tmp_path, name, content)], max_bad=1)


def test_paths(tmp_path):
    """What is found in a folder does not depend on the order in which the file system lists it."""
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").mkdir()
    for name in ("z.txt", "a.json.xz", "sub/m.jsonl", ".hidden/b.txt", ".c.txt", "picture.png"):
        file(tmp_path, name, "x")
    assert [str(p.relative_to(tmp_path)) for p in find_files([tmp_path])] == ["a.json.xz", "sub/m.jsonl", "z.txt"]
    with pytest.raises(FileNotFoundError, match="nowhere: no such file or folder"):
        find_files([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match="picture.png: cannot read this kind of file; expected .*jsonl"):
        find_files([tmp_path / "picture.png"])
    with pytest.raises(ValueError, match="e.txt: the file is empty"):
        find_files([file(tmp_path, "e.txt", "")])
    with pytest.raises(ValueError, match="no data file in this folder"):
        (tmp_path / "none").mkdir()
        find_files([tmp_path / "none"])


def test_txt_becomes_documents_and_keeps_its_text(tmp_path):
    """A book in one .txt became one document of megabytes: one worker had it all, and a row of training never saw a beginning."""
    book = "\r\n\r\n".join(f"paragraph {i} " + "words " * 50 for i in range(200))
    parts = documents([file(tmp_path, "book.txt", book)])
    assert len(parts) > 10 and max(map(len, parts)) < 1.2 * records.DOCUMENT
    assert "\n\n".join(parts) == book.replace("\r\n", "\n").strip("\n")
    stories = ["first\n\nstory", "second", "third  <|im_end|>"]
    path = file(tmp_path, "stories.txt", "<|endoftext|>\n" + "\n<|endoftext|>\n".join(stories))
    assert documents([path]) == stories
    assert [where for where, _ in Reader([path])] == [f"{path}:{line}" for line in (2, 6, 8)]
    assert documents([file(tmp_path, "tight.txt", "a<|endoftext|>b\n<|endoftext|><|endoftext|>c<|endoftext|>")]) == ["a", "b", "c"]
    endless = documents([file(tmp_path, "lines.txt", "no blank line at all\n" * 10_000)])
    assert max(map(len, endless)) < 4.2 * records.DOCUMENT


def test_json_list_is_read_in_pieces(tmp_path, monkeypatch):
    """Records, numbers and escapes may be cut anywhere by the end of a piece."""
    monkeypatch.setattr(records, "CHUNK", 7)
    rng = random.Random(0)
    for indent in (None, 0, 2):
        objects = [{"text": "".join(rng.choices('ab"\\\n中😀 ]}[{,', k=rng.randrange(30))), "n": [rng.random(), {"x": None}]} for _ in range(50)]
        path = file(tmp_path, "x.json", json.dumps(objects, indent=indent, ensure_ascii=rng.random() < 0.5))
        found = list(Reader([path]))
        assert [record for _, record in found] == objects
        if indent == 0:
            assert found[1][0] == f"{path}:11"
    mixed = Reader([file(tmp_path, "x.json", '[{"text": "x"}, 12, {"text": "y"}]')], max_bad=0.5)
    assert [text for _, text in mixed.texts()] == ["x", "y"] and mixed.bad == 1
    for broken, line in (('[{"text": "x"},\n{"text": "y" 3}]', 2), ('[{"text": "x"},\n{"text": "y"}', 2), ("[12", 1)):
        with pytest.raises(ValueError, match=f"x.json:{line}: broken JSON list"):
            list(Reader([file(tmp_path, "x.json", broken)], max_bad=1))


def test_endless_lines_do_not_fill_the_memory(tmp_path, monkeypatch):
    """A binary file without a line end was read as one line of its whole size."""
    monkeypatch.setattr(records, "LONGEST", 1000)
    monkeypatch.setattr(records, "CHUNK", 100)
    reader = Reader([file(tmp_path, "x.txt", "y" * 2500 + "\nfine\n" + "z" * 1000)], max_bad=1)
    assert [text for _, text in reader.texts()] == ["fine"]
    assert reader.reasons == {"a line longer than 1,000 bytes": 2}
    with pytest.raises(ValueError, match="x.json:1: broken JSON list"):
        list(Reader([file(tmp_path, "x.json", '[{"text": "' + "z" * 3000 + '"}]')]))


def test_memory_does_not_grow_with_the_file(tmp_path):
    """Reading everything into a list first was fine for the sample and killed the machine on the corpus."""
    objects = [{"text": "word " * 200}] * 40_000  # 40 MB
    program = (
        "import resource, sys\n"
        "from nanomind.records import Reader\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(sum(len(text) for _, text in Reader(sys.argv[1:]).texts()), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    paths = [file(tmp_path, "a.jsonl", lines(*objects)), file(tmp_path, "b.json", json.dumps(objects))]
    out = subprocess.run([sys.executable, "-c", program, *map(str, paths)], capture_output=True, text=True, check=True).stdout
    characters, grown = map(int, out.split())
    assert characters == 2 * 40_000 * 1000 and grown < 25_000  # KB


def test_text_of_every_kind_of_record():
    assert text_of({"text": "a", "other": 1}) == "a"
    assert text_of({"conversations": [{"role": "user", "content": "a"}, {"content": "b"}]}) == "a\nb"
    assert text_of({"conversations": [{"from": "human", "value": "a"}]}) == "a"
    assert text_of({"messages": [{"role": "user", "content": "a"}]}) == "a"
    assert text_of({"chosen": [{"content": "a"}], "rejected": [{"content": "b"}]}) == "a\nb"
    assert text_of({"prompt": "p", "chosen": "a", "rejected": "b"}) == "p\na\nb"
    assert text_of({"instruction": "i", "input": "", "output": "o"}) == "i\no"
    for record in ({"text": None}, {"messages": [3]}, {"messages": [{"role": "user"}]}, {"x": 1}):
        with pytest.raises(ValueError, match="expected"):
            text_of(record)
