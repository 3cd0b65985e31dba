"""Prepares conversations about pictures: python -m data_prep.images --input FILES --tokenizer DIR --out data/x
In: MiniMind-V's or LLaVA's .jsonl or .json files with the pictures they name, or MiniMind-V's .parquet files, which hold them. Out: a data folder
with the image files as they are and, in the documents, one <|endoftext|> id where a picture stands; mask as in data_prep.chat.
Next: data_prep/download.py
"""

import hashlib
from pathlib import Path

from data_prep.chat import checked, first_question, joined, knowing, recognised, to_messages
from data_prep.common import command
from nanomind.cli import run
from nanomind.images import find_image, open_image

MARKER = "<image>"
FORMATS = {  # both may lack `image`: a conversation about nothing to see
    "MiniMind-V": (("conversations",), ("role", "content")),
    "LLaVA": (("conversations",), ("from", "value")),
}
AS_CHAT = {"MiniMind-V": "MiniMind", "LLaVA": "ShareGPT"}


def items(reader):
    opened = set()  # digests of pictures that could be opened
    for where, record, name in recognised(reader, FORMATS):
        try:
            pictures = list(images_of(record, Path(reader.images or Path(where.rpartition(":")[0]).parent)))
            for data, picture in pictures:
                digest = hashlib.sha256(data).digest()
                if digest not in opened:
                    open_image(data, picture)
                    opened.add(digest)
            messages = placed(checked(to_messages(record, AS_CHAT[name])), len(pictures))
        except ValueError as problem:
            reader.reject(where, *problem.args)
        else:
            key = hashlib.sha256(pictures[0][0]).hexdigest() if pictures else first_question(messages)  # a picture is either learnt or held out
            size = sum(len(part) for message in messages for part in message["content"] if part)
            yield key, (messages, [data for data, _ in pictures]), size, size + sum(len(data) for data, _ in pictures)


def images_of(record, folder):
    """(bytes, name) of each picture of a record, which names files inside `folder` or holds the bytes itself."""
    if record.get("image_bytes") is not None:
        found = record["image_bytes"]
        for number, data in enumerate(found if isinstance(found, list) else [found], 1):
            yield data, f"picture {number}"
        return
    names = record.get("image") or []
    if isinstance(names, str):
        names = [name.strip() for name in names.split(",")]  # MiniMind-V: "a.jpg, b.jpg"
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("image is neither a name nor a list of names")
    for name in names:
        yield find_image(name, folder).read_bytes(), name


def placed(messages, count):
    """The messages with None for each picture: where the questions say <image>, else before the first question. Without pictures an
    <image> is a text like any other."""
    if not count:
        return messages
    found = sum(message["content"].count(MARKER) for message in messages if message["role"] == "user")
    if found not in (0, count):
        raise ValueError("as many <image> as pictures are expected", f": {found} <image>, {count} pictures")
    first, done = next(i for i, message in enumerate(messages) if message["role"] == "user"), []
    for i, message in enumerate(messages):
        if message["role"] == "user":
            parts = message["content"].split(MARKER) if found else [""] * count * (i == first) + ["\n" * (i == first) + message["content"]]
            message = {"role": "user", "content": [part for text in parts for part in (None, text)][1:]}
        done.append({**message, "content": [part for part in message["content"] if part != ""] if message["role"] == "user" else message["content"]})
    return done


def encode(tokenizer, items):
    tokenizer = knowing(tokenizer, [messages for messages, _ in items])
    return *joined(tokenizer, [tokenizer.render_chat(messages) for messages, _ in items]), [data for _, pictures in items for data in pictures]


def main():
    command("images", "Turn conversations about pictures (MiniMind-V, LLaVA) into a data folder for models with eyes.")


if __name__ == "__main__":
    run(main)
