"""Prepares conversations for fine-tuning: python -m data_prep.chat --input FILES --tokenizer DIR --out data/x
In: files in one of the chat formats of FORMATS; which one is found out per file. Out: a data folder in which every document is
<|endoftext|> and the rendered conversation, with mask 1 on what the assistant says and on its end token; or, of a file of running
text among them, <|endoftext|> and a piece of the text, all of it with mask 1: what pretraining taught is not forgotten over the conversations.
Next: data_prep/pairs.py
"""

import copy

from data_prep.common import command
from nanomind.cli import run
from nanomind.records import text_of

FORMATS = {  # name: (fields of a record, fields of each message in the first of them)
    "MiniMind": (("conversations",), ("role", "content")),
    "MiniMind with roles by order": (("conversations",), ("content",)),
    "ShareGPT": (("conversations",), ("from", "value")),
    "OpenAI": (("messages",), ("role", "content")),
    "Alpaca": (("instruction", "output"), ()),
}
TEXT = "running text"
PIECE = 255  # tokens of it in a document: one more begins the document, and most rows have 512
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


def items(reader):
    talks = False
    for where, record, name in recognised(reader, {**FORMATS, TEXT: (("text",), ())}):
        text = name == TEXT
        try:
            messages = [{"content": text_of(record)}] if text else checked(to_messages(record, name))
        except ValueError as problem:
            reader.reject(where, *problem.args)
        else:
            talks = talks or not text
            yield messages[0]["content"] if text else first_question(messages), messages, sum(len(message["content"]) for message in messages)
    if not talks:
        raise ValueError(f"{reader.files[0]}: only running text, which is for python -m data_prep.text and --stage pretrain; expected conversations too")


def encode(tokenizer, items):
    tokenizer = knowing(tokenizer, items)
    return joined(tokenizer, [document for messages in items for document in rendered(tokenizer, messages)])


def rendered(tokenizer, messages):
    """(ids, mask) of a conversation; of running text, all of whose tokens are targets, as many as it takes: a row holds documents whole."""
    if "role" in messages[0]:
        return [tokenizer.render_chat(messages)]
    ids = tokenizer.encode(messages[0]["content"])
    return [(ids[at:at + PIECE], [1] * len(ids[at:at + PIECE])) for at in range(0, len(ids), PIECE)]


def knowing(tokenizer, conversations):
    """The tokenizer, but it has encoded the contents of these conversations, and what stands around each, already: all at once is many times faster."""
    import numpy as np

    from nanomind.tokenizer import ROLES

    around = {"\n", *(f"{role}\n" for role in ROLES)}
    texts = list(around | {part for messages in conversations for message in messages
                           for part in ([message["content"]] if isinstance(message["content"], str) else message["content"]) if part is not None})
    ids, starts = tokenizer.encode_many(texts)
    known = {text: part.tolist() for text, part in zip(texts, np.split(ids, starts[1:]))}
    quick = copy.copy(tokenizer)
    quick.encode = lambda text: known[text] if text in known else tokenizer.encode(text)
    return quick


def recognised(reader, formats):
    """(where, record, name of the format); the first record that fits a format decides for its whole file, unless it has no turns: that fits several."""
    file = name = None
    for where, record in reader:
        if where.rpartition(":")[0] != file:
            file, name = where.rpartition(":")[0], None
        fitting = [each for each in [name] if each and fits(record, *formats[each])] or [each for each in formats if fits(record, *formats[each])]
        if name is None and fitting and record[formats[fitting[0]][0][0]] != []:
            name = fitting[0]
            print(f"{file}: {name} format")
        if fitting and name in (None, *fitting):
            yield where, record, name or fitting[0]
        else:
            expected = {name: formats[name]} if name else formats
            expected = "; ".join(f"{shape(dict.fromkeys(fields, [dict.fromkeys(inner)]))} ({each})" for each, (fields, inner) in expected.items())
            reader.reject(where, f"fields found: {shape(record) or 'none'}", f"; expected {expected}")


def fits(record, fields, of_message):
    """Are the fields there, and is the first a list of such messages? Roles go by order only where no message names its own."""
    if not all(field in record for field in fields):
        return False
    turns = record[fields[0]]
    return not of_message or isinstance(turns, list) and all(
        isinstance(turn, dict) and all(map(turn.__contains__, of_message)) and ("role" not in turn or of_message != ("content",)) for turn in turns)


def shape(record):
    """'id, conversations [from, value]'"""
    inner = {field: value[0] for field, value in record.items() if isinstance(value, list) and value and isinstance(value[0], dict)}
    return ", ".join(field + (f" [{', '.join(inner[field])}]" if inner.get(field) else "") for field in record)


def to_messages(record, name):
    """A record of any format as [{"role", "content"}]."""
    if name == "Alpaca":
        parts, history = [part for part in (record["instruction"], record.get("input")) if part], record.get("history") or []
        if not all(isinstance(part, str) for part in parts):
            raise ValueError("instruction or input is no text")
        if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
            raise ValueError("history is no list of [question, answer] pairs")
        texts = [text for pair in history for text in pair] + ["\n".join(parts), record["output"]]
    else:
        turns = record[FORMATS[name][0][0]]
        texts = [turn["value" if name == "ShareGPT" else "content"] for turn in turns]
    if name == "Alpaca" or name == "MiniMind with roles by order":
        roles = [("user", "assistant")[i % 2] for i in range(len(texts))]
    elif name == "ShareGPT":
        roles = [SHAREGPT_ROLES.get(str(turn["from"]), turn["from"]) for turn in turns]
    else:
        roles = [turn["role"] for turn in turns]
    if record.get("system"):
        roles, texts = ["system", *roles], [record["system"], *texts]
    return [{"role": role, "content": text} for role, text in zip(roles, texts)]


def checked(messages):
    """The messages, if they are [system] user assistant [user assistant ...] and all say something; else ValueError(reason, detail)."""
    roles = [message["role"] for message in messages]
    for message in messages:
        if message["role"] not in ("system", "user", "assistant"):
            raise ValueError("unknown role", f" {str(message['role'])[:40]!r}")
        if not isinstance(message["content"], str):
            raise ValueError("the content of a turn is no text", f" but {str(message['content'])[:40]}")
    if "assistant" not in roles:
        raise ValueError("no assistant turn")
    turns = roles[1:] if roles[0] == "system" else roles
    if any(role != ("user", "assistant")[i % 2] for i, role in enumerate(turns)):
        raise ValueError("roles out of order", f": {' '.join(roles)[:80]}")
    if turns[-1] != "assistant":
        raise ValueError("the last turn is not answered")
    for message in messages:
        if not message["content"].strip():
            raise ValueError("an empty answer" if message["role"] == "assistant" else f"an empty {message['role']} turn")
    return messages


def first_question(messages):
    """Conversations with the same first question are kept together in train or in val."""
    return next(message["content"] for message in messages if message["role"] == "user")


def joined(tokenizer, rendered):
    """(ids, mask) of each document -> <|endoftext|> before each, all in a row: ids, starts, mask."""
    import numpy as np

    lengths = [1 + len(ids) for ids, _ in rendered]
    starts = np.cumsum([0, *lengths[:-1]])
    dtype = np.uint16 if tokenizer.vocab_size <= 65_535 else np.uint32
    tokens, masks = np.zeros(sum(lengths), dtype), np.zeros(sum(lengths), np.uint8)
    for start, (ids, mask) in zip(starts, rendered):
        tokens[start] = tokenizer.end_of_text
        tokens[start + 1 : start + 1 + len(ids)], masks[start + 1 : start + 1 + len(ids)] = ids, mask
    return tokens, starts, masks


def main():
    command("chat", "Turn conversations (MiniMind, OpenAI, ShareGPT, Alpaca) into a data folder for fine-tuning and distillation.")


if __name__ == "__main__":
    run(main)
