"""Lets a teacher answer questions, as training data for a student: python -m data_prep.distill --teacher FOLDER --prompts FILE --out FILE
In: a checkpoint folder, and files with conversations or {"prompt": text} objects. Out: a .jsonl file of conversations that
end with the teacher's own answer, for data_prep.chat and --stage sft. Answers that did not end by themselves are left out and counted.
Next: train.py
"""

import argparse
import json
import os
from pathlib import Path

from nanomind.cli import keep_memory, run


def main():
    parser = argparse.ArgumentParser(prog="python -m data_prep.distill", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--teacher", required=True, metavar="FOLDER", help="checkpoint folder that answers")
    parser.add_argument("--prompts", required=True, nargs="+", metavar="FILE", help="conversations (their last answer is replaced) or {\"prompt\": text}")
    parser.add_argument("--out", required=True, metavar="FILE", help="the .jsonl file to write; an unfinished one is gone on with")
    parser.add_argument("--batch-size", type=int, default=32, help="questions answered at once (default: 32)")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longest answer (default: 256)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest answer (default: 0)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if Path(args.out).exists():
        raise ValueError(f"{args.out} exists already: choose another --out")
    keep_memory(["-m", "data_prep.distill"])
    return write_answers(args)


def write_answers(args):
    from tqdm import tqdm

    from nanomind import checkpoint, generate, judge
    from nanomind.records import Reader

    model, tokenizer = checkpoint.load(args.teacher)
    print(f"{args.teacher}: {generate.prepare(model)}")
    chats = [conversation(record) for _, record in Reader(args.prompts)]
    chats = [chat for chat in chats if chat]
    stop = {tokenizer.end_of_text, tokenizer.im_end} - {None}
    sampling = generate.Sampling(temperature=args.temperature, repetition_penalty=1.0, seed=args.seed)
    limit = model.config.max_position_embeddings - args.max_new_tokens
    part = Path(args.out + ".part")
    done = part.read_text(encoding="utf-8").count("\n") if part.exists() else 0
    done -= done % args.batch_size  # a batch is written as a whole, the last one perhaps not
    keep = "".join(part.read_text(encoding="utf-8").splitlines(keepends=True)[:done]) if done else ""
    with open(part, "w", encoding="utf-8") as file, tqdm(total=len(chats), initial=done, disable=None, unit="answer") as bar:
        file.write(keep)
        for at in range(done, len(chats), args.batch_size):
            batch = chats[at:at + args.batch_size]
            prompts = [([] if tokenizer.begin is None else [tokenizer.begin]) + tokenizer.render_prompt(chat) for chat in batch]
            fitting = [i for i, prompt in enumerate(prompts) if len(prompt) <= limit]
            found = dict(zip(fitting, judge.answers(model, [prompts[i] for i in fitting], args.max_new_tokens, stop, sampling, args.batch_size)))
            for i, chat in enumerate(batch):
                ids, ended = found.get(i, ([], False))
                answer = tokenizer.decode(ids)
                good = ended and answer.strip()
                file.write((json.dumps({"conversations": [*chat, {"role": "assistant", "content": answer}]}, ensure_ascii=False) if good else "") + "\n")
            file.flush()
            bar.update(len(batch))
    lines = [line for line in part.read_text(encoding="utf-8").splitlines() if line]
    finished = Path(args.out + ".tmp")
    finished.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    os.replace(finished, args.out)
    part.unlink()
    print(f"{args.out}: {len(lines):,} answers; {len(chats) - len(lines):,} left out (too long, empty, or they did not end)")


def conversation(record):
    """A record -> its messages up to the last question, or None when there is none."""
    if isinstance(record.get("prompt"), str):
        return [{"role": "user", "content": record["prompt"]}]
    messages = record.get("conversations") or record.get("messages") or []
    while messages and messages[-1].get("role") != "user":
        messages = messages[:-1]
    return [{"role": m["role"], "content": m["content"]} for m in messages] or None


if __name__ == "__main__":
    run(main)
