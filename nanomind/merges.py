"""Learns the merges of byte-level BPE: first the algorithm itself in two tiny functions, then the same result a thousand times faster.
In: the different words of a corpus and how often each occurs. Out: the merges, a list of (left, right) byte strings in order, equal to
those of Hugging Face `tokenizers` (ties included: of two pairs equally frequent the one with the smaller ids wins).
Next: nanomind/replay.py
"""

import heapq

import numpy as np

from nanomind.tokenizer_json import byte_chars

SEPARATOR = 0xFF  # stands before every word; never occurs in UTF-8
BLOCK = 256  # bytes; all words in a block occur equally often, so one number per block tells how often
DEAD = -1
DENSE = 512  # so many of the oldest tokens have a table of the counts of their pairs


# ---- the algorithm


def count_pairs(words):
    """How often does each pair of neighbouring tokens occur? words: {tuple of ids: count}."""
    counts = {}
    for word, count in words.items():
        for pair in zip(word, word[1:]):
            counts[pair] = counts.get(pair, 0) + count
    return counts


def merge(word, pair, new):
    """Replace each occurrence of `pair` in a word by the token `new`, from the left: (1, 1, 1) and (1, 1) -> (new, 1)."""
    out, i = [], 0
    while i < len(word):
        match = word[i:i + 2] == pair
        out.append(new if match else word[i])
        i += 2 if match else 1
    return tuple(out)


def train_reference(words, n_merges, min_frequency=0):
    """Byte-pair encoding as it is defined: count all pairs, merge the most frequent one, start again. words: {bytes: count}."""
    order = byte_order()
    tokens = {i: bytes([byte]) for byte, i in enumerate(order)}
    words = {tuple(order[byte] for byte in word): count for word, count in words.items()}
    merges = []
    while len(merges) < n_merges:
        counts = count_pairs(words)
        pair = min(counts, key=lambda pair: (-counts[pair], pair), default=None)
        if pair is None or counts[pair] < max(1, min_frequency):
            break
        new = len(tokens) + 1
        tokens[new] = tokens[pair[0]] + tokens[pair[1]]
        merges.append((tokens[pair[0]], tokens[pair[1]]))
        words = {merge(word, pair, new): count for word, count in words.items()}
    return merges


def byte_order():
    """Id of each byte here: 1..256 in the order of the printable characters that stand for them. 0 is the separator."""
    chars = byte_chars()
    rank = {char: i for i, char in enumerate(sorted(chars), 1)}
    return [rank[char] for char in chars]


# ---- the same, fast
#
# All words lie in one flat array, and `S` holds at the first and at the last byte of every token its id. So the token right of the one
# at p starts at p + its length, and the token left of it is S[p - 1]: neighbours need no lists. For each pair we keep the positions
# where it was once seen. Three facts (proofs: Lemma 1 by following any text between two token boundaries; the others follow):
#
#   1. No token is made twice. So a pair gets all its positions in the one step that makes the younger of its two tokens, and from then
#      on its count only falls.
#   2. So a count in the heap is never too small. The top of the heap is counted anew; if it still beats the next one, it is the most
#      frequent pair of all, no matter how outdated the others are. (Python compares (-count, a, b): ties go to smaller ids.)
#      For pairs of two of the oldest DENSE tokens, whose lists are long, a table is kept up to date as merges take occurrences away
#      (all but those lost between two new tokens side by side, so it is never too small either), and saves counting anew.
#   3. A pair rarer than `threshold` can be forgotten for good as long as every merge made is at least that frequent.


def lay_out(pieces, lengths, counts):
    """Words -> (flat, block_counts): each word behind a separator, the most frequent words first, and where the count changes a new
    block of BLOCK bytes starts, so that the count of the word at p is block_counts[p // BLOCK].

    pieces: list of uint8 arrays, the words one after the other (emptied on the way: memory); lengths, counts: arrays, one per word."""
    order = np.argsort(-counts, kind="stable")
    sizes, sorted_counts = lengths[order].astype(np.int64) + 1, counts[order]
    first = np.flatnonzero(np.diff(sorted_counts, prepend=-1))  # words where the count changes
    group_blocks = -(-np.add.reduceat(sizes, first) // BLOCK) if len(first) else np.zeros(0, np.int64)
    block_counts = np.repeat(sorted_counts[first], group_blocks).astype(np.float64)
    ends = np.cumsum(sizes)
    group = np.repeat(np.cumsum(group_blocks) * BLOCK - group_blocks * BLOCK - (ends - sizes)[first],
                      np.diff(first, append=len(sizes)))
    places = np.empty(len(sizes), np.int64)
    places[order] = ends - sizes + 1 + group
    flat = np.full(len(block_counts) * BLOCK + BLOCK, SEPARATOR, np.uint8)  # and a block of separators behind the last word
    done = 0
    ends = np.cumsum(lengths)
    while pieces:
        piece = pieces.pop(0)
        words = slice(done, int(np.searchsorted(ends, (ends[done - 1] if done else 0) + len(piece), "right")))
        done = words.stop
        if len(piece):
            begin = ends[words] - lengths[words]
            flat[np.arange(len(piece)) + np.repeat(places[words] - (begin - begin[0]), lengths[words])] = piece
    return flat, np.append(block_counts, 0.0)


def _byte_pairs(flat, tick=lambda n: None):
    """All pairs of neighbouring bytes as 16-bit numbers, in chunks that fit the cache: yields (position of the first, pairs)."""
    step = 1 << 19
    for begin in range(0, len(flat) - 1, step):
        part = flat[begin:begin + step + 1].astype(np.uint16)
        yield begin, (part[:-1] << 8) | part[1:]
        tick(len(part) - 1)


def count_byte_pairs(flat, block_counts=None, tick=lambda n: None):
    """How often each of the 65,536 pairs of bytes stands in `flat`, and (if block_counts is given) in the corpus; with a separator: 0."""
    numbers, counts = np.zeros(1 << 16, np.int64), np.zeros(1 << 16)
    for begin, pairs in _byte_pairs(flat, tick):
        found = np.bincount(pairs, minlength=1 << 16)
        numbers += found
        if block_counts is not None:
            blocks = block_counts[begin // BLOCK:-(-(begin + len(pairs)) // BLOCK)]
            same = blocks[0] == blocks[-1]  # they are sorted: all words in this chunk are equally frequent
            counts += found * blocks[0] if same else np.bincount(pairs, np.repeat(blocks, BLOCK)[:len(pairs)], minlength=1 << 16)
    for array in (numbers, counts):
        array[SEPARATOR << 8:] = array[SEPARATOR::256] = 0
    return numbers, counts


def group_positions(flat, numbers, tick=lambda n: None):
    """Positions of those pairs of bytes whose number is not 0: yields (left byte, right byte, ascending positions).

    Counting sort: write each position to the next free place of its pair."""
    wanted = numbers > 0
    ends = np.cumsum(numbers)
    places = ends - numbers
    positions = np.empty(int(ends[-1]), position_type(flat))
    for begin, pairs in _byte_pairs(flat, tick):
        chosen = wanted.take(pairs).nonzero()[0]
        pairs = pairs.take(chosen)
        order = pairs.argsort(kind="stable")  # 16-bit keys: a radix sort
        pairs = pairs.take(order)
        found = np.bincount(pairs, minlength=1 << 16)
        positions[(places - np.cumsum(found) + found).take(pairs) + np.arange(len(pairs))] = chosen.take(order) + begin
        places += found
    for pair in np.flatnonzero(numbers).tolist():
        yield pair >> 8, pair & 255, positions[ends[pair] - numbers[pair]:ends[pair]]


def position_type(flat):
    return np.int32 if len(flat) < 1 << 31 else np.int64


def train(flat, block_counts, n_merges, min_frequency=0, progress=None):
    """The merges, as train_reference() gives them. progress(phase, total): a bar with update(n), see bpe.py."""
    bar = progress or _NoBar
    least = max(1, min_frequency)
    n_merges = min(n_merges, int(np.count_nonzero(flat != SEPARATOR)))  # each merge joins at least two tokens: there cannot be more
    total = float(block_counts @ (flat != SEPARATOR).reshape(-1, BLOCK).sum(1))  # bytes of the corpus
    threshold = max(least, int(total / (100 * max(1, n_merges))))
    while True:
        pairs = _learn(flat, block_counts, n_merges, threshold, bar)
        if len(pairs) == n_merges or threshold == least:
            break
        threshold = max(least, threshold // 8)  # fact 3 did not hold: again, forgetting less
    order = byte_order()
    tokens = {i: bytes([byte]) for byte, i in enumerate(order)}
    merges = []
    for left, right in pairs:
        merges.append((tokens[left], tokens[right]))
        tokens[len(tokens) + 1] = tokens[left] + tokens[right]
    return merges


def _learn(flat, block_counts, n_merges, threshold, bar):
    """Pairs of ids in the order of merging; fewer than n_merges when none is left that occurs `threshold` times."""
    size = 257 + n_merges  # number of ids
    kind = np.int16 if size < 1 << 15 else np.int32
    small = position_type(flat)
    ids = np.array([*byte_order()[:255], 0], kind)
    heap = []
    with bar("counting pairs", 2 * len(flat)) as counting:
        numbers, counts = count_byte_pairs(flat, block_counts, counting.update)
        for left, right, at in group_positions(flat, np.where(counts >= threshold, numbers, 0), counting.update):
            heap.append((-int(counts[left << 8 | right]), int(ids[left]), int(ids[right]), at))
    heapq.heapify(heap)
    S = ids[flat]
    lengths = np.ones(size, np.int64)  # bytes of each token
    pairs = []
    dense = min(DENSE, size)
    exact = np.zeros((dense, dense))
    for count, left, right, _ in heap:
        exact[left, right] = -count
    # Counts fall like 1 / rank, so merge i takes about 1 / (i + 5) of the time: with this measure the bar's remaining time is true.
    percent = 100 / np.log((max(1, n_merges) + 5) / 5)
    with bar("computing merges", 100) as merging:
        while heap and len(pairs) < n_merges:
            count, left, right, at = heapq.heappop(heap)
            if left < dense and right < dense and exact[left, right] < -count:
                if exact[left, right] >= threshold:
                    heapq.heappush(heap, (-int(exact[left, right]), left, right, at))
                continue
            at = at.astype(np.int64)  # numpy looks up 64-bit positions fastest, but they are kept in 32 bits
            alive = S.take(at) == left
            alive &= S.take(at + lengths[left]) == right
            if np.count_nonzero(alive) < len(at):
                at = at[alive]
                count = int(block_counts.take(at // BLOCK).sum())
                if count < threshold:
                    continue
                if heap and (-count, left, right) > heap[0][:3]:
                    heapq.heappush(heap, (-count, left, right, at.astype(small)))
                    continue
            if left == right:
                at = without_overlaps(at, lengths[left])
            new = 257 + len(pairs)
            pairs.append((left, right))
            lengths[new] = lengths[left] + lengths[right]
            write(S, at, new, lengths[left], lengths[right])
            totals, found = _new_pairs(S, block_counts, lengths, at, new, threshold, small)
            if left < dense:
                exact[:, left] -= totals[:dense]
            if right < dense:
                exact[right] -= totals[size:size + dense]
            for count, a, b, where in found:
                if a < dense and b < dense:
                    exact[a, b] = count
                heapq.heappush(heap, (-count, a, b, where))
            merging.update(float(percent * np.log((len(pairs) + 5) / (len(pairs) + 4))))
    return pairs


def without_overlaps(at, length):
    """Positions of a pair (x, x) overlap in x x x: in each run of them every second one counts, from the left."""
    i = np.arange(len(at))
    first = np.ones(len(at), bool)
    first[1:] = at[1:] != at[:-1] + length
    return at[(i - np.maximum.accumulate(np.where(first, i, 0))) % 2 == 0]


def write(S, at, new, n_left, n_right):
    """Make the tokens at these positions and those behind them one token."""
    if n_right > 1:
        S[at + n_left] = DEAD
    S[at] = new
    S[at + (n_left + n_right - 1)] = new


def _new_pairs(S, block_counts, lengths, at, new, threshold, small):
    """The pairs that the token `new`, just written at all its positions, forms with its neighbours: [(count, a, b, positions)]."""
    n, size = len(at), len(lengths)
    keys = np.empty(2 * n, np.int64)  # the neighbour on the left; the neighbour on the right + size
    keys[:n] = S.take(at - 1)
    keys[n:] = S.take(at + lengths[new])
    keys[n:] += size
    weights = np.empty(2 * n)
    weights[:n] = weights[n:] = block_counts.take(at // BLOCK)
    counts = np.bincount(keys, weights, minlength=2 * size)
    counts[0] = counts[size] = 0  # separators
    counts[size + new] = 0  # (new, new) is seen from both of its halves: count it from the right one
    frequent = counts >= threshold
    kept = frequent.nonzero()[0]
    if not len(kept):
        return counts, []
    chosen = frequent.take(keys).nonzero()[0]
    starts = np.empty(2 * n, np.int64)
    starts[:n] = at - lengths.take(keys[:n])
    starts[n:] = at
    keys = keys.take(chosen).astype(np.uint16 if 2 * size < 1 << 16 else np.int32)
    order = keys.argsort(kind="stable")  # 16-bit keys: a radix sort
    starts = starts.take(chosen.take(order)).astype(small)
    bounds = [*keys.take(order).searchsorted(kept.astype(keys.dtype)).tolist(), len(keys)]
    return counts, [(int(count), key if key < size else new, new if key < size else key - size, starts[bounds[i]:bounds[i + 1]])
            for i, (key, count) in enumerate(zip(kept.tolist(), counts[kept].tolist()))]


class _NoBar:
    """Stands in where nobody watches."""

    def __init__(self, phase, total):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *problem):
        pass

    def update(self, n):
        pass
