"""Encodes a corpus: replays the merges in order over all different words at once, with numpy.
In: a Tokenizer and a list of texts. Out: the ids of all texts in a row (those that Tokenizer.encode gives) and where each text starts.
Next: nanomind/word_encoder.py

The same flat array `S` as in merges.py. Each merge has a bucket of positions where its pair was seen; buckets are emptied in the order of
the merges, and the tokens this makes put new positions into later buckets (never into earlier ones: a token is older than the pairs it
is part of). So the cost is that of the merges that happen, not of the text times the merges.
"""

import functools
from dataclasses import dataclass

import numpy as np

from nanomind.merges import SEPARATOR, count_byte_pairs, group_positions, position_type, without_overlaps, write
from nanomind.pretokenize import Cutter, WordTable, batches

GAP = -2  # in S where a separator stands
KNOWN = 4_000_000  # ids remembered; when there are more, it starts anew


class CorpusEncoder:
    """encode(texts) -> (ids, starts) as Tokenizer.encode_many describes. What was encoded once is remembered from call to call."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        word = tokenizer.encode_word
        seams = None if word.ignore_merges else Seams({tokenizer.token_bytes[new] for _, _, new in tokenizer.merges})
        self.cutter = Cutter(tokenizer.known_pattern, tokenizer.split, seams)
        self.plan = plan(tokenizer.byte_ids, tokenizer.merges) if word.in_order and not word.ignore_merges else None
        self.id_type = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
        self.known = None

    def encode(self, texts):
        known, self.known = self.known, None  # a call that is interrupted leaves nothing half done behind
        if known is None or len(known[1]) > KNOWN:
            known = WordTable(), np.zeros(0, self.id_type), np.zeros(0, np.int64)
        table, ids, counts = known  # ids: of all known words in a row; counts: how many each has
        words, words_per_text = [], []
        for batch in batches(map(self.tokenizer.normalize, texts), whole=True):
            cut = self.cutter.cut(batch)
            words.append(table.add(cut))
            words_per_text.append(np.diff(np.flatnonzero(cut.is_end), prepend=-1) - 1)
        new_ids, new_counts = self._encode_words(*table.take_new())
        ids, counts = np.concatenate([ids, new_ids.astype(self.id_type)]), np.concatenate([counts, new_counts])
        self.known = table, ids, counts
        firsts = np.cumsum(counts) - counts
        out, before = [ids[:0]], [np.zeros(1, np.int64)]
        for part in words:  # from words back to text: copy the ids of each
            n = counts[part]
            done = np.cumsum(n)
            out.append(ids[np.repeat(firsts[part] - done + n, n) + np.arange(n.sum())])
            before.append(before[-1][-1] + done)
        words_before = np.cumsum(np.concatenate([np.zeros(1, np.int64), *words_per_text]))[:-1]
        return np.concatenate(out), np.concatenate(before)[words_before]

    def _encode_words(self, pieces, lengths):
        """Ids of all words in a row, and how many each word has."""
        data = np.concatenate([np.zeros(0, np.uint8), *pieces])
        ends = np.cumsum(lengths, dtype=np.int64)
        if self.plan is None:
            text, encode = data.tobytes(), self.tokenizer.encode_word.encode_bytes
            rows = [encode(text[end - n:end]) for end, n in zip(ends.tolist(), lengths.tolist())]
            return np.array([i for row in rows for i in row], np.int64), np.array([len(row) for row in rows], np.int64)
        flat = np.full(len(data) + len(lengths) + 1, SEPARATOR, np.uint8)
        live = np.ones(len(flat), bool)
        gaps = ends + np.arange(1, len(ends) + 1)
        live[gaps] = live[0] = False
        flat[live] = data
        S = replay(flat, self.plan, live)
        tokens = np.flatnonzero(live)
        return S.take(tokens), np.diff(np.searchsorted(tokens, gaps), prepend=0)


class Seams:
    """seams(codes) -> which characters no token joins to the one before them. Chinese comes in clauses that are long and all different; cut at
    the seams they become short pieces that repeat, and a word's encoding is that of its pieces in a row: no merge goes across.

    Two characters are looked up by a hash. Where it meets that of others, a seam is missed and nothing is lost."""

    def __init__(self, tokens):
        pairs, self.follows = set(), np.zeros(0x110000, bool)  # follows: may stand behind, or begin with, a part of a character
        for text in (token.decode("utf-8", "surrogateescape") for token in tokens):  # bytes of a part: U+DC80 ..
            for i, (left, right) in enumerate(zip(text, text[1:]), 1):
                if not "\udc80" <= right <= "\udcff":
                    pairs.add((ord(left), ord(right)))
                    self.follows[ord(right)] |= "\udc80" <= left <= "\udcff"
                elif right >= "\udcc0":  # the token ends in the first bytes of a character: which can it be?
                    part = text[i:].encode("utf-8", "surrogateescape")
                    size = 2 if part[0] < 0xE0 else 3 if part[0] < 0xF0 else 4
                    low, high = (part + byte * (size - len(part)) for byte in (b"\x80", b"\xbf"))
                    low, high = (functools.reduce(lambda code, byte: code << 6 | byte & 0x3F, data[1:], data[0] & 0x7F >> size) for data in (low, high))
                    self.follows[low:high + 1] = True
        self.joined = np.zeros(1 << max(20, (8 * len(pairs)).bit_length()), bool)
        left, right = np.array([*pairs, (0, 0)], np.uint32).T
        self.joined[self._slots(left, right)] = True

    def __call__(self, codes):
        seams = np.zeros(len(codes), bool)
        seams[1:] = ~self.joined[self._slots(codes[:-1], codes[1:])]
        seams &= ~self.follows[codes]
        return seams

    def _slots(self, left, right):
        mixed = left * np.uint32(0x9E3779B1) ^ right * np.uint32(0x85EBCA6B)
        return mixed >> np.uint32(33 - len(self.joined).bit_length())


@dataclass
class Plan:
    merges: list         # [(left, right, new)]
    byte_ids: np.ndarray  # id of each byte, GAP for the separator
    lengths: np.ndarray  # bytes of each token
    first: dict          # {pair of bytes: rank of its merge}
    left_of: dict        # {token: ([older tokens it merges with on its left], [ranks])}
    right_of: dict       # {token: ([tokens as old or older it merges with on its right], [ranks])}


def plan(byte_ids, merges):
    """What replay() has to know about the merges."""
    size = 1 + max([*byte_ids, *(new for _, _, new in merges)])
    lengths, first, left_of, right_of = np.ones(size, np.int64), {}, {}, {}
    age = {token: -1 for token in byte_ids}
    byte_of = {token: byte for byte, token in enumerate(byte_ids)}
    for rank, (left, right, new) in enumerate(merges):
        lengths[new] = lengths[left] + lengths[right]
        age[new] = rank
        if age[left] < 0 and age[right] < 0:
            first[byte_of[left] << 8 | byte_of[right]] = rank
        else:
            place, young, old = (left_of, right, left) if age[right] > age[left] else (right_of, left, right)
            for values, value in zip(place.setdefault(young, ([], [])), (old, rank)):
                values.append(value)
    ids = np.array([*byte_ids[:SEPARATOR], GAP], np.int16 if size < 1 << 15 else np.int32)
    return Plan(merges, ids, lengths, first, left_of, right_of)


def replay(flat, plan, live):
    """Carry out all merges on `flat`; `live` (bool, True at the bytes of words) stays True where a token starts. Returns the array that
    holds the id of the token at each of these places."""
    S, lengths, buckets = plan.byte_ids[flat], plan.lengths, {}
    numbers = np.zeros(1 << 16, np.int64)
    wanted = list(plan.first)
    numbers[wanted] = count_byte_pairs(flat)[0][wanted]
    for left, right, at in group_positions(flat, numbers):
        buckets[plan.first[left << 8 | right]] = [at]
    table = np.full(len(lengths) + 2, -1)  # rank of the merge with this neighbour; -1, also for GAP and DEAD: none
    small = position_type(flat)
    for rank, (left, right, new) in enumerate(plan.merges):
        if rank not in buckets:
            continue
        at = np.concatenate(buckets.pop(rank), dtype=np.int64)
        alive = S.take(at) == left
        alive &= S.take(at + lengths[left]) == right
        at = at[alive]
        if left == right:
            at = without_overlaps(np.sort(at), lengths[left])
        if len(at):
            write(S, at, new, lengths[left], lengths[right])
            live[at + lengths[left]] = False
            if new in plan.left_of:
                neighbours = S.take(at - 1)
                _fill(buckets, table, plan.left_of[new], neighbours, at - lengths.take(neighbours, mode="wrap"), small)
            if new in plan.right_of:
                _fill(buckets, table, plan.right_of[new], S.take(at + lengths[new]), at, small)
    return S


def _fill(buckets, table, merges, neighbours, starts, small):
    """Put the positions whose neighbour has a merge with the new token into the buckets of these merges."""
    partners, ranks = merges
    table[partners] = ranks
    found = table[neighbours]
    table[partners] = -1
    hits = (found >= 0).nonzero()[0]
    if len(hits):
        found = found.take(hits)
        order = found.astype(np.uint16 if ranks[-1] < 1 << 16 else np.int64).argsort(kind="stable")
        found, starts = found.take(order), starts.take(hits.take(order)).astype(small)
        bounds = [0, *((found[1:] != found[:-1]).nonzero()[0] + 1).tolist(), len(found)]
        for begin, end in zip(bounds, bounds[1:]):
            buckets.setdefault(int(found[begin]), []).append(starts[begin:end])
