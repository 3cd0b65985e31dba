"""Encodes one pre-token ("word") at a time, for prompts and servers: exact BPE without paying for BPE each time.
In: the ids of the bytes and the merges of a tokenizer; then words. Out: the ids of a word.
Next: nanomind/tokenizer.py
"""

import heapq

CACHE_SIZE = 50_000  # words and pairs remembered; a cache that reaches it is emptied
LONG_WORD = 256  # bytes; longer ones are not remembered


class WordEncoder:
    """encoder(word) -> list of ids. ignore_merges (Llama-3): a word that is a token is that token, however it would be merged."""

    def __init__(self, byte_ids, merges, token_bytes, ignore_merges=False):
        self.byte_ids, self.merges, self.token_bytes, self.ignore_merges = byte_ids, merges, token_bytes, ignore_merges
        self.rank = {(left, right): (rank, new) for rank, (left, right, new) in enumerate(merges)}
        self.no_rank = (len(merges), -1)
        made, self.in_order = set(byte_ids), len(self.rank) == len(merges)
        for left, right, new in merges:  # is each token made once, and of tokens made before? (Every trainer's are.)
            self.in_order = self.in_order and left in made and right in made and new not in made
            made.add(new)
        self.tokens = {token_bytes[i]: i for i in made}
        self.whole = {data: i for i, data in enumerate(token_bytes) if data} if ignore_merges else {}
        self.reach = {}  # first three bytes -> length of the longest token that starts with them
        for data in self.tokens:
            self.reach[data[:3]] = max(len(data), self.reach.get(data[:3], 0))
        self.words, self.pairs = {}, {}

    def __call__(self, word):
        ids = self.words.get(word)
        if ids is None:
            data = word.encode("utf-8", "replace")  # a lone surrogate is no text: '?'
            ids = self.encode_bytes(data)
            if len(self.words) >= CACHE_SIZE:
                self.words.clear()
            if len(data) < LONG_WORD:
                self.words[word] = ids
        return ids

    def encode_bytes(self, data):
        if data in self.whole:
            return [self.whole[data]]
        return self._fast(data) if self.in_order else self._scan(data)

    def _fast(self, data):
        """Longest match from the left, then a proof that it is the BPE encoding; else the scan.

        A sequence of tokens is THE encoding of its bytes if and only if every two neighbours are the encoding of theirs
        (github/rust-gems `bpe`, corollary III). Pairs repeat, so they are remembered."""
        ids, start = [], 0
        while start < len(data):
            for end in range(start + self.reach.get(data[start:start + 3], 2), start, -1):
                if data[start:end] in self.tokens:
                    break
            ids.append(self.tokens[data[start:end]])
            start += len(data[start:end])
        if len(ids) == 1:
            return ids if self._stable(ids[0], ids[0]) else self._scan(data)
        return ids if all(map(self._stable, ids, ids[1:])) else self._scan(data)

    def _stable(self, left, right):
        """Do these neighbours stay as they are when their bytes are encoded? (left, left): is it the encoding of itself?"""
        known = self.pairs.get((left, right))
        if known is None:
            ids = self._scan(self.token_bytes[left] + self.token_bytes[right])
            known = ids == [left, right]
            if len(self.pairs) >= CACHE_SIZE:
                self.pairs.clear()
            self.pairs[left, right] = known
        return known

    def _scan(self, data):
        """BPE itself: join the pair of lowest rank, the leftmost first, until no pair has a rank."""
        ids = [self.byte_ids[byte] for byte in data]
        if len(ids) > 64:
            return self._scan_long(ids)
        while True:
            best, place = self.no_rank, 0
            for i, pair in enumerate(zip(ids, ids[1:])):
                found = self.rank.get(pair)
                if found and found < best:
                    best, place = found, i
            if best is self.no_rank:
                return ids
            ids[place:place + 2] = [best[1]]

    def _scan_long(self, ids):
        """The same with a heap and a linked list: O(n log n), so a line of a megabyte without a blank is no problem."""
        after = list(range(1, len(ids) + 1))
        before = list(range(-1, len(ids) - 1))
        heap = []
        for i in range(len(ids) - 1):
            if (ids[i], ids[i + 1]) in self.rank:
                heap.append((self.rank[ids[i], ids[i + 1]][0], i))
        heapq.heapify(heap)
        while heap:
            rank, i = heapq.heappop(heap)
            left, right, new = self.merges[rank]
            j = after[i]
            if ids[i] != left or j >= len(ids) or ids[j] != right:
                continue  # one of the two has been joined to something else meanwhile
            ids[i], ids[j], after[i] = new, None, after[j]
            if after[j] < len(ids):
                before[after[j]] = i
            for a, b in ((before[i], i), (i, after[i])):
                if a >= 0 and b < len(ids) and (ids[a], ids[b]) in self.rank:
                    heapq.heappush(heap, (self.rank[ids[a], ids[b]][0], a))
        return [i for i in ids if i is not None]
