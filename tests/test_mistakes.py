"""What a newcomer gets wrong is answered in one line that says what to type instead."""

import json
import subprocess
import sys

import pytest

from conftest import ROOT, sentences
from nanomind.records import Reader


@pytest.mark.parametrize("command, line", [
    ("train.py --stage pretrain --dta x --seqlen=3", "error: there is no --dta (perhaps --data), --seqlen (perhaps --seq-len); train.py --help lists what there is"),
    ("train.py --steps two", "error: argument --steps: invalid int value: 'two'; train.py --help lists what there is"),
    ("train.py my_text", "error: what is my_text?; train.py --help lists what there is"),
    ("sample.py --image", "error: argument --image: expected one argument; sample.py --help lists what there is"),
    ("bpe.py train x --vocab-sze 3 --out t", "error: there is no --vocab-sze (perhaps --vocab-size); bpe.py train --help lists what there is"),
    ("-m data_prep.text --input x --tokenzier t --out d", "error: there is no --tokenzier (perhaps --tokenizer); python -m data_prep.text --help lists what there is"),
    ("-m data_prep.text --input x --out d", "error: the following arguments are required: --tokenizer; python -m data_prep.text --help lists what there is"),
])
def test_a_mistyped_flag_is_one_line(command, line):
    """argparse answers with the usage of all flags, fifty lines, and calls a mistyped --tokenzier a missing --tokenizer."""
    result = subprocess.run([sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stderr.splitlines()) == (2, [line])


def test_binary_and_utf_16_files_are_not_taken_for_gbk(tmp_path, capsys):
    """A picture called .txt was 'not UTF-8; if the file is GBK: iconv ...'; Windows' "Unicode" text as well, and iconv made rubbish of it."""
    for name, content in (("picture.txt", bytes(range(255, -1, -1)) * 9), ("unicode.txt", "天地玄黄\r\n".encode("utf-16") * 9)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}:1: a NUL byte, so this is no text; if the file is UTF-16: iconv -f UTF-16"):
            list(Reader([tmp_path / name]).texts())


def test_what_is_expected_is_told_once(tmp_path, tokenizer_folder, capsys):
    """Something else given where chats are expected: five lines of 250 characters, all the same, and a sixth."""
    from data_prep.common import prepare
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"story": text}) + "\n" for text in sentences(9)))
    with pytest.raises(ValueError, match=r"text.jsonl:1: fields found: story; expected conversations .role, content. \(MiniMind\)"):
        prepare("chat", [tmp_path / "text.jsonl"], tokenizer_folder, tmp_path / "out")
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("skipped")]
    assert len(told) == 5 and "expected" in told[0] and all(line.endswith(f":{i}: fields found: story") for i, line in enumerate(told[1:], 2))


def test_chats_as_text_are_said_and_bad_answers_refused(tmp_path, tokenizer_folder, capsys):
    """Pretraining took preference pairs as text, the rejected answers with them."""
    from data_prep.common import prepare
    chats = [{"conversations": [{"role": "user", "content": text}, {"role": "assistant", "content": text}]} for text in sentences(90)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    prepare("text", [tmp_path / "chats.jsonl"], tokenizer_folder, tmp_path / "out")
    assert capsys.readouterr().out.count("chats.jsonl: conversations, read as plain text without roles; to learn to answer from them: --stage sft") == 1
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps({"prompt": text, "chosen": text, "rejected": "no"}) + "\n" for text in sentences(9)))
    with pytest.raises(ValueError, match="pairs.jsonl:1: a preference pair, half of which is a bad answer; it is data for --stage dpo"):
        prepare("text", [tmp_path / "pairs.jsonl"], tokenizer_folder, tmp_path / "pairs")


def test_data_that_does_not_suit_the_run(tmp_path, monkeypatch, data_folder, tokenizer_folder, tiny):
    """A --vocab-size beside a data folder did nothing; a stage that learns to see trained on chats without a picture; what was left out was a dict."""
    import train
    from data_prep.common import prepare
    monkeypatch.chdir(tmp_path)
    few = {"preset": str(tiny), "steps": 1, "seq_len": 64, "batch_size": 2}
    with pytest.raises(ValueError, match="--vocab-size 16000: .* holds its tokenizer already, of 400: leave out --vocab-size"):
        train.main({**few, "data": str(data_folder), "vocab_size": 16000})
    chats = [{"conversations": [{"role": "user", "content": text}, {"role": "assistant", "content": text * 9}]} for text in sentences(30)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    prepare("chat", [tmp_path / "chats.jsonl"], tokenizer_folder, tmp_path / "chats", val_share=0)
    with pytest.raises(ValueError, match="nothing to train on: .* left out 30 longer than 8 tokens; raise --seq-len"):
        train.main({**few, "stage": "sft", "data": "chats", "seq_len": 8})
    prepare("images", [tmp_path / "chats.jsonl"], tokenizer_folder, tmp_path / "blind", val_share=0)
    with pytest.raises(ValueError, match="no record of this data has a picture.* conversations alone are for --stage sft"):
        train.main({**few, "stage": "vlm", "phase": "1", "data": "blind"})
