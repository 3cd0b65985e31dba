"""Prepares preference pairs for DPO: python -m data_prep.pairs --input FILES --tokenizer DIR --out data/x
In: {"chosen": messages, "rejected": messages}, or {"prompt", "chosen", "rejected"} where each is a text or messages. Out: a data
folder in which document 2i is the chosen and 2i+1 the rejected conversation; only the last answer of each is a target.
Next: data_prep/images.py
"""

from data_prep.chat import checked, first_question, joined, knowing, recognised
from data_prep.common import command
from nanomind.cli import run

FORMATS = {
    "conversation pairs": (("chosen", "rejected"), ("role", "content")),
    "prompt and two answers": (("prompt", "chosen", "rejected"), ()),
}


def items(reader):
    for where, record, _ in recognised(reader, FORMATS):
        try:
            chosen, rejected = (checked(conversation(record, side)) for side in ("chosen", "rejected"))
            if chosen[:-1] != rejected[:-1]:
                raise ValueError("chosen and rejected have different prompts")
            if chosen[-1] == rejected[-1]:
                raise ValueError("chosen and rejected are the same answer")
        except ValueError as problem:
            reader.reject(where, *problem.args)
        else:
            yield first_question(chosen), (chosen, rejected), sum(len(message["content"]) for message in chosen + rejected)


def encode(tokenizer, items):
    conversations = [messages for pair in items for messages in pair]
    tokenizer, rendered = knowing(tokenizer, conversations), []
    for messages in conversations:
        ids, mask = tokenizer.render_chat(messages)
        prompt = len(tokenizer.render_prompt(messages[:-1]))
        rendered.append((ids, [0] * prompt + mask[prompt:]))  # earlier answers belong to the prompt: they are no targets
    return joined(tokenizer, rendered)


def conversation(record, side):
    """Prompt and answer as one list of messages; a prompt field is used where the answer does not bring its question along. system: optional."""
    answer = messages(record[side], "assistant")
    if not any(message["role"] == "user" for message in answer):
        answer = messages(record.get("prompt", []), "user") + answer
    return messages(record.get("system") or [], "system") + answer


def messages(value, role):
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, list) and all(isinstance(message, dict) and {"role", "content"} <= message.keys() for message in value):
        return [{"role": message["role"], "content": message["content"]} for message in value]
    raise ValueError("neither a text nor a list of messages with role and content", f": {str(value)[:40]}")


def main():
    command("pairs", "Turn preference pairs into a data folder for DPO.")


if __name__ == "__main__":
    run(main)
