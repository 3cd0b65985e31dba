"""Rows for the model: packs a data folder's documents into rows of T tokens and hands out batches.
In: one split of a data folder. Out: `batch(step, i)`, a pure function of (seed, step, i): no generator state, no workers, exact resume.
Next: nanomind/by_hand.py

How documents lie in rows (T = 6; E is <|endoftext|>, which opens every document; - is no target):

    stream   E a b c E d e f g E h ...          pretraining: the stream is cut every T tokens, each token is the label of exactly one place
    row 0    tokens  E a b c E d      labels  a b c E d e      documents  0 0 0 0 1 1
    row 1    tokens  e f g E h ...    labels  f g E h ...      documents  1 1 1 2 2 ...

The label after `c` is E: the end of a document is learnt, and it tells nothing about the next one, whose first word is predicted from its own E.
Chats are packed whole instead: a row holds entire documents, no label crosses a border, only tokens marked in mask.bin are targets. The two
documents of a preference pair lie in the same row. Where a document has a picture (one id in the folder), a row has P places for its patches.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

IGNORE = -100  # the label of a token that is not a target
LANGUAGES = ("zh", "en")  # of a document: mainly Chinese characters, or not


@dataclass
class Batch:
    """tokens, labels, doc_ids: (B, T) int64, labels shifted once, here. For validation also the UTF-8 bytes of each label and the index of
    its document's language, (B, T)."""
    tokens: torch.Tensor
    labels: torch.Tensor
    doc_ids: torch.Tensor
    label_bytes: torch.Tensor = None
    language: torch.Tensor = None
    languages: tuple = LANGUAGES
    group: int = 1  # documents that belong together: 2 for preference pairs
    features: torch.Tensor = None  # (M, P, E) of the batch's pictures
    slots: torch.Tensor = None  # (B, T): which of the M * P vectors belongs here, -1: none

    @property
    def n_targets(self):
        """What the step's loss is divided by: tokens that are targets, or preference pairs."""
        if self.group > 1:
            return len(self.places()[self.doc_ids >= 0].unique()) // self.group
        return int((self.labels != IGNORE).sum())

    def places(self):
        """(B, T): a number for each document of each row. (At the end of an epoch one document may be in two rows of a batch.)"""
        return self.doc_ids + (torch.arange(len(self.doc_ids), device=self.doc_ids.device)[:, None] << 32)

    def to(self, device):
        moved = {name: x.to(device, non_blocking=True) for name, x in vars(self).items() if torch.is_tensor(x)}
        return replace(self, **moved)


def pack_whole(sizes, room):
    """Best-fit decreasing: lists of documents whose sizes sum to at most `room`. sizes: (n,) each <= room. -> list of lists of indices.

    Bins are kept by the room they have left, so finding the tightest one that fits is a look at a sorted list of at most `room` values.
    """
    from bisect import bisect_left, insort
    bins, open_bins, lefts = [], {}, []  # room left -> bins with it; the rooms that occur, ascending
    for document in np.argsort(-np.asarray(sizes), kind="stable").tolist():
        size = int(sizes[document])
        at = bisect_left(lefts, size)
        if at == len(lefts):
            bins.append([])
            number, left = len(bins) - 1, room
        else:
            left = lefts[at]
            number = open_bins[left].pop()
            if not open_bins[left]:
                del open_bins[left], lefts[at]
        bins[number].append(document)
        left -= size
        if left > 0:
            if left not in open_bins:
                open_bins[left] = []
                insort(lefts, left)
            open_bins[left].append(number)
    return bins


class PackedTokens:
    """One split of a data folder as rows of `seq_len` tokens; `whole` keeps documents entire (chats), else the stream is cut (pretraining).
    `group` documents in a row of the folder share a row and are used or left out together (2: preference pairs). `features` of the pictures,
    where there are some: `features[numbers]` -> (M, P, E), `features.patches` is P."""

    def __init__(self, split, tokenizer, seq_len, batch_size, seed=0, whole=False, group=1, name="data", features=None):
        self.split, self.T, self.B, self.seed, self.whole, self.group = split, seq_len, batch_size, seed, whole, group
        self.starts = np.asarray(split.starts)
        self.ends = np.append(self.starts[1:], len(split.tokens))  # document i is tokens[starts[i]:ends[i]]
        self.pad = tokenizer.end_of_text if tokenizer.end_of_text is not None else 0
        self.token_bytes = np.array([len(piece) for piece in tokenizer.token_bytes], dtype=np.int16)  # (V), 0 for special tokens
        self.chinese = np.array([sum(3 for byte in piece if 0xE3 <= byte <= 0xE9) for piece in tokenizer.token_bytes], dtype=np.int16)
        self.left_out, self.features = {}, features
        if features is not None:  # places of pictures in the folder's tokens: an <|endoftext|> that begins no document
            marks = np.flatnonzero(np.asarray(split.tokens) == self.pad)
            self.marks = np.setdiff1d(marks, self.starts, assume_unique=True)
            if len(self.marks) != len(split.refs):
                raise ValueError(f"{name}: {len(self.marks):,} places for pictures in the tokens, but {len(split.refs):,} pictures for them: "
                                 "make the data folder again with python -m data_prep.images --overwrite")
        if whole:
            self._pack(name)
        else:
            self.rows = -(-(len(split.tokens) - 1) // seq_len)  # every token but the first is a label once
            self.places = self.rows * seq_len
            self.used = len(split.tokens) - 1

    def _pack(self, name):
        """Choose the documents that can be used and put them into rows; what is left out is counted by reason."""
        sizes = self.ends - self.starts
        if self.split.mask is None:
            targets = sizes - 1
        else:
            targets = np.add.reduceat(np.asarray(self.split.mask, dtype=np.int64), self.starts) if len(self.starts) else sizes
        if self.features is not None:
            sizes = sizes + (self.features.patches - 1) * np.diff(np.searchsorted(self.marks, np.append(self.starts, self.ends[-1:])))
        sizes, fewest = sizes.reshape(-1, self.group).sum(1), targets.reshape(-1, self.group).min(1)
        long, empty = sizes > self.T, fewest < 1
        usable = np.flatnonzero(~long & ~empty)
        self.targets = targets * np.repeat(~long & ~empty, self.group)  # of each document; 0 of those left out
        self.left_out = {reason: int(count) for reason, count in ((f"longer than {self.T} tokens", long.sum()),
                                                                  ("without a target", (empty & ~long).sum())) if count}
        self.bins = [(usable[packed][:, None] * self.group + np.arange(self.group)).ravel() for packed in pack_whole(sizes[usable], self.T)]
        self.rows, self.places, self.used = len(self.bins), len(self.bins) * self.T, int(sizes[usable].sum())

    def row(self, index):
        """Row `index` -> tokens, labels, documents' numbers; each (T,) int64. Padding: document -1, no label."""
        T = self.T
        tokens = np.full(T, self.pad, dtype=np.int64)
        labels = np.full(T, IGNORE, dtype=np.int64)
        documents = np.full(T, -1, dtype=np.int64)
        if self.whole:
            at = 0
            for document in self.bins[index]:
                first, last = self.starts[document], self.ends[document]
                ids, targets = self.split.tokens[first:last], self._labels(first + 1, last)
                if self.features is not None:
                    ids, targets = self._expand(first, last, ids, targets)
                n = len(ids)
                tokens[at:at + n] = ids
                labels[at:at + n - 1] = targets
                documents[at:at + n] = document
                at += n
        else:
            first = index * T
            last = min(first + T, len(self.split.tokens) - 1)  # the very last token has no label
            n = last - first
            tokens[:n] = self.split.tokens[first:last]
            labels[:n] = self._labels(first + 1, last + 1)
            documents[:n] = np.searchsorted(self.starts, np.arange(first, last), side="right") - 1
        return tokens, labels, documents

    def _labels(self, first, last):
        labels = np.asarray(self.split.tokens[first:last], dtype=np.int64)
        return labels if self.split.mask is None else np.where(np.asarray(self.split.mask[first:last]), labels, IGNORE)

    def _expand(self, first, last, ids, targets):
        """P places for every mark of a picture among the ids of a document; nothing is to be predicted inside them."""
        marks = self.pictures(first, last)[0] - first
        times = np.ones(len(ids), dtype=np.int64)
        times[marks] = self.features.patches
        targets[marks] = IGNORE
        return np.repeat(ids, times), np.repeat(targets, times[:-1])

    def pictures(self, first, last):
        """(places, numbers of the pictures) among tokens first..last of the split."""
        found = slice(*np.searchsorted(self.marks, (first, last)))
        return self.marks[found], self.split.refs[found]

    def _sight(self, tokens, documents, rows):
        """The pictures of a batch: features (M, P, E) and slots (B, T); M may be 0."""
        inside = np.pad(documents[:, 1:] == documents[:, :-1], ((0, 0), (1, 0)))  # not the first token of its document
        places = inside & (tokens == self.pad) & (documents >= 0)
        numbers = np.concatenate([self.pictures(self.starts[document], self.ends[document])[1] for row in rows for document in self.bins[row]])
        slots = np.full(tokens.shape, -1, dtype=np.int64)
        slots[places] = np.arange(places.sum())
        return self.features[numbers], torch.from_numpy(slots)

    def order(self, epoch):
        """The permutation of the rows in one epoch: each row exactly once."""
        if getattr(self, "_epoch", None) != epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.rows)
        return self._order

    def batch(self, step, i=0, accumulate=1):
        """Micro-batch i of `accumulate` of optimiser step `step` (from 0). The stream of rows goes on over the ends of epochs."""
        first = (step * accumulate + i) * self.B
        return self._collate([self.order(place // self.rows)[place % self.rows] for place in range(first, first + self.B)])

    def _collate(self, rows, languages=False):
        """Numbers of rows -> Batch."""
        tokens, labels, documents = (np.stack(column) for column in zip(*map(self.row, rows)))
        batch = Batch(*(torch.from_numpy(x) for x in (tokens, labels, documents)), group=self.group)
        if self.features is not None:
            batch.features, batch.slots = self._sight(tokens, documents, rows)
        if languages:
            batch.label_bytes = torch.from_numpy(np.where(labels == IGNORE, 0, self.token_bytes[labels.clip(0)]))
            batch.language = torch.from_numpy(np.where(documents < 0, 0, self._languages(documents)))
        return batch

    def _languages(self, documents):
        """Index into LANGUAGES for each document number. A document is Chinese when over 30 % of its bytes belong to Chinese characters."""
        kinds = np.zeros(documents.shape, dtype=np.int64)
        for document in np.unique(documents[documents >= 0]):
            text = np.asarray(self.split.tokens[self.starts[document]:self.ends[document]][:20000])
            kinds[documents == document] = int(self.chinese[text].sum() <= 0.3 * self.token_bytes[text].sum())
        return kinds

    def every_row(self, what="rows"):
        """Batches that hold each row once, in the order of the data; a bar called `what` shows how far they are."""
        from tqdm import tqdm
        for at in tqdm(range(0, self.rows, self.B), desc=what, unit="batch", disable=None, leave=False, dynamic_ncols=True):
            yield self._collate(range(at, min(at + self.B, self.rows)))

    def validation(self, tokens):
        """Batches of about `tokens` tokens: always the same rows, spread over the whole split, ready to be counted by language."""
        count = min(self.rows, max(1, round(tokens / self.T)))
        chosen = np.linspace(0, self.rows - 1, count).astype(int)
        for at in range(0, count, self.B):
            yield self._collate(chosen[at:at + self.B], languages=True)

    def summary(self):
        """One line: rows, tokens, share of padding and of targets, what was left out."""
        text = f"{self.rows:,} rows of {self.T}, {self.used:,} tokens"
        if self.rows:
            text += f", {100 * (1 - self.used / self.places):.2f} % padding"
        if self.rows and self.split.mask is not None:
            text += f", {100 * self.targets.sum() / self.used:.0f} % supervised"
        return text + "".join(f", left out {count} {reason}" for reason, count in self.left_out.items())
