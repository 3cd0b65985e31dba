"""Encodes a corpus: replays the merges in order over all different words at once, with numpy.
In: a Tokenizer and a list of texts. Out: the ids of all texts in a row (those that Tokenizer.encode gives) and where each text starts.
Next: ../bpe.py

The same flat array `S` as in merges.py. Each merge has a bucket of positions where its pair was seen; buckets are emptied in the order of
the merges, and the tokens this makes put new positions into later buckets (never into earlier ones: a token is older than the pairs it
is part of). So the cost is that of the merges that happen, not of the text times the merges.
"""

import numpy as np

from nanomind.merges import DEAD, SEPARATOR, group_positions, position_type, without_overlaps, write
from nanomind.pretokenize import Cutter, WordTable, batches

GAP = -2  # in S where a separator stands


def encode_corpus(tokenizer, texts):
    """(ids, starts) as Tokenizer.encode_many describes."""
    table, cutter = WordTable(), Cutter(tokenizer.known_pattern, tokenizer.split)
    words, words_per_text = [], []
    for batch in batches(map(tokenizer.normalize, texts), whole=True):
        cut = cutter.cut(batch)
        words.append(table.add(cut))
        words_per_text.append(np.diff(np.flatnonzero(cut.is_end), prepend=-1) - 1)
    pieces, lengths, _ = table.words()
    ids, ends = _encode_words(tokenizer, pieces, lengths)
    counts = np.diff(ends, prepend=0)
    kind = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    ids = ids.astype(kind)
    out = [np.zeros(0, kind)]
    for part in words:  # from words back to text: copy the ids of each
        n = counts[part]
        done = np.cumsum(n)
        out.append(ids[np.repeat(ends[part] - done, n) + np.arange(done[-1] if len(n) else 0)])
    ids_before = np.concatenate([[0], np.cumsum(np.concatenate([np.zeros(0, np.int64), *(counts[part] for part in words)]))])
    words_before = np.cumsum(np.concatenate([np.zeros(1, np.int64), *words_per_text]))[:-1]
    return np.concatenate(out), ids_before[words_before]


def _encode_words(tokenizer, pieces, lengths):
    """Ids of all words in a row, and where each word's end."""
    data = np.concatenate([np.zeros(0, np.uint8), *pieces])
    ends = np.cumsum(lengths, dtype=np.int64)
    if not tokenizer.replayable:
        text = data.tobytes()
        rows = [tokenizer.encode_bytes(text[end - n:end]) for end, n in zip(ends.tolist(), lengths.tolist())]
        return np.array([i for row in rows for i in row], np.int64), np.cumsum([len(row) for row in rows], dtype=np.int64)
    flat = np.full(len(data) + len(lengths) + 1, SEPARATOR, np.uint8)
    is_word = np.ones(len(flat), bool)
    is_word[ends + np.arange(1, len(ends) + 1)] = is_word[0] = False
    flat[is_word] = data
    S = replay(flat, tokenizer.byte_ids, tokenizer.merges, is_word)
    ids = S[is_word]
    counts = np.cumsum(is_word)[ends + np.arange(len(ends))]
    return ids, counts


def replay(flat, byte_ids, merges, live):
    """Carry out all merges [(left, right, new)] on `flat`; `live` (bool, True at word bytes) stays True where a token starts.
    Returns the array that holds at each of these places the id of the token."""
    S = np.array([*byte_ids[:SEPARATOR], GAP], np.int16 if max(map(max, merges), default=0) < 1 << 15 else np.int32)[flat]
    size = 1 + max([*byte_ids, *(new for _, _, new in merges)])
    lengths, buckets, left_of, right_of, first = _plan(byte_ids, merges, size)
    wanted = np.zeros(1 << 16, bool)
    wanted[list(first)] = True
    for left, right, at in group_positions(flat, wanted):
        buckets[first[left << 8 | right]].append(at)
    table = np.full(size + 2, -1)  # rank of the merge with this neighbour; -1, also for GAP and DEAD: none
    small = position_type(flat)
    for rank, (left, right, new) in enumerate(merges):
        if not buckets[rank]:
            continue
        at = np.concatenate(buckets[rank]).astype(np.int64)
        buckets[rank] = None
        alive = S.take(at) == left
        alive &= S.take(at + lengths[left]) == right
        at = at[alive]
        if left == right:
            at = without_overlaps(np.sort(at), lengths[left])
        if len(at):
            write(S, at, new, lengths[left], lengths[right])
            live[at + lengths[left]] = False
            if new in left_of:
                neighbours = S.take(at - 1)
                _fill(buckets, table, left_of[new], neighbours, at - lengths[neighbours], small)
            if new in right_of:
                _fill(buckets, table, right_of[new], S.take(at + lengths[new]), at, small)
    return S


def _plan(byte_ids, merges, size):
    """Lengths of the tokens; an empty bucket per merge; for each token the merges it takes part in as the younger of the two (with an
    older one on its left; with one as old or older on its right): {token: ([neighbours], [ranks])}; {pair of bytes: rank}."""
    lengths = np.ones(size + 2, np.int64)
    age = {token: -1 for token in byte_ids}
    byte_of = {token: byte for byte, token in enumerate(byte_ids)}
    left_of, right_of, first = {}, {}, {}
    for rank, (left, right, new) in enumerate(merges):
        lengths[new] = lengths[left] + lengths[right]
        age[new] = rank
        if age[left] < 0 and age[right] < 0:
            first[byte_of[left] << 8 | byte_of[right]] = rank
        else:
            place, young, old = (left_of, right, left) if age[right] > age[left] else (right_of, left, right)
            neighbours, ranks = place.setdefault(young, ([], []))
            neighbours.append(old)
            ranks.append(rank)
    return lengths, [[] for _ in merges], left_of, right_of, first


def _fill(buckets, table, merges, neighbours, starts, small):
    """Put the positions whose neighbour has a merge with the new token into the buckets of these merges."""
    partners, ranks = merges
    table[partners] = ranks
    found = table[neighbours]
    table[partners] = -1
    hits = (found >= 0).nonzero()[0]
    if len(hits):
        found = found.take(hits)
        order = found.astype(np.uint16 if len(buckets) < 1 << 16 else np.int64).argsort(kind="stable")
        found, starts = found.take(order), starts.take(hits.take(order)).astype(small)
        bounds = [0, *((found[1:] != found[:-1]).nonzero()[0] + 1).tolist(), len(found)]
        for begin, end in zip(bounds, bounds[1:]):
            buckets[found[begin]].append(starts[begin:end])
