"""Cuts a corpus into pre-tokens ("words") and counts the different ones, with numpy instead of a regular expression per text.
In: texts and the name of a pattern ("gpt2" or "gpt4"), or any function text -> pre-tokens. Out: `Cut`: the bytes, the word bounds and
a 64-bit hash per word; `WordTable`: every different word once, with how often it was seen.
Next: nanomind/merges.py

Both patterns are local: whether a word starts at a character depends on the classes (letter, number, blank ...) of its neighbours and
of the ends of the runs around it. So the starts of a million characters come from a few comparisons of whole arrays.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import regex

from nanomind.tokenizer_json import character_classes

END, OTHER, LETTER, NUMBER, BLANK, SPACE, NEWLINE = range(7)  # classes of characters; END stands after every text
CHUNK = 1_500_000  # characters cut at a time: large enough for numpy, small enough for the cache
LONG = 512  # bytes; longer words are hashed one by one
RARE = 16  # WordTable.thin() keeps all words seen at least so often
APOSTROPHE = 39


@dataclass
class Cut:
    """Texts, cut: word i is data[bounds[i]:bounds[i + 1]]; is_end[i] marks the separators that stand after each text."""
    data: np.ndarray    # uint8, UTF-8, one separator byte after each text
    bounds: np.ndarray  # int64, number of words + 1
    is_end: np.ndarray  # bool
    hashes: np.ndarray  # uint64


class Cutter:
    """cut(texts) -> Cut. `split` is only used where `pattern` is None: a pattern without a numpy version. `seams`: where to cut words, too."""

    def __init__(self, pattern, split=None, seams=None):
        self.pattern, self.split, self.seams = pattern, split, seams
        self.classes = np.full(0x110000, 255, np.uint8)  # 255: not looked up yet; a corpus uses few of them
        self.classes[0xD800:0xE000] = OTHER

    def cut(self, texts):
        if self.pattern is None:
            return self._cut_by_regex(texts)
        joined = "\n".join([*texts, ""])
        try:
            data = joined.encode()
        except UnicodeEncodeError:  # a lone surrogate is no text: '?', as in Tokenizer.encode
            return self.cut([text.encode("utf-8", "replace").decode() for text in texts])
        codes = np.frombuffer(joined.encode("utf-32-le"), np.uint32)
        classes = self._classify(codes)
        ends = np.cumsum(np.fromiter((len(text) + 1 for text in texts), np.int64, len(texts))) - 1
        classes[ends] = END
        starts = (gpt2_starts if self.pattern == "gpt2" else gpt4_starts)(codes, classes)
        if self.seams:
            starts |= self.seams(codes)
        starts = np.flatnonzero(starts)
        data = np.frombuffer(data, np.uint8)
        if len(data) == len(codes):
            bounds = np.append(starts, len(data))
        else:
            first_bytes = np.flatnonzero((data & 0xC0) != 0x80)  # where in the bytes each character starts
            bounds = np.append(first_bytes[starts], len(data))
        return Cut(data, bounds, classes[starts] == END, hash_words(data, bounds))

    def _cut_by_regex(self, texts):
        words = [word.encode("utf-8", "replace") for text in texts for word in (*self.split(text), "\0")]
        lengths = np.fromiter(map(len, words), np.int64, len(words))
        counts = np.fromiter((len(self.split(text)) for text in texts), np.int64, len(texts))
        is_end = np.zeros(len(words), bool)
        is_end[np.cumsum(counts + 1) - 1] = True
        data = np.frombuffer(b"".join(words), np.uint8)
        bounds = np.concatenate([[0], np.cumsum(lengths)])
        return Cut(data, bounds, is_end, hash_words(data, bounds))

    def _classify(self, codes):
        classes = self.classes[codes]
        if (classes == 255).any():
            unseen = np.unique(codes[classes == 255])
            self.classes[unseen] = character_classes(map(chr, unseen.tolist()))
            classes = self.classes[codes]
        return classes


def batches(texts, size=CHUNK, whole=False):
    """Texts -> lists of texts of about `size` characters. Where a letter is followed by something else both patterns end a word, so a
    longer text may be cut there without changing its words (unless `whole`)."""
    batch, n = [], 0
    for text in texts:
        while len(text) > 2 * size and not whole:
            end = regex.compile(r"\p{L}(?!\p{L})").search(text, size)
            if end is None or end.end() == len(text):
                break
            yield [*batch, text[:end.end()]]
            batch, n, text = [], 0, text[end.end():]
        batch.append(text)
        n += len(text) + 1
        if n > size:
            yield batch
            batch, n = [], 0
    if batch:
        yield batch


def _run_starts(classes):
    """Where the kind of character changes (all blanks are one kind), and after each text."""
    kinds = np.minimum(classes, BLANK)
    starts = np.empty(len(kinds), bool)
    starts[:1] = True
    np.not_equal(kinds[1:], kinds[:-1], out=starts[1:])
    starts |= kinds == END
    return starts


def _before(mask):
    """mask[i - 1], and False for i = 0."""
    shifted = np.zeros_like(mask)
    shifted[1:] = mask[:-1]
    return shifted


def _split_last_blank(classes, starts, allowed):
    """`\\s+(?!\\S)`: a run of blanks gives its last one to the word behind it. `allowed`: which may be given."""
    text_follows = (classes[1:] != END) & (classes[1:] < BLANK)
    starts[:-1] |= allowed[:-1] & text_follows


def _contractions(codes, starts, lower):
    """`'s 't 'm 'd 're 've 'll`: where a word starts with an apostrophe and such letters, the next word starts after them."""
    at = np.flatnonzero((codes == APOSTROPHE) & starts)
    one, two = (np.where(at + i < len(codes), codes[np.minimum(at + i, len(codes) - 1)], 0) for i in (1, 2))
    if lower:  # ignore case; U+017F is a kind of s
        one, two = (np.where((c >= 65) & (c <= 90), c + 32, np.where(c == 0x17F, 115, c)) for c in (one, two))
    short = np.isin(one, [ord(c) for c in "stmd"])
    long = np.isin(one * 128 + two, [ord(a) * 128 + ord(b) for a, b in ("re", "ve", "ll")])
    starts[at[short | long] + 1] = False
    starts[at[short] + 2] = True
    starts[at[long] + 3] = True


def gpt2_starts(codes, classes):
    """Which characters start a word of `'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+`."""
    starts = _run_starts(classes)
    _split_last_blank(classes, starts, classes >= BLANK)
    visible = (classes != END) & (classes < BLANK)
    starts &= ~(_before(classes == SPACE) & visible)  # the space is the start of its word
    _contractions(codes, starts, lower=False)
    return starts


def gpt4_starts(codes, classes):
    """Which characters start a word of `(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}|
    ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+`."""
    starts = _run_starts(classes)
    newline, other, space = classes == NEWLINE, classes == OTHER, classes == SPACE
    blank = classes >= BLANK
    # Newlines right behind signs belong to the signs; else a run of blanks is cut behind its last newline.
    last = np.flatnonzero(newline[:-1] & ~newline[1:])
    first = np.flatnonzero(newline & ~_before(newline))
    signs = other[first - 1] & (first > 0)
    starts[first[signs]] = False
    starts[last[signs] + 1] = True
    run = np.searchsorted(np.flatnonzero(blank & ~_before(blank)), last, "right")
    starts[last[np.diff(run, append=-1) != 0] + 1] = True
    _split_last_blank(classes, starts, blank & ~newline)
    # One character that is no letter, number or newline joins the letters behind it; a space joins signs.
    single = other & ~_before(other | space)
    starts &= ~((classes == LETTER) & _before((blank & ~newline) | single))
    starts &= ~(other & _before(space))
    numbers = np.flatnonzero(classes == NUMBER)
    heads = numbers[starts[numbers]]
    starts[numbers] = (numbers - heads[np.searchsorted(heads, numbers, "right") - 1]) % 3 == 0
    _contractions(codes, starts, lower=True)
    return starts


def hash_words(data, bounds):
    """A 64-bit hash per word, eight bytes at a time. (28 million different words: one collision in 50,000 corpora.)"""
    padded = np.append(data, np.zeros(8, np.uint8))
    eight = np.ndarray((len(data) + 1,), np.uint64, padded, strides=(1,))  # the eight bytes from each byte on
    low_bytes = np.array([(1 << 8 * n) - 1 for n in range(9)], np.uint64)
    prime, at, left = np.uint64(0x9E3779B97F4A7C15), bounds[:-1], np.diff(bounds)
    hashes = left.astype(np.uint64) * prime
    long = np.flatnonzero(left > LONG)
    for i in long.tolist():
        digest = hashlib.blake2b(data[bounds[i]:bounds[i + 1]], digest_size=8).digest()
        hashes[i] = int.from_bytes(digest, "little")
    words = None if not len(long) else np.flatnonzero(left <= LONG)
    if words is not None:
        at, left = at[words], left[words]
    while len(at):
        mixed = eight[at] & low_bytes[np.minimum(left, 8)]
        mixed ^= hashes if words is None else hashes[words]
        mixed ^= mixed >> np.uint64(32)  # a product carries upwards only: without this a last byte that differs would hardly be mixed
        mixed *= prime
        mixed ^= mixed >> np.uint64(29)
        if words is None:
            hashes = mixed
        else:
            hashes[words] = mixed
        more = np.flatnonzero(left > 8)
        words = more if words is None else words[more]
        at, left = at[more] + 8, left[more] - 8
    return hashes


class WordTable:
    """All different words so far: an open hash table whose whole-array look-up adds what is new.

    counts[i], scales[i], lengths[i] and the bytes (in order of i, in `pieces`) belong to word i. The word occurred counts[i] times
    and stands for scales[i] words like it (1 unless thin() had to make room)."""

    def __init__(self):
        self.level = 0
        self.slots = np.full(1 << 16, -1, np.int32)  # word index per slot, -1 free
        self.hashes = np.empty(1 << 14, np.uint64)
        self.counts, self.scales = np.zeros(1 << 14, np.int64), np.zeros(1 << 14, np.int32)
        self.size = self.n_bytes = 0
        self.pieces, self.lengths = [], []

    def add(self, cut):
        """Count the words of a cut; returns the index of each word that is no separator."""
        words = np.flatnonzero(~cut.is_end)
        index, new = self._find(cut.hashes[words])
        lengths = np.diff(cut.bounds)
        kept = np.zeros(len(cut.is_end), bool)
        kept[words[new]] = True
        piece = cut.data[np.repeat(kept, lengths)]
        self.pieces.append(piece)
        self.lengths.append(lengths[kept].astype(np.int32))
        self.n_bytes += len(piece)
        np.add.at(self.counts, index, 1)
        return index

    def words(self):
        """(pieces, lengths, counts) for merges.lay_out(); the table is empty afterwards."""
        if self.level:
            self.thin(self.level)
        lengths, counts = np.concatenate([np.zeros(0, np.int32), *self.lengths]), self.counts[:self.size] * self.scales[:self.size]
        pieces = self.pieces
        self.__init__()
        return pieces, lengths, counts

    def take_new(self):
        """(pieces, lengths) of the words that are new since the last time; the table knows them, but keeps their bytes no longer."""
        new = self.pieces, np.concatenate([np.zeros(0, np.int32), *self.lengths])
        self.pieces, self.lengths = [], []
        return new

    def thin(self, level):
        """Make room: of the words seen less than RARE times keep those whose hash ends in `level` zero bits, and let each of them
        stand for 2 ** level: a fair sample of the rare words, and all the frequent ones."""
        self.level = level
        hashes, counts, scales = self.hashes[:self.size], self.counts[:self.size], self.scales[:self.size]
        rare = counts < RARE
        chosen = rare & (hashes & np.uint64((1 << level) - 1) == 0)
        scales[chosen] = 1 << level
        kept = ~rare | chosen
        lengths = np.concatenate(self.lengths)
        pieces, done = [], 0
        for piece, part in zip(self.pieces, self.lengths):
            pieces.append(piece[np.repeat(kept[done:done + len(part)], part)])
            done += len(part)
        self.pieces, self.lengths = [np.concatenate(pieces)], [lengths[kept]]
        self.size, self.n_bytes = int(kept.sum()), len(self.pieces[0])
        self.hashes, self.counts, self.scales = hashes[kept], counts[kept], scales[kept]
        self.slots = self.slots[:0]
        self._reserve(self.size)

    def _find(self, hashes):
        """Index of each hash, and which of them (ascending) were new. A free slot is claimed by writing: of several writers one
        stays, and the others, looking again, find their own hash there or go to the next slot."""
        base, n = self.size, len(hashes)
        self._reserve(base + n)
        self.hashes[base:base + n] = hashes  # for the time of this call, word i has index base + i
        index = np.empty(n, np.int32)
        claimed = np.empty(n, np.int64)
        todo, slot = np.arange(n), self._first_slot(hashes)
        while len(todo):
            found = self.slots[slot]
            free = np.flatnonzero(found < 0)
            if len(free):
                claimed[todo[free]] = slot[free]
                self.slots[slot[free]] = base + todo[free]
                found[free] = self.slots[slot[free]]
            same = self.hashes[found] == hashes[todo]
            index[todo[same]] = found[same]
            todo, slot = todo[~same], (slot[~same] + 1) & (len(self.slots) - 1)
        new = np.flatnonzero(index == np.arange(base, base + n))
        final = np.empty(n, np.int32)
        final[new] = np.arange(base, base + len(new))
        fresh = index >= base
        index[fresh] = final[index[fresh] - base]
        self.slots[claimed[new]] = final[new]
        self.hashes[base:base + len(new)] = hashes[new]
        self.scales[base:base + len(new)] = 1
        self.size += len(new)
        return index, new

    def _first_slot(self, hashes):
        return (hashes >> np.uint64(20)).astype(np.int64) & (len(self.slots) - 1)

    def _reserve(self, n):
        """Room for n words, and slots at most half full."""
        if n > len(self.hashes):
            for name in ("hashes", "counts", "scales"):
                old = getattr(self, name)
                grown = np.zeros(max(n, 3 * len(old) // 2), old.dtype)
                grown[:self.size] = old[:self.size]
                setattr(self, name, grown)
        if 2 * n > len(self.slots):
            self.slots = np.full(1 << (4 * n - 1).bit_length() - 1, -1, np.int32)
            todo = np.arange(self.size, dtype=np.int32)
            slot = self._first_slot(self.hashes[:self.size])
            while len(todo):
                free = self.slots[slot] < 0
                self.slots[slot[free]] = todo[free]
                lost = self.slots[slot] != todo
                todo, slot = todo[lost], (slot[lost] + 1) & (len(self.slots) - 1)
