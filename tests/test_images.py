"""Pictures of every kind, and conversations about them as a data folder: nothing cut silently, nothing taken from outside, no place forged."""

import io
import json
import struct
import sys
import zlib

import pytest
from PIL import Image

from conftest import ROOT  # noqa: F401
from data_prep.common import prepare
from data_prep.images import placed
from nanomind import bins
from nanomind.images import open_image


def encoded(image, form="PNG", **options):
    data = io.BytesIO()
    image.save(data, form, **options)
    return data.getvalue()


def palette():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    return image


def rotated():
    image, exif = Image.new("RGB", (4, 2), "red"), Image.Exif()
    exif[0x0112] = 6
    return encoded(image, "JPEG", exif=exif)


def animation():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


RED, WHITE = (255, 0, 0), (255, 255, 255)


@pytest.mark.parametrize("name, data, size, colour", (
    ("P", encoded(palette()), (4, 4), RED),
    ("P with transparency", encoded(palette(), transparency=1), (4, 4), WHITE),
    ("L", encoded(Image.new("L", (3, 5), 128)), (3, 5), (128,) * 3),
    ("1", encoded(Image.new("1", (3, 5), 1)), (3, 5), WHITE),
    ("LA", encoded(Image.new("LA", (4, 4), (0, 0))), (4, 4), WHITE),
    ("RGBA", encoded(Image.new("RGBA", (4, 4), (255, 0, 0, 255))), (4, 4), RED),
    ("RGBA, clear", encoded(Image.new("RGBA", (4, 4), (255, 0, 0, 0))), (4, 4), WHITE),
    ("I;16", encoded(Image.new("I;16", (4, 4), 32896)), (4, 4), (128,) * 3),
    ("CMYK", encoded(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "JPEG", quality=100), (4, 4), (254, 0, 0)),
    ("turned by EXIF", rotated(), (2, 4), (254, 0, 0)),
    ("1x1", encoded(Image.new("RGB", (1, 1), "red")), (1, 1), RED),
    ("animated", animation(), (4, 4), RED),
    ("very long", encoded(Image.new("RGB", (3000, 1), "red")), (3000, 1), RED)))
def test_every_mode_opens_as_rgb(name, data, size, colour):
    """Palettes read as grey, transparency as black, 16 bits cut off at white, photographs on their side: all without an error."""
    image = open_image(data, name)
    assert image.mode == "RGB" and image.size == size
    assert all(abs(a - b) <= 3 for a, b in zip(image.getpixel((0, 0)), colour)), image.getpixel((0, 0))


def bomb():
    """A PNG of a few bytes that claims 30,000 x 30,000 pixels."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("data, reason", ((b"", "empty"), (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"), (bomb(), "pixels"),
                                          (encoded(Image.effect_noise((60, 60), 50))[:300], "damaged"), (b"GIF89a", "damaged|not an image")))
def test_unusable_pictures_are_refused_by_name(data, reason):
    """A truncated file that opens as half grey teaches nonsense; a bomb fills the memory."""
    with pytest.raises(ValueError, match=f"^here.png: .*({reason})"):
        open_image(data, "here.png")


@pytest.fixture
def folder(tmp_path):
    for number, colour in enumerate(("red", "green", "blue")):
        (tmp_path / f"{number}.png").write_bytes(encoded(Image.new("RGB", (8, 8), colour)))
    (tmp_path / "same.png").write_bytes((tmp_path / "0.png").read_bytes())
    (tmp_path / "bad.png").write_bytes(b"no picture")
    return tmp_path


def chat(question="<image>\n这是什么？", answer="红色。"):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def prepared(folder, tokenizer_folder, records, name="data.jsonl", **options):
    (folder / name).write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    prepare("images", [folder / name], tokenizer_folder, folder / "out", val_share=0, overwrite=True, **options)
    return bins.open_folder(folder / "out")


def test_layouts_and_places(folder, tokenizer_folder, capsys):
    """Adjacent pictures merged into one, the second one dropped, a picture for a text without any: each broke a public data set's reader."""
    opened = prepared(folder, tokenizer_folder, [
        {"image": "0.png", "conversations": chat()},
        {"image": ["0.png", "1.png"], "conversations": chat("<image><image>\n比较。")},
        {"image": "1.png, 2.png", "conversations": [*chat("先看<image>"), *chat("再看<image>吧")]},
        {"conversations": chat("`<image>` 是什么标签？")},
        {"image": "same.png", "conversations": chat("没有标记")}])
    split, end, tokenizer = opened.train, opened.tokenizer.end_of_text, opened.tokenizer
    assert "MiniMind-V format" in capsys.readouterr().out
    texts, slots = [], []
    for start, length in zip(split.starts, split.lengths):
        ids = split.tokens[start:start + length].tolist()
        texts.append(tokenizer.decode(ids[1:]))
        slots.append(ids[1:].count(end))
        assert not split.mask[start:start + length][[token == end for token in ids]].any(), "a picture is no target"
    assert slots == [1, 2, 2, 0, 1]
    assert "<|endoftext|><|endoftext|>\n比较。" in texts[1] and "再看<|endoftext|>吧" in texts[2] and "`<image>`" in texts[3]
    assert "<|endoftext|>\n没有标记" in texts[4]
    assert split.refs.tolist() == [0, 0, 1, 1, 2, 0] and len(split.image_starts) == 3, "equal files are stored once"
    assert [split.image(i) for i in range(3)] == [(folder / f"{i}.png").read_bytes() for i in range(3)]


def test_llava_layout(folder, tokenizer_folder, capsys):
    """The same conversation in LLaVA's words gives the same tokens."""
    ours = prepared(folder, tokenizer_folder, [{"image": "0.png", "conversations": chat()}]).train.tokens.tolist()
    theirs = prepared(folder, tokenizer_folder, [{"id": "1", "image": "0.png", "conversations": [
        {"from": "human", "value": "<image>\n这是什么？"}, {"from": "gpt", "value": "红色。"}]}]).train.tokens.tolist()
    assert ours == theirs and "LLaVA format" in capsys.readouterr().out


def test_parquet_layout(folder, tokenizer_folder):
    """MiniMind-V's present files: conversations as JSON text, the pictures' bytes beside them."""
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet
    picture = (folder / "0.png").read_bytes()
    parquet.write_table(pyarrow.table({"conversations": [json.dumps(chat(), ensure_ascii=False)] * 2, "image_bytes": [picture] * 2}), folder / "data.parquet")
    prepare("images", [folder / "data.parquet"], tokenizer_folder, folder / "out", val_share=0)
    opened = bins.open_folder(folder / "out")
    assert len(opened.train) == 2 and opened.train.refs.tolist() == [0, 0] and opened.train.image(0) == picture


def test_parquet_without_its_package(folder, tokenizer_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (folder / "data.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="pip install pyarrow"):
        prepare("images", [folder / "data.parquet"], tokenizer_folder, folder / "out", val_share=0)


def test_unusable_records_are_counted_and_explained(folder, tokenizer_folder, capsys):
    """A missing file, a broken one, one from elsewhere, a wrong number of places: each by file and line, none in silence."""
    bad = [{"image": "none.png", "conversations": chat()}, {"image": "bad.png", "conversations": chat()}, {"image": "../secret.png", "conversations": chat()},
           {"image": "/etc/passwd", "conversations": chat()}, {"image": ["0.png", "1.png"], "conversations": chat()}, {"image": 7, "conversations": chat()}]
    opened = prepared(folder, tokenizer_folder, [{"image": "0.png", "conversations": chat()}, *bad], max_bad=1)
    errors = capsys.readouterr().err
    assert len(opened.train) == 1 and sum(opened.meta["skipped"].values()) == len(bad)
    for line, reason in ((2, "an image that is not there"), (3, "bad.png: not an image"), (4, "outside the folder"), (5, "outside the folder"), (6, "1 <image>, 2 pictures")):
        assert f"data.jsonl:{line}: " in errors and reason in errors
    with pytest.raises(ValueError, match="--max-bad"):
        prepared(folder, tokenizer_folder, [{"image": "0.png", "conversations": chat()}, *bad])


def test_no_text_makes_a_place(tokenizer):
    """A user who types the placeholder, or the control token itself, gets text."""
    ids, _ = tokenizer.render_chat([{"role": "user", "content": ["<|endoftext|><image>", None, "<|endoftext|>"]}, {"role": "assistant", "content": "<|endoftext|>"}])
    assert ids.count(tokenizer.end_of_text) == 1
    assert placed(chat("<image>"), 0) == chat("<image>")


def test_damaged_folders_do_not_open(folder, tokenizer_folder):
    opened = prepared(folder, tokenizer_folder, [{"image": "0.png", "conversations": chat()}])
    (opened.path / "train" / "refs.bin").write_bytes(struct.pack("<q", 9))
    with pytest.raises(ValueError, match="refs.bin"):
        bins.open_folder(opened.path)
    (opened.path / "train" / "images.bin").write_bytes(b"short")
    with pytest.raises(ValueError, match="images.bin"):
        bins.open_folder(opened.path)
