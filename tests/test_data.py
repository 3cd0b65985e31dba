"""Packing and batches: every token once, nothing across borders, the same order forever."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nanomind import bins
from nanomind.data import IGNORE, PackedTokens, pack_whole


@pytest.fixture(scope="module")
def folder(data_folder):
    return bins.open_folder(data_folder)


def rows_of(folder, **changes):
    values = dict(seq_len=48, batch_size=4, seed=3)
    return PackedTokens(folder.train, folder.tokenizer, **{**values, **changes})


def masked_split(lengths, vocabulary=400, seed=0):
    """Documents whose second half is the target, as chats have it."""
    draw = np.random.default_rng(seed)
    starts = np.concatenate(([0], np.cumsum(lengths)[:-1])).astype(np.int64)
    tokens = draw.integers(3, vocabulary, sum(lengths)).astype(np.uint16)
    tokens[starts] = 0
    mask = np.concatenate([np.arange(n) >= (n + 1) // 2 for n in lengths]).astype(np.uint8)
    return SimpleNamespace(tokens=tokens, starts=starts, mask=mask)


def test_pretraining_uses_every_token_exactly_once(folder):
    """MiniMind pads every sample to a fixed length and cuts the rest: 40 % padding, and text that is never seen. nanoGPT draws windows with
    replacement: 37 % of an "epoch" is missing. Here the labels of one epoch, put in order, are the stream itself."""
    rows = rows_of(folder)
    labels = np.concatenate([row[1][row[1] != IGNORE] for row in map(rows.row, range(rows.rows))])
    assert np.array_equal(labels, folder.train.tokens[1:])
    assert 1 - rows.used / rows.places < 0.01 and "padding" in rows.summary()


def test_each_row_once_per_epoch_and_epochs_differ(folder):
    """Never shuffled, shuffled alike in each epoch, or drawn with replacement: all three were seen in public trainers."""
    rows = rows_of(folder, batch_size=1)
    first, second = ([tuple(rows.batch(step).tokens[0].tolist()) for step in range(e * rows.rows, (e + 1) * rows.rows)] for e in (0, 1))
    assert sorted(first) == sorted(second) == sorted(tuple(rows.row(i)[0].tolist()) for i in range(rows.rows)) and first != second


def test_batch_depends_on_nothing_but_seed_step_and_place(folder):
    """Randomness inside a loader makes runs depend on the number of workers and resume on luck."""
    rows, again = rows_of(folder), rows_of(folder)
    [rows.batch(step) for step in range(5)]
    for name in ("tokens", "labels", "doc_ids"):
        assert torch.equal(getattr(rows.batch(7, 1, 2), name), getattr(again.batch(7, 1, 2), name))
        assert torch.equal(torch.cat([getattr(rows.batch(3, i, 2), name) for i in (0, 1)]),
                           getattr(rows_of(folder, batch_size=8).batch(3), name))  # 2 x 4 rows are the rows of 1 x 8
    assert not torch.equal(rows.batch(7).tokens, rows_of(folder, seed=4).batch(7).tokens)


def test_documents_are_marked_and_end_with_the_end_token(folder):
    """A label across a border teaches to guess an unrelated text. The only label that follows a document's last token is <|endoftext|>: the
    end is learnt, the next document's first word is predicted from its own <|endoftext|>."""
    rows = rows_of(folder)
    end = folder.tokenizer.end_of_text
    for tokens, labels, documents in map(rows.row, range(rows.rows)):
        last = np.flatnonzero((np.diff(documents) != 0) & (documents[1:] >= 0))  # places whose successor is in another document
        assert np.array_equal(labels[last], [end] * len(last)) and np.array_equal(tokens[last + 1], labels[last])
        assert (tokens[1:][np.diff(documents) == 0] != end)[documents[1:][np.diff(documents) == 0] >= 0].all()


def test_whole_documents_and_their_masks(tokenizer):
    """nanochat's SFT reached rows without any target (0/0 = NaN) once half of the chats were too long; cut answers teach to break off. Too long or
    target-less documents are left out and counted when the data is opened, the rest lie in rows entire, and exactly the masked tokens are labels."""
    lengths = [10, 48, 49, 300, 2, 30, 17, 18, 5, 500, 700]
    split = masked_split(lengths)
    split.mask[split.starts[4]:split.starts[4] + 2] = 0
    rows = PackedTokens(split, tokenizer, 48, 2, whole=True)
    assert rows.left_out == {"longer than 48 tokens": 4, "without a target": 1}
    seen = []
    for index in range(rows.rows):
        tokens, labels, documents = rows.row(index)
        for document in np.unique(documents[documents >= 0]):
            place, start, n = documents == document, split.starts[document], lengths[document]
            assert np.array_equal(tokens[place], split.tokens[start:start + n])
            expected = np.where(split.mask[start + 1:start + n], split.tokens[start + 1:start + n].astype(np.int64), IGNORE)
            assert np.array_equal(labels[place], np.append(expected, IGNORE))  # nothing is predicted from the last token
            seen.append(document)
        assert (labels[documents < 0] == IGNORE).all() and (labels != IGNORE).any()
    assert sorted(seen) == [0, 1, 5, 6, 7, 8]


def test_best_fit_packs_tightly():
    """Rows of chats of many lengths are at least 95 % full, and nothing is lost or doubled."""
    draw = np.random.default_rng(0)
    sizes = np.minimum(512, draw.lognormal(4.8, 0.8, 5000).astype(int) + 5)
    packed = pack_whole(sizes, 512)
    assert sorted(d for row in packed for d in row) == list(range(5000))
    used = [sum(sizes[d] for d in row) for row in packed]
    assert max(used) <= 512 and sum(used) / (512 * len(packed)) > 0.95


def test_the_share_of_targets_is_that_of_the_rows(tokenizer):
    """What is left out was counted: 75 % were said to be supervised where the rows held 50 %."""
    split = masked_split([10, 30, 40])
    split.mask[split.starts[2]:] = 1  # all of it targets, and too long
    rows = PackedTokens(split, tokenizer, 32, 2, whole=True)
    kept = sum((rows.row(i)[1] != IGNORE).sum() for i in range(rows.rows))
    assert rows.left_out and f", {100 * kept / rows.used:.0f} % supervised" in rows.summary() and kept / rows.used == 0.5


def test_bits_per_byte_counts_bytes_of_the_source_text(folder):
    """nanochat counted the bytes of decoded tokens; half a character decodes to U+FFFD, three bytes: 193 of its tokens were wrong."""
    rows = PackedTokens(folder.val, folder.tokenizer, 48, 4)
    counted = sum(int(batch.label_bytes.sum()) for batch in rows.validation(1e9))
    assert counted == folder.meta["splits"]["val"]["bytes"]


def test_language_of_validation_documents(folder):
    """Chinese and English are reported separately, so each byte must be counted for the right one."""
    rows = PackedTokens(folder.val, folder.tokenizer, 48, 4)
    for batch in rows.validation(1e9):
        for labels, sizes, kinds in zip(batch.labels.tolist(), batch.label_bytes, batch.language):
            for index, name in enumerate(batch.languages):
                ids = [label for label, size, kind in zip(labels, sizes.tolist(), kinds.tolist()) if size and kind == index]
                ascii_share = np.mean([byte < 128 for i in ids for byte in folder.tokenizer.token_bytes[i]]) if ids else math.nan
                assert not ids or (ascii_share > 0.9) == (name == "en")
