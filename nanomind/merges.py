"""Learns the merges of byte-level BPE: first the algorithm itself in two tiny functions, then the same result a thousand times faster.
In: the different words of a corpus and how often each occurs. Out: the merges, a list of (left, right) byte strings in order, equal to
those of Hugging Face `tokenizers` (ties included: of two pairs equally frequent the one with the smaller ids wins).
Next: replay.py
"""

import heapq

import numpy as np

from nanomind.tokenizer_json import byte_chars

SEPARATOR = 0xFF  # stands before every word; never occurs in UTF-8
BLOCK = 256  # bytes; all words in a block occur equally often, so one number per block tells how often
DEAD = -1


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


def index_pairs(flat, block_counts, threshold, tick=lambda n: None):
    """Positions of all pairs of bytes that occur at least `threshold` times: yields (count, left byte, right byte, positions).

    Counting sort in chunks that fit the cache: count per pair, then write each position to the next free place of its pair."""
    step = 1 << 19
    dtype = np.int32 if len(flat) < 1 << 31 else np.int64

    def chunks():
        for begin in range(0, len(flat) - BLOCK, step):
            part = flat[begin:min(begin + step, len(flat) - BLOCK) + 1].astype(np.uint16)
            yield begin, (part[:-1] << 8) | part[1:]
            tick(len(part) // 2)

    counts, numbers = np.zeros(1 << 16), np.zeros(1 << 16, np.int64)
    for begin, keys in chunks():
        blocks = block_counts[begin // BLOCK:(begin + len(keys)) // BLOCK]
        counts += np.bincount(keys, np.repeat(blocks, BLOCK), minlength=1 << 16)
        numbers += np.bincount(keys, minlength=1 << 16)
    pairs = np.arange(1 << 16)
    wanted = (counts >= threshold) & (pairs >> 8 != SEPARATOR) & (pairs & 255 != SEPARATOR)
    numbers[~wanted] = 0
    ends = np.cumsum(numbers)
    places = ends - numbers
    positions = np.empty(int(ends[-1]), dtype)
    for begin, keys in chunks():
        order = np.argsort(keys, kind="stable")  # 16-bit keys: a radix sort
        keys = keys[order]
        chosen = wanted[keys]
        keys, order = keys[chosen], order[chosen]
        found = np.bincount(keys, minlength=1 << 16)
        positions[(places - np.cumsum(found) + found)[keys] + np.arange(len(keys))] = order + begin
        places += found
    for pair in np.flatnonzero(wanted).tolist():
        yield int(counts[pair]), pair >> 8, pair & 255, positions[ends[pair] - numbers[pair]:ends[pair]]


def train(flat, block_counts, n_merges, min_frequency=0, progress=None):
    """The merges, as train_reference() gives them. progress(phase, total): a bar with update(n), see bpe.py."""
    bar = progress or _NoBar
    least = max(1, min_frequency)
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
    ids = np.array([*byte_order()[:255], 0], kind)
    heap = []
    with bar("counting pairs", len(flat)) as counting:
        for count, left, right, at in index_pairs(flat, block_counts, threshold, counting.update):
            heap.append((-count, int(ids[left]), int(ids[right]), at))
    heapq.heapify(heap)
    S = ids[flat]
    lengths = np.zeros(size, np.int64)
    lengths[1:257] = 1
    pairs = []
    with bar("computing merges", n_merges) as merging:
        while heap and len(pairs) < n_merges:
            _, left, right, at = heapq.heappop(heap)
            alive = (S[at] == left) & (S[at + lengths[left].astype(at.dtype)] == right)
            if not alive.all():
                at = at[alive]
                count = int(block_counts[at // BLOCK].sum())
                if count < threshold:
                    continue
                if heap and (-count, left, right) > heap[0][:3]:
                    heapq.heappush(heap, (-count, left, right, at))
                    continue
            new = 257 + len(pairs)
            pairs.append((left, right))
            lengths[new] = lengths[left] + lengths[right]
            if left == right:
                at = _without_overlaps(at, int(lengths[left]))
            for count, a, b, where in _merge_everywhere(S, block_counts, lengths, at, left, new, threshold):
                heapq.heappush(heap, (-count, a, b, where))
            merging.update(1)
    return pairs


def _without_overlaps(at, length):
    """Positions of a pair (x, x) overlap in x x x: in each run of them every second one counts, from the left."""
    i = np.arange(len(at))
    first = np.ones(len(at), bool)
    first[1:] = at[1:] != at[:-1] + length
    return at[(i - np.maximum.accumulate(np.where(first, i, 0))) % 2 == 0]


def _merge_everywhere(S, block_counts, lengths, at, left, new, threshold):
    """Write the token `new` at all its positions; return the pairs it forms with its neighbours: [(count, a, b, positions)]."""
    size, n_left, n_new = len(lengths), int(lengths[left]), int(lengths[new])
    S[at + n_left] = DEAD
    S[at] = new
    S[at + (n_new - 1)] = new
    keys = np.concatenate([S[at - 1], S[at + n_new]]).astype(np.uint16 if 2 * size < 1 << 16 else np.int32)
    keys[len(at):] += size  # neighbours on the right
    weights = block_counts[at // BLOCK]
    counts = np.bincount(keys, np.concatenate([weights, weights]), minlength=2 * size)
    counts[[0, size, size + new]] = 0  # separators; (new, new) is already seen from its right half
    frequent = np.flatnonzero(counts >= threshold)
    if not len(frequent):
        return []
    chosen = np.flatnonzero((counts >= threshold)[keys])
    keys = keys[chosen]
    order = np.argsort(keys, kind="stable")  # 16-bit keys: a radix sort
    keys, chosen = keys[order], chosen[order]
    on_left = chosen < len(at)
    where = at[np.where(on_left, chosen, chosen - len(at))]
    where -= np.where(on_left, lengths[np.where(on_left, keys, 0)], 0).astype(where.dtype)
    bounds = np.searchsorted(keys, frequent).tolist() + [len(keys)]
    frequent = frequent.tolist()
    return [(int(counts[key]), key if key < size else new, new if key < size else key - size, where[bounds[i]:bounds[i + 1]])
            for i, key in enumerate(frequent)]


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
