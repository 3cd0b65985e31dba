"""Prepares prose for pretraining: python -m data_prep.text --input FILES --tokenizer DIR --out data/x
In: .txt, .jsonl or .json files (also .gz, .xz); a record's text may stand in any known field. Out: a data folder in which every
document is <|endoftext|> followed by the ids of its text.
Next: data_prep/chat.py
"""

from data_prep.common import command
from nanomind.cli import run


def items(reader):
    for _, text in reader.texts():
        yield text, text, len(text)


def encode(tokenizer, items):
    import numpy as np

    ids, starts = tokenizer.encode_many(items)
    return np.insert(ids, starts, tokenizer.end_of_text), starts + np.arange(len(starts)), None


def main():
    command("text", "Turn raw text into a data folder for pretraining.")


if __name__ == "__main__":
    run(main)
