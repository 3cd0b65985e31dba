"""The trainer: the same merges as `tokenizers`, whatever the corpus, and the same file to the byte."""

import json
import random
import sys
import time
from collections import Counter

import numpy as np
import pytest
import regex
from conftest import ROOT, sentences
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Reference
from tokenizers import decoders as reference_decoders

import bpe
from nanomind import merges, tokenizer_json
from nanomind.pretokenize import Cutter, WordTable, batches, hash_words
from nanomind.tokenizer import SPECIALS, Tokenizer, new

FIXED = settings(derandomize=True, deadline=None, max_examples=200, database=None)
documents = st.lists(st.one_of(*(st.text(st.sampled_from(alphabet), max_size=size) for alphabet, size in (
    ("a", 90), ("ab", 60), ("人工智能，", 40), (" \n\ta1", 20), ("'sSſtdrevmlL x", 20), ("😀龘 \u3000é", 20), ("12３½,.-", 20))), st.text(max_size=8)), max_size=8)


def learn(texts, n_merges, min_frequency=0, pattern="gpt2"):
    table = WordTable()
    for batch in batches(texts, size=200):
        table.add(Cutter(pattern).cut(batch))
    return merges.train(*merges.lay_out(*table.words()), n_merges, min_frequency)


def reference_tokenizer(texts, vocab_size, min_frequency=0, pattern="gpt2"):
    reference = Reference(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern == "gpt2")
    split = pre_tokenizers.Split(Regex(tokenizer_json.GPT4), "isolated")
    reference.pre_tokenizer = byte_level if pattern == "gpt2" else pre_tokenizers.Sequence([split, byte_level])
    reference.decoder = reference_decoders.ByteLevel()
    reference.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=min_frequency, special_tokens=list(SPECIALS), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return reference


@given(documents, st.sampled_from([0, 0, 1, 2, 3]), st.sampled_from([1, 5, 40, 300]), st.sampled_from(["gpt2", "gpt4"]))
@FIXED
def test_merges_equal_the_two_function_trainer_and_the_reference(texts, min_frequency, n_merges, pattern):
    """An incremental trainer is easily wrong where pairs overlap (aaa), where counts are stale, and where two pairs are equally
    frequent: all merges are compared with the plain recounting trainer and with the Rust one, until no pair is left."""
    ours = learn(texts, n_merges, min_frequency, pattern)
    split, _ = tokenizer_json.read_splitter(tokenizer_json.build([], SPECIALS, pattern))
    words = Counter(word.encode() for text in texts for word in split(text))
    assert ours == merges.train_reference(words, n_merges, min_frequency)
    reference = reference_tokenizer(texts, 259 + n_merges, min_frequency, pattern)
    assert json.loads(reference.to_str()) == tokenizer_json.build(ours, SPECIALS, pattern)


@given(documents, st.sampled_from(["gpt2", "gpt4"]))
@FIXED
def test_words_equal_the_regular_expression(texts, pattern):
    """The numpy pre-tokeniser decides from neighbours what the expression decides by matching; and a text may be cut for memory's sake."""
    split, known = tokenizer_json.read_splitter(tokenizer_json.build([], SPECIALS, pattern))
    assert known == pattern
    expected = Counter(word.encode() for text in texts for word in split(text))
    table = WordTable()
    for batch in batches(texts, size=5):
        table.add(Cutter(pattern).cut(batch))
    pieces, lengths, counts = table.words()
    data, ends = b"".join(piece.tobytes() for piece in pieces), np.cumsum(lengths)
    assert {data[end - n:end]: count for end, n, count in zip(ends.tolist(), lengths.tolist(), counts.tolist())} == expected


@pytest.mark.parametrize("places", [(7, 11, 15), (7, 8, 15), (3, 11, 15), (0, 7, 15), (6, 13, 14)])
def test_words_that_are_nearly_alike_have_different_hashes(places):
    """The table of words tells them apart by 64-bit hashes alone. A hash that mixed the last of eight bytes badly made one word of half of
    all words that differ in their 8th, 12th and 16th byte: the encoder then wrote the other word's ids."""
    letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", np.uint8)
    words = np.tile(letters[:21], (len(letters) ** 3, 1))
    words[:, places] = letters[np.stack(np.unravel_index(np.arange(len(words)), (26, 26, 26)), 1)]
    for size in range(16, 22):
        part = np.ascontiguousarray(words[:, :size]).ravel()
        assert len(np.unique(hash_words(part, np.arange(len(words) + 1) * size))) == len(words)


@pytest.mark.parametrize("pattern", ["gpt2", "gpt4"])
def test_the_saved_file_is_the_references_to_the_byte(tmp_path, corpus, pattern):
    """Any order of files and documents, and the same tokenizer.json as `tokenizers` saves. The order of a hash table or of files must
    not decide between equally frequent pairs."""
    texts = [json.loads(line)["text"] for line in corpus.read_text(encoding="utf-8").splitlines()]
    random.Random(1).shuffle(texts)
    for name, part in (("a", texts[:200]), ("b", texts[200:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    bpe.train([tmp_path / "b.jsonl", tmp_path / "a.jsonl"], 600, pattern).save(tmp_path / "ours")
    bpe.train([corpus], 600, pattern).save(tmp_path / "again")
    reference_tokenizer(texts, 600, pattern=pattern).save(str(tmp_path / "reference.json"), pretty=True)
    ours = (tmp_path / "ours" / "tokenizer.json").read_bytes()
    assert ours == (tmp_path / "reference.json").read_bytes() == (tmp_path / "again" / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("pattern", ["gpt2", "gpt4"])
def test_real_text_gives_the_references_file(pattern):
    """Made-up text has few ties and no typography: here prose, tables, code and two languages, until nearly every word is one token."""
    texts = [path.read_text(encoding="utf-8") for folder in (".", "docs", "nanomind", "data_prep/demo") for path in sorted((ROOT / folder).rglob("*"))
             if path.suffix in (".md", ".py", ".txt") and (folder != "." or path.parent == ROOT)]
    ours = learn(texts, 3000, pattern=pattern)
    assert len(texts) > 40 and len(ours) == 3000
    assert json.loads(reference_tokenizer(texts, 3259, pattern=pattern).to_str()) == tokenizer_json.build(ours, SPECIALS, pattern)


def test_encoding_the_training_text_gives_the_trainers_final_counts(corpus):
    """If training cut text otherwise than encoding does, merges learnt across cuts would never be used: the pattern is in the file."""
    texts = [json.loads(line)["text"] for line in corpus.read_text(encoding="utf-8").splitlines()]
    words = Counter(word.encode() for text in texts for word in regex.findall(tokenizer_json.GPT2, text))
    found = learn(texts, 141)
    tokenizer = new(found)
    splits = {word: tuple(bytes([byte]) for byte in word) for word in words}
    for left, right in found:
        splits = {word: merges.merge(tokens, (left, right), left + right) for word, tokens in splits.items()}
    expected = Counter()
    for word, count in words.items():
        for token in splits[word]:
            expected[token] += count
    counts = np.bincount(tokenizer.encode_many(texts)[0], minlength=tokenizer.vocab_size)
    assert {tokenizer.token_bytes[i]: count for i, count in enumerate(counts.tolist()) if count} == expected


def test_counts_above_32_bits():
    """`tokenizers` counts in 32 bits and wraps on a huge corpus: the most frequent pair turns negative and is never merged."""
    words = {b"aaab": 2 ** 40 + 1, b"abb": 2 ** 33, b"bcd": 2 ** 33, b"ab": 3}
    flat = np.frombuffer(b"".join(words), np.uint8)
    layout = merges.lay_out([flat], np.array([len(word) for word in words]), np.array(list(words.values())))
    assert merges.train(*layout, 9) == merges.train_reference(words, 9)


def test_a_too_high_threshold_is_noticed():
    """Rare pairs are forgotten to save time; where that was wrong the trainer must start again, not stop early."""
    words = {b"xy" * 40: 500, **{bytes([97 + i, 98 + i]): 1 for i in range(20)}}
    layout = merges.lay_out([np.frombuffer(b"".join(words), np.uint8)], np.array([len(word) for word in words]), np.array(list(words.values())))
    assert merges.train(*layout, 25) == merges.train_reference(words, 25)


def test_a_megabyte_without_punctuation():
    """An unsplit line becomes one giant word; trainers that rewrite whole words need hours for it. Here: seconds, and encoding too."""
    line = "".join(random.Random(0).choices("天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏", k=350_000))
    began = time.process_time()
    tokenizer = new(learn([line], 500))
    ids = tokenizer.encode(line)
    assert ids == tokenizer.encode_many([line])[0].tolist() and tokenizer.decode(ids) == line
    assert len(tokenizer.merges) == 500 and len(ids) < 300_000
    assert time.process_time() - began < 30


def test_memory_limit_gives_a_fair_sample_and_says_so(tmp_path, monkeypatch):
    """Users report 100 GB for 1.5 GB of Chinese. At the limit the rare words are thinned out, each survivor standing for several; the
    counts stay right on average, so most merges stay the same, and the user is told."""
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in sentences(6000)), encoding="utf-8")
    monkeypatch.setattr(bpe, "BASE_MEMORY", 0)
    monkeypatch.setattr("nanomind.pretokenize.CHUNK", 5000)
    monkeypatch.setattr(batches, "__defaults__", (5000, False))
    lines = []
    full = bpe.train([path], 700)
    small = bpe.train([path], 700, memory=1.5e-3, log=lines.append)
    assert sum("memory limit is reached" in line for line in lines) >= 1 and "limit 0.0 GB" in lines[0]
    assert len(set(full.token_bytes) & set(small.token_bytes)) > 0.6 * 700


def test_too_few_pairs_and_impossible_sizes_are_said(tmp_path):
    """Fewer merges than asked for, silently, means embedding rows that no id ever uses."""
    path = tmp_path / "tiny.txt"
    path.write_text("abc abc")
    lines = []
    tokenizer = bpe.train([path], 6400, log=lines.append)
    assert tokenizer.vocab_size == 259 + 3 and any("only 3 merges" in line for line in lines)
    assert bpe.train([path], 2 * 10 ** 9).hash == tokenizer.hash  # the arrays are as large as the text allows, not as the flag says
    with pytest.raises(ValueError, match="at least 259"):
        bpe.train([path], 100)
    for memory in (0.01, 0, float("nan")):
        with pytest.raises(ValueError, match="--memory"):
            bpe.train([path], 6400, memory=memory)
    with pytest.raises(ValueError, match="--max-bad 7"):
        bpe.train([path], 6400, max_bad=7)


@pytest.mark.parametrize("text", ["天地玄黄宇宙洪荒" * 40_000, ("abcdefgh" * 400 + "\n") * 40], ids=["one long word", "a frequent word"])
def test_memory_that_does_not_hold_the_frequent_words_is_an_error(tmp_path, monkeypatch, text):
    """Words that must stay cannot be thinned out: the trainer did so until a number overflowed, or learnt no merge from an emptied table."""
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    monkeypatch.setattr(bpe, "BASE_MEMORY", 0)
    with pytest.raises(ValueError, match="too little for this text"):
        bpe.train([tmp_path / "text.txt"], 400, memory=2e-5)


def test_command_line(corpus, tmp_path, capsys, monkeypatch):
    """train ends with a chat of three turns that decodes to itself; show prints Chinese tokens as Chinese, half characters as <E4>."""
    def call(*args):
        monkeypatch.setattr(sys, "argv", ["bpe.py", *map(str, args)])
        assert bpe.main() in (0, None)
        return capsys.readouterr().out
    out = call("train", corpus, "--vocab-size", 400, "--out", tmp_path / "tok", "--pattern", "gpt4")
    assert "vocabulary 400 tokens" in out and "gives the text back: yes" in out
    tokenizer = Tokenizer.load(tmp_path / "tok")
    assert tokenizer.vocab_size == 400
    listing = (tmp_path / "tok" / "vocab.txt").read_text(encoding="utf-8")
    assert "2\t0\t<|im_end|>" in listing and "\t天\n" in listing and len(listing.splitlines()) == 401
    assert {path.name for path in (tmp_path / "tok").iterdir()} == {"tokenizer.json", "tokenizer_config.json", "vocab.txt"}
    assert "<E9>" in call("show", tmp_path / "tok", "天 龘\n") and "Chinese" in call("show", tmp_path / "tok")


def test_readable():
    assert bpe.readable("天 \n\\".encode() + b"\xe4\xb8") == "天␣\\n\\<E4><B8>"


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    """A full disk in the middle of saving must not cost the tokenizer that a trained model depends on."""
    from nanomind.tokenizer import write_whole
    write_whole(tmp_path / "tokenizer.json", "old")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError):
        write_whole(tmp_path / "tokenizer.json", "new")
    assert (tmp_path / "tokenizer.json").read_text() == "old" and len(list(tmp_path.iterdir())) == 1
