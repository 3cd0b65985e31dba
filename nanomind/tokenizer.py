"""Text to token ids and back, and chats to ids with their loss mask: everything that touches a trained tokenizer.
In: a folder with tokenizer.json (made by bpe.py, or that of another byte-level BPE model). Out: ids that are equal to those of
Hugging Face `tokenizers` for every text, and text again, byte for byte.
Next: bpe.py
"""

import codecs
import hashlib
import json
import os
from pathlib import Path

import regex

from nanomind import tokenizer_json
from nanomind.word_encoder import WordEncoder

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 0, 1, 2
ROLES = ("system", "user", "assistant")
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('role must be system, user or assistant') }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")


class Tokenizer:
    """A byte-level BPE tokenizer.

    vocab_size    largest id + 1
    special       {text: id} of the control tokens; end_of_text, im_start, im_end: the id or None
    begin         the id that opens a text (ours: that of <|endoftext|>), None where a model wants none
    token_bytes   for every id the bytes it stands for, b"" for a control token
    merges        [(left id, right id, new id)] in order; byte_ids: the ids of the bytes 0..255
    hash          changes when an encoding could change, not with the formatting of the file
    """

    def __init__(self, spec, config=None):
        self.spec, self.config = spec, config or {}
        self.vocab, merges, ignore_merges = tokenizer_json.read_model(spec)
        self.split, self.known_pattern = tokenizer_json.read_splitter(spec)
        self.normalize = tokenizer_json.read_normalizer(spec)
        self.added = tokenizer_json.read_added(spec)
        self.special = {text: i for text, i, special, _ in self.added if special}
        self.vocab_size = max([*self.vocab.values(), *(i for _, i, _, _ in self.added)]) + 1
        self._read_tokens(merges)
        self._matchers = [self._matcher(normalized) for normalized in (False, True)]
        self.encode_word = WordEncoder(self.byte_ids, self.merges, self.token_bytes, ignore_merges)
        self._corpus_encoder = None
        begin, end = (token.get("content") if isinstance(token, dict) else token
                      for token in (self.config.get("bos_token"), self.config.get("eos_token")))
        self.end_of_text = self.special.get(SPECIALS[0], self.special.get(end))
        self.begin = self.special.get(begin)
        self.im_start, self.im_end = (self.special.get(text) for text in SPECIALS[1:])

    def _read_tokens(self, merges):
        """From the printable tokens of the file to bytes, and from pairs of tokens to pairs of ids."""
        byte_of = {char: byte for byte, char in enumerate(tokenizer_json.byte_chars())}
        added = {i: b"" if special else text.encode() for text, i, special, _ in self.added}
        self.token_bytes = [b""] * self.vocab_size
        for token, i in self.vocab.items():
            if i not in added:
                try:
                    self.token_bytes[i] = bytes([byte_of[char] for char in token])
                except KeyError:
                    raise ValueError(f"tokenizer.json: token {i} is {token!r}, expected byte-level characters only") from None
        for i, text in added.items():
            self.token_bytes[i] = text
        self.byte_ids = [self.vocab[char] for char in tokenizer_json.byte_chars()]
        self.merges = [(self.vocab[left], self.vocab[right], self.vocab[left + right]) for left, right in merges]

    def _matcher(self, normalized):
        """(pattern that finds the longest added token, {its text: (id, is special)})."""
        found = {self.normalize(text) if normalized else text: (i, special) for text, i, special, n in self.added if n == normalized}
        return regex.compile("|".join(map(regex.escape, sorted(found, key=len, reverse=True)))), found

    # ---- files

    @classmethod
    def load(cls, path):
        """Read a folder (tokenizer.json and, if there, tokenizer_config.json), or the path of a tokenizer.json."""
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise FileNotFoundError(f"{file} not found: expected a tokenizer made by `python bpe.py train FILES --out {path}`")
        config = file.with_name("tokenizer_config.json")
        try:
            return cls(_read_json(file), _read_json(config) if config.is_file() else None)
        except ValueError as problem:
            raise ValueError(f"{file.parent}/{problem}" if str(problem).startswith("tokenizer.json") else problem) from None
        except (KeyError, TypeError, AttributeError, IndexError, regex.error) as problem:
            raise ValueError(f"{file}: not built like a tokenizer.json ({type(problem).__name__}: {problem})") from None

    def save(self, folder):
        """Write tokenizer.json (as `tokenizers` would, to the byte) and tokenizer_config.json; each appears whole or not at all."""
        write_whole(Path(folder) / "tokenizer_config.json", json.dumps(self.config, ensure_ascii=False, indent=2) + "\n")
        write_whole(Path(folder) / "tokenizer.json", json.dumps(self.spec, ensure_ascii=False, indent=2))  # last: it makes the folder one

    @property
    def hash(self):
        names = ("normalizer", "pre_tokenizer", "added_tokens")
        content = [[self.spec.get(name) for name in names], sorted(self.vocab.items()), self.merges, self.encode_word.ignore_merges]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    # ---- text -> ids

    def encode(self, text, specials=False):
        """Ids of a text. specials=False: `<|im_end|>` in the text is ordinary text (what a user types never becomes a control
        token); specials=True: it becomes the control token. (Added tokens that are no control tokens, which only other models'
        files have, are found in both cases, as in `tokenizers`.)"""
        ids = []
        for piece, token in self._cut(text, specials):
            if token is not None:
                ids.append(token)
            else:
                for word in self.split(piece):
                    ids += self.encode_word(word)
        return ids

    def encode_many(self, texts):
        """A corpus: (ids of all texts in a row as uint16 or uint32, index of each text's first id as int64). Ids as encode()."""
        import numpy as np
        from nanomind.replay import CorpusEncoder
        self._corpus_encoder = self._corpus_encoder or CorpusEncoder(self)
        rows = {}  # texts with added tokens that are always found (other models have some) are rare: one by one
        for number, text in enumerate(texts) if len(self.special) < len(self.added) else ():
            if any(token is not None for _, token in self._cut(text, specials=False)):
                rows[number] = self.encode(text)
        ids, starts = self._corpus_encoder.encode(["" if number in rows else text for number, text in enumerate(texts)])
        for number in sorted(rows, reverse=True):
            ids = np.insert(ids, starts[number], np.array(rows[number], ids.dtype))
            starts[number + 1:] += len(rows[number])
        return ids, starts

    def _cut(self, text, specials):
        """Yield (piece, None) and (text of an added token, its id). Tokens marked `normalized` are looked for after the
        normalizer, the others before it."""
        for piece, token in self._cut_with(self._matchers[0], text, specials):
            if token is not None:
                yield piece, token
            else:
                yield from self._cut_with(self._matchers[1], self.normalize(piece), specials)

    def _cut_with(self, matcher, text, specials):
        pattern, found = matcher
        done = 0
        for match in pattern.finditer(text) if found else ():
            token, special = found[match.group()]
            if specials or not special:
                if match.start() > done:
                    yield text[done:match.start()], None
                yield match.group(), token
                done = match.end()
        if done < len(text):
            yield text[done:], None

    # ---- ids -> text

    def decode_bytes(self, ids, specials=True):
        """The bytes of the ids; control tokens show as their text, or are left out."""
        shown = {i: text.encode() for text, i in self.special.items()} if specials else {}
        try:
            return b"".join([shown.get(int(i)) or self.token_bytes[int(i)] for i in ids])
        except IndexError:
            raise ValueError(f"token id {max(ids)} does not exist: the vocabulary ends at {self.vocab_size - 1}") from None

    def decode(self, ids, specials=True):
        return self.decode_bytes(ids, specials).decode("utf-8", "replace")

    def stream(self, specials=True):
        """An object with push(id) -> text and end() -> text for showing text while it is made: never half a character."""
        return Stream(self, specials)

    # ---- chats

    def render_chat(self, messages):
        """Ids and loss mask of a conversation: per turn `<|im_start|>role\\ncontent<|im_end|>\\n`.

        The mask is 1 on what the model has to say: assistant content and its `<|im_end|>`. Content is never changed, and encoded
        on its own with specials off; no text can end its turn or change the mask. Content may also be a list of texts and None, the place
        of an image: one `<|endoftext|>`, which no text can be."""
        ids, mask = [], []
        for number, message in enumerate(messages):
            role, content = _check(message, number)
            head, body = self._turn(role), self._content(content) + [self.im_end]
            tail = self.encode("\n")
            ids += head + body + tail
            mask += [0] * len(head) + [int(role == "assistant")] * len(body) + [0] * len(tail)
        return ids, mask

    def _content(self, content):
        if isinstance(content, str):
            return self.encode(content)
        return [i for part in content for i in ([self.end_of_text] if part is None else self.encode(part))]

    def render_prompt(self, messages):
        """Ids of a conversation that waits for the answer: ends with `<|im_start|>assistant\\n`."""
        return self.render_chat(messages)[0] + self._turn("assistant")

    def _turn(self, role):
        if self.im_start is None or self.im_end is None:
            raise ValueError("this tokenizer has no <|im_start|> and <|im_end|>: it cannot render chats")
        return [self.im_start, *self.encode(role + "\n")]


class Stream:
    """Decodes ids one at a time; the bytes of an unfinished character are kept for the next push."""

    def __init__(self, tokenizer, specials):
        self.tokenizer, self.specials = tokenizer, specials
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token):
        return self.decoder.decode(self.tokenizer.decode_bytes([token], self.specials))

    def end(self):
        return self.decoder.decode(b"", final=True)


def new(merges, specials=SPECIALS, pattern="gpt2"):
    """A tokenizer from merges: list of (left, right) byte strings in order."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": SPECIALS[0], "eos_token": SPECIALS[2],
              "pad_token": SPECIALS[0], "unk_token": None, "clean_up_tokenization_spaces": False,
              "added_tokens_decoder": {str(i): {"content": text, **flags} for i, text in enumerate(specials)},
              "chat_template": CHAT_TEMPLATE}
    return Tokenizer(tokenizer_json.build(merges, specials, pattern), config)


def write_whole(path, text):
    """Write a file beside its place, then rename: after a crash there is the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(beside, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _read_json(file):
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as problem:
        raise ValueError(f"{file}: not JSON ({problem})") from None


def _check(message, number):
    content = message.get("content") if isinstance(message, dict) else None
    parts = isinstance(content, list) and message.get("role") == "user" and all(part is None or isinstance(part, str) for part in content)
    if not isinstance(content, str) and not parts:
        raise ValueError(f"message {number} is {str(message)[:80]!r}, expected {{'role': ..., 'content': text}}")
    if message.get("role") not in ROLES:
        raise ValueError(f"message {number} has role {message.get('role')!r}, expected one of {', '.join(ROLES)}")
    return message["role"], content
