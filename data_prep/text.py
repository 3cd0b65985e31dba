"""Prepares prose for pretraining: python -m data_prep.text --input FILES --tokenizer DIR --out data/x
In: .txt, .jsonl or .json files (also .gz, .xz); a record's text may stand in any known field. Out: a data folder in which every
document is <|endoftext|> followed by the ids of its text.
Next: data_prep/chat.py
"""

from data_prep.common import command
from nanomind.cli import run
from nanomind.records import text_of


def items(reader):
    said = set()
    for where, record in reader:
        file = where.rpartition(":")[0]
        if "rejected" in record and "text" not in record:
            reader.reject(where, "a preference pair, half of which is a bad answer", "; it is data for --stage dpo")
            continue
        try:
            text = text_of(record)
        except ValueError as problem:
            reader.reject(where, str(problem))
            continue
        if "text" not in record and file not in said:  # welcome as text, but whoever meant to teach answering should know
            print(f"{file}: conversations, read as plain text without roles; to learn to answer from them: --stage sft")
            said.add(file)
        yield text, text, len(text)


def encode(tokenizer, items):
    import numpy as np

    ids, starts = tokenizer.encode_many(items)
    return np.insert(ids, starts, tokenizer.end_of_text), starts + np.arange(len(starts)), None


def main():
    command("text", "Turn raw text into a data folder for pretraining.")


if __name__ == "__main__":
    run(main)
