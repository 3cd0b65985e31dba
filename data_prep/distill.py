"""Lets a teacher answer questions, as training data for a student: python -m data_prep.distill --teacher FOLDER --prompts FILE --out FILE
In: a checkpoint folder, and files with conversations (any format of data_prep.chat) or {"prompt": text}. Out: a .jsonl file of
conversations that end with the teacher's own answer, for --stage sft. Answers that did not end by themselves are left out and counted.
Next: nanomind/stages.py
"""

import json
import os
from collections import Counter
from pathlib import Path

from data_prep.chat import FORMATS, checked, recognised, to_messages
from data_prep.common import fingerprint
from nanomind.cli import Parser, keep_memory, run
from nanomind.records import Reader, find_files

TOGETHER = 8  # batches that are asked, and saved, together: of so many questions those of one length can share a batch, and little is padding


def main():
    parser = Parser(prog="python -m data_prep.distill", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--teacher", required=True, metavar="FOLDER", help="checkpoint folder that answers")
    parser.add_argument("--prompts", required=True, nargs="+", metavar="FILE", help="conversations (their last answer is replaced) or {\"prompt\": text}")
    parser.add_argument("--out", required=True, metavar="FILE", help="the .jsonl file to write; an unfinished one is gone on with")
    parser.add_argument("--max-bad", type=float, default=0.01, metavar="SHARE", help="share of bad records that is still put up with (default: 0.01)")
    parser.add_argument("--batch-size", type=int, default=32, help="questions answered at once (default: 32)")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longest answer (default: 256)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest answer (default: 0)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if Path(args.out).exists():
        raise ValueError(f"{args.out} exists already: choose another --out")
    if Path(args.out).suffix != ".jsonl":
        raise ValueError(f"--out {args.out}: expected a name ending in .jsonl, as data_prep.chat reads it")
    if args.batch_size < 1 or args.max_new_tokens < 1:
        raise ValueError(f"--batch-size {args.batch_size}, --max-new-tokens {args.max_new_tokens}: expected at least 1 of each")
    keep_memory(["-m", "data_prep.distill"])
    write_answers(**vars(args))


def write_answers(teacher, prompts, out, max_bad=0.01, batch_size=32, max_new_tokens=256, temperature=0.0, seed=0, threads=0, precision="auto"):
    """Some batches at a time are added to OUT.part, a line per question: the conversation, or why there is none. At the end the conversations become OUT."""
    from tqdm import tqdm

    from nanomind import checkpoint, generate, judge

    chats = questions(prompts, max_bad)
    sampling = generate.Sampling(temperature=temperature, repetition_penalty=1.0, seed=seed)
    model, tokenizer = checkpoint.load(teacher)
    limit = model.config.max_position_embeddings - max_new_tokens
    if limit < 1:
        raise ValueError(f"--max-new-tokens {max_new_tokens}: the teacher sees {model.config.max_position_embeddings} tokens, the question included")
    print(f"{teacher}: {generate.prepare(model, precision=precision, threads=threads, rows=batch_size)}")
    stop = {tokenizer.end_of_text, tokenizer.im_end} - {None}
    part = Path(f"{out}.part")
    mark = fingerprint([Path(teacher) / "model.safetensors", *find_files(prompts)], batch_size, max_new_tokens, temperature, seed, precision)
    group = TOGETHER * batch_size
    file, done = begin(part, mark, group)
    with file, tqdm(total=len(chats), initial=min(done, len(chats)), disable=None, unit="answer") as bar:
        for at in range(done, len(chats), group):
            batch = chats[at:at + group]
            asked = [([] if tokenizer.begin is None else [tokenizer.begin]) + tokenizer.render_prompt(chat) for chat in batch]
            fitting = [i for i, prompt in enumerate(asked) if len(prompt) <= limit]
            found = dict(zip(fitting, judge.answers(model, [asked[i] for i in fitting], max_new_tokens, stop, sampling, batch_size)))
            for i, chat in enumerate(batch):
                ids, ended = found.get(i, ([], None))
                answer = tokenizer.decode(ids)
                problem = "question too long" if ended is None else "did not end" if not ended else "empty" if not answer.strip() else None
                line = problem or {"conversations": [*chat, {"role": "assistant", "content": answer}]}
                file.write((json.dumps(line, ensure_ascii=False) + "\n").encode("utf-8"))
            file.flush()
            bar.update(len(batch))
    finish(part, out, max_new_tokens)


def questions(files, max_bad):
    """The conversations to be answered, each up to its last question."""
    reader, chats = Reader(files, max_bad), []
    for where, record, name in recognised(reader, {**FORMATS, "prompts": (("prompt",), ())}):
        try:
            chat = [{"role": "user", "content": record["prompt"]}] if name == "prompts" else to_messages(record, name)
            while chat and chat[-1]["role"] == "assistant":
                chat = chat[:-1]
            chats.append(checked([*chat, {"role": "assistant", "content": "?"}])[:-1])
        except ValueError as problem:
            reader.reject(where, *problem.args)
    if reader.bad:
        print(reader.explain())
    return chats


def begin(part, mark, group):
    """Open OUT.part for writing on. -> (file, questions done). Its first line tells what it was begun with; a group that is not whole is cut off."""
    part.parent.mkdir(parents=True, exist_ok=True)
    lines = part.read_bytes().split(b"\n")[:-1] if part.exists() else []  # what follows the last line end is half a line
    if lines and lines[0] != mark.encode():
        raise ValueError(f"{part} was begun with another teacher, other prompts or settings: give those again, delete it or choose another --out")
    done = max(0, len(lines) - 1) // group * group
    kept = b"".join(line + b"\n" for line in [mark.encode(), *lines[1:1 + done]])
    file = open(part, "r+b" if lines else "wb")
    file.write(kept)
    file.truncate()
    return file, done


def finish(part, out, max_new_tokens):
    lines = [json.loads(line) for line in part.read_bytes().split(b"\n")[1:-1]]
    answers, left_out = [line for line in lines if isinstance(line, dict)], Counter(line for line in lines if isinstance(line, str))
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in left_out.most_common())
    if answers:
        beside = Path(f"{out}.tmp")
        beside.write_text("".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers), encoding="utf-8", newline="\n")
        os.replace(beside, out)
    part.unlink()
    if not answers:
        raise ValueError(f"none of the {len(lines):,} answers can be used ({reasons}): try more than --max-new-tokens {max_new_tokens} or another teacher")
    print(f"{out}: {len(answers):,} answers" + f"; left out: {reasons}" * bool(left_out))


if __name__ == "__main__":
    run(main)
