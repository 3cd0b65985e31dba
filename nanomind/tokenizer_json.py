"""The file format: builds a `tokenizer.json` of our own, and reads the parts of anybody's that byte-level BPE needs.
In: the JSON object of Hugging Face `tokenizers` (GPT-2, Qwen, Llama-3 and relatives). Out: a vocabulary over bytes, the merges in
order, the added tokens and a function that cuts text into pre-tokens; an unsupported part is refused by name, never ignored.
Next: nanomind/pretokenize.py
"""

import re
import unicodedata

import regex

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT4 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+")

# Characters that are unassigned in Unicode 16 (the tables of `tokenizers` and tiktoken) but known to newer `regex` modules. To cut
# exactly where the others cut they are treated as what they are there: unassigned. Hexadecimal first-last pairs.
NEWER_THAN_UNICODE_16 = """558-558 58b-58c 5c8-5c9 88f-88f b53-b54 c5c-c5c cdc-cdc 1acf-1af0 208f-208f 209d-209f 20c1-20c4
2b96-2b96 2e60-2e63 a7ce-a7cf a7d2-a7d2 a7d4-a7d4 a7dd-a7dd a7e2-a7e2 a7f1-a7f1 ab6c-ab6d fbc3-fbd2 fd90-fd91 fdc8-fdce
107bb-107bf 10940-10959 10ec5-10ec7 10ec9-10eee 10ef0-10efb 11b0a-11b0a 11b60-11b67 11db0-11ddb 11de0-11de9 11df0-11df1
1246f-1246f 12475-1247f 12550-12686 16ea0-16eb8 16ebb-16ed3 16ff2-16ff6 187f8-187ff 18cd6-18cda 18d09-18d20 18d80-18df2
18e00-19191 191a0-191d2 1b123-1b128 1b168-1b168 1ccfa-1ccfc 1ceba-1ced0 1ced2-1ced4 1cedd-1cefd 1d127-1d128 1d1eb-1d1ff
1d250-1d281 1d6a6-1d6a6 1db00-1db1c 1df1f-1df24 1df2b-1df81 1df90-1df96 1dfcd-1dfff 1e6c0-1e6de 1e6e0-1e6f5 1e6fe-1e6ff
1f1ae-1f1ae 1f6d8-1f6d9 1f777-1f77a 1f7da-1f7db 1f7f1-1f7ff 1f8d0-1f8d8 1fa54-1fa57 1fa8a-1fa8e 1fac8-1fac8 1facc-1facd
1fadd-1fadd 1faea-1faeb 1faef-1faef 1faf9-1fafa 1fbfa-1fbfa 2b73a-2b73f 2b81e-2b81e 2cea2-2cead 323b0-33479 3d000-3fc3f"""
UNASSIGNED = "\uffff"  # a character that no Unicode version will ever assign stands in for those above

# What a Split pattern may consist of: the constructs that Oniguruma (in `tokenizers`) and `regex` (here) understand alike.
ESCAPES = r"\\[pP]\{\^?[A-Za-z_]+\}|\\[sSrntd]|\\[^A-Za-z0-9]|\\u[0-9a-fA-F]{4}"
KNOWN_CONSTRUCTS = re.compile(
    ESCAPES + r"|\(\?i:|\(\?:|\(\?[!=]|\(\?<[!=]|[()|]|[?*+]\+?|\{\d+(?:,\d*)?\}(?![+?])|"
    r"\[\^?(?:" + ESCAPES + r"|&(?!&)|[^\]\\\[&])+\]|[^\\\[\](){}|?*+^$.]")


def byte_chars():
    """The 256 printable characters that stand for the bytes 0..255 in the file (GPT-2's table; e.g. a space is 'Ġ')."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return "".join(chr(byte if byte in printable else next(others)) for byte in range(256))


def build(merges, specials, pattern="gpt2"):
    """The JSON object of a new tokenizer. `merges`: list of (left, right) byte strings. Same key order and values as `tokenizers`
    saves, so the file is the same to the byte: ids are specials, then the bytes sorted by their printable character, then merges."""
    chars = byte_chars()
    show = {bytes([byte]): chars[byte] for byte in range(256)}
    vocab = {token: i for i, token in enumerate([*specials, *sorted(chars)])}
    pairs = []
    for left, right in merges:
        show[left + right] = show[left] + show[right]
        vocab[show[left + right]] = len(vocab)
        pairs.append([show[left], show[right]])
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    bytelevel = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": pattern == "gpt2"}
    split = {"type": "Split", "pattern": {"Regex": GPT4}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": i, "content": text, **flags} for i, text in enumerate(specials)],
        "normalizer": None,
        "pre_tokenizer": bytelevel if pattern == "gpt2" else {"type": "Sequence", "pretokenizers": [split, bytelevel]},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": vocab, "merges": pairs}}


def refuse(part, found, supported):
    raise ValueError(f"tokenizer.json: {part} {found!r} is not supported (supported: {supported})")


def read_model(spec):
    """Check the model part and return (vocab as {printable token: id}, merges as [(left, right)] printable, ignore_merges)."""
    model = spec.get("model") if isinstance(spec, dict) else None
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict):
        found = model.get("type", "without a vocab") if isinstance(model, dict) else "missing"
        refuse("model", found, "byte-level BPE, model type BPE with vocab and merges")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(option):
            refuse(f"model option {option}", model[option], "off")
    vocab = model["vocab"]
    missing = [char for char in byte_chars() if char not in vocab]
    if missing:
        refuse("vocabulary", f"without {len(missing)} of the 256 bytes", "byte-level BPE, which has them all")
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model.get("merges", [])]
    for number, merge in enumerate(merges):
        if len(merge) != 2 or any(token not in vocab for token in (*merge, merge[0] + merge[-1])):
            raise ValueError(f"tokenizer.json: merge {number} is {merge!r}, expected two tokens whose join is in the vocabulary")
    if (spec.get("decoder") or {"type": "missing"})["type"] != "ByteLevel":
        refuse("decoder", (spec.get("decoder") or {"type": "missing"})["type"], "ByteLevel")
    return vocab, merges, bool(model.get("ignore_merges"))


def read_added(spec):
    """The added tokens: list of (content, id, special, normalized)."""
    tokens = spec.get("added_tokens") or []
    for token in tokens:
        for flag in ("single_word", "lstrip", "rstrip"):
            if token.get(flag):
                refuse(f"added token {token['content']} with {flag}", True, "false")
    return [(token["content"], token["id"], bool(token["special"]), bool(token.get("normalized"))) for token in tokens]


def read_normalizer(spec):
    """A function text -> text."""
    normalizer = spec.get("normalizer")
    parts = normalizer.get("normalizers", [normalizer]) if normalizer else []
    for part in parts:
        if part["type"] != "NFC":
            refuse("normalizer", part["type"], "none, NFC")
    return (lambda text: unicodedata.normalize("NFC", text)) if parts else (lambda text: text)


def read_splitter(spec):
    """Returns (split, name): a function text -> list of pre-tokens and "gpt2" or "gpt4" when the fast numpy version of
    pretokenize.py cuts the same way, else None."""
    pre = spec.get("pre_tokenizer") or {"type": "missing"}
    parts = pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
    steps = []
    for part in parts:
        steps += _steps(part)
    if not any(part["type"] == "ByteLevel" for part in parts):
        refuse("pre_tokenizer", pre["type"], "ByteLevel, or a Sequence with it")
    known = {(GPT2,): "gpt2", (GPT4,): "gpt4"}.get(tuple(getattr(step, "pattern", step) for step in steps))
    newer = newer_characters()

    def split(text):
        pieces = [text] if text else []
        for step in steps:
            if step == "prefix space":
                pieces = [piece if piece.startswith(" ") else " " + piece for piece in pieces]
            else:
                pieces = [part for piece in pieces for part in _isolate(step, piece, newer)]
        return pieces

    return split, known


def newer_characters():
    ranges = [[chr(int(end, 16)) for end in pair.split("-")] for pair in NEWER_THAN_UNICODE_16.split()]
    return regex.compile("[" + "".join(f"{first}-{last}" for first, last in ranges) + "]")


def character_classes(chars):
    """The class of each character as the patterns see it: 1 other, 2 letter, 3 number, 4 blank, 5 space, 6 newline."""
    newer, classes = newer_characters(), regex.compile(r"(?:([\r\n])|( )|(\s)|(\p{N})|(\p{L}))?")
    return [1 if newer.match(char) else 7 - (classes.match(char).lastindex or 6) for char in chars]


def _steps(part):
    """One pre-tokenizer of the file as a list of steps: a compiled pattern to isolate, or "prefix space"."""
    kind = part["type"]
    if kind == "ByteLevel":
        prefix = ["prefix space"] if part.get("add_prefix_space") else []
        return prefix + ([regex.compile(GPT2)] if part.get("use_regex", True) else [])
    if kind == "Digits":
        return [regex.compile(r"\p{N}" if part.get("individual_digits") else r"\p{N}+")]
    if kind == "Split":
        pattern = part["pattern"]
        if part["behavior"] != "Isolated" or part.get("invert"):
            refuse("Split behavior", part["behavior"] + " inverted" * bool(part.get("invert")), "Isolated, not inverted")
        if "String" in pattern:
            return [regex.compile(regex.escape(pattern["String"]))]
        end = 0
        while known := KNOWN_CONSTRUCTS.match(pattern["Regex"], end):
            end = known.end()
        if end < len(pattern["Regex"]):
            refuse("the Split pattern from", pattern["Regex"][end:end + 20], r"\p{..} \s \r \n \t \d, sets, groups, look-arounds, quantifiers")
        return [regex.compile(pattern["Regex"])]
    return refuse("pre_tokenizer", kind, "ByteLevel, Split, Digits, Sequence of these")


def _isolate(pattern, text, newer):
    """Cut a text at the matches of `pattern`; what lies between two matches is a piece too."""
    masked = text if text.isascii() else newer.sub(UNASSIGNED, text)
    pieces, done = [], 0
    for match in pattern.finditer(masked):
        first, last = match.span()
        if first > done:
            pieces.append(text[done:first])
        if last > first:
            pieces.append(text[first:last])
        done = last
    if done < len(text):
        pieces.append(text[done:])
    return pieces
