"""Talks to a model: continues prompts, in a terminal as an endless conversation, or with fixed prompts that show what it can do.
In: a checkpoint folder, ours or any Llama or Qwen3 with a byte-level BPE tokenizer.json. Out: text, streamed token by token.
Next: tests/
"""

import sys
import time
from pathlib import Path

from nanomind.cli import Parser, run

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def flags(argv):
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--run", default="", help="name of the run (default: the one saved last)")
    parser.add_argument("--stage", default="", help="stage of the run (default: the one saved last)")
    parser.add_argument("--phase", default="", choices=("1", "2"), help="with --stage vlm: the checkpoint of which phase (default: 2)")
    parser.add_argument("--ckpt", default="", metavar="FOLDER", help="a checkpoint folder, instead of --run and --stage")
    parser.add_argument("--compare", nargs=2, default=[], metavar="FOLDER", help="two checkpoint folders: the same prompts and seed for both")
    parser.add_argument("--prompt", help="answer or continue this text and stop; - reads it from standard input")
    parser.add_argument("--auto", action="store_true", help="answer or continue the fixed prompts and stop")
    parser.add_argument("--exam", metavar="FILE", help="ask the questions of an exam file greedily, print the share of right answers by category and stop")
    parser.add_argument("--blind", action="store_true", help="with --exam: show the picture of another question, to see what is guessed")
    parser.add_argument("--image", default="", metavar="FILE", help="a picture, or a folder of them, to describe or to answer --prompt about")
    parser.add_argument("--clip", default="", help="where the encoder of a model that sees lies now (default: where it lay in training)")
    parser.add_argument("--clip-weights", default="", help="its weights: an open_clip tag or a local file")
    parser.add_argument("--system", default="", metavar="TEXT", help="system prompt of a conversation")
    parser.add_argument("--mode", default="auto", choices=("auto", "chat", "complete"), help="answer, or continue text; auto: what the model was trained for")
    parser.add_argument("--temperature", type=float, default=0.7, help="0: always the likeliest token (default: 0.7)")
    parser.add_argument("--top-k", type=int, default=50, help="choose among so many tokens; 0: all (default: 50)")
    parser.add_argument("--top-p", type=float, default=0.95, help="choose among the likeliest that make up this share; 1: all (default: 0.95)")
    parser.add_argument("--min-p", type=float, default=0.0, help="choose among those at least this likely, relative to the likeliest (default: 0)")
    parser.add_argument("--repetition-penalty", type=float, default=1.1, help="make what has occurred less likely; 1: off (default: 1.1)")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="tokens to write at most, not counting the prompt (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed writes the same text (default: 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"), help="auto: bf16 where it is faster or saves memory traffic")
    parser.add_argument("--int8", action="store_true", help="keep the weights as int8: half the bytes of bf16 once loaded, up to 1.3 times as fast for one text at a time, all but the same text")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: all")
    args = parser.parse_args(argv)
    stage = {"vlm": f"vlm-{args.phase or 2}"}.get(args.stage, args.stage)
    problems = [text for wrong, text in (
        (args.ckpt and (args.run or args.stage), "--ckpt names a folder, --run and --stage another: give one"),
        (args.compare and (args.ckpt or args.run or args.stage), "--compare names both folders: leave out --ckpt, --run and --stage"),
        (args.exam and any(getattr(args, name) != parser.get_default(name) for name in (
            "prompt", "auto", "image", "system", "mode", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens", "seed")),
         "--exam asks its own questions, one by one and greedily: leave out --prompt, --auto, --image, --system, --mode and the flags of sampling"),
        (args.blind and not args.exam, "--blind goes with --exam"),
        (args.phase and args.stage != "vlm", "--phase is of --stage vlm"),
        (args.image and args.auto, "--image FOLDER walks through its pictures by itself: leave out --auto"),
        (args.auto and args.prompt is not None, "--auto and --prompt exclude each other"),
        (args.max_new_tokens < 1, f"--max-new-tokens {args.max_new_tokens}: expected at least 1")) if wrong]
    if problems:
        raise ValueError("; ".join(problems))
    args.stage = stage
    return args


def main():
    args = flags(sys.argv[1:])
    from nanomind import checkpoint, exam, generate  # after the flags: importing torch takes seconds, --help should not
    sampling = generate.Sampling(args.temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty, args.seed)
    writers, items = [], exam.read_exam(args.exam) if args.exam else []
    for folder in args.compare or [args.ckpt or checkpoint.newest("out", args.run, args.stage)]:
        model, tokenizer = checkpoint.load(Path(folder))
        machine = generate.prepare(model, args.device, args.precision, args.threads, args.int8)
        chat = checkpoint.is_chat(folder, tokenizer) if args.mode == "auto" else args.mode == "chat"
        if chat and tokenizer.im_start is None:
            raise ValueError(f"{folder}: its tokenizer has no <|im_start|>, so it cannot chat here; use --mode complete")
        print(f"{folder}: {model.config.parameters() / 1e6:.2f}M parameters, {machine}, {'answers' if chat else 'continues text'}", file=sys.stderr)
        writers.append(Writer(folder if args.compare else "", model, tokenizer, sampling, args.max_new_tokens, chat, args.system,
                              find_eyes(folder, model, args.clip, args.clip_weights) if args.image or hasattr(model, "vision") else None))
    for writer in writers if args.exam else []:
        print(*[writer.name] * bool(writer.name), exam.table(exam.sit(writer.model, writer.tokenizer, items, writer.look, args.blind)), sep="\n")
    if args.exam:
        return None
    if args.image:
        return describe(writers, pictures_of(args.image), args.prompt)
    if args.prompt is not None:
        prompts = [sys.stdin.read().rstrip("\n") if args.prompt == "-" else args.prompt]
    elif args.auto or not sys.stdin.isatty() or read("[0] automatic\n[1] manual\n> ").strip() in ("", "0"):
        prompts = exam.QUESTIONS if any(writer.chat for writer in writers) else exam.PROMPTS
    else:
        return converse(writers)
    for prompt in prompts:
        for writer in writers:
            writer.show(prompt)
            writer.reset()
        if prompt is not prompts[-1]:
            print()


def converse(writers):
    """Read lines until /exit (or an empty line); a chat remembers what was said until /reset."""
    sees = any(writer.look for writer in writers)
    print("/reset forgets the conversation, /exit or an empty line ends it" + ("; /image FILE puts a picture before the next question" if sees else ""))
    while True:
        line = read("\n> ")
        if line in ("", "/exit"):
            return
        for writer in writers:
            if line == "/reset":
                writer.reset()
            elif line.startswith("/image ") and sees:
                try:
                    writer.show_picture(Path(line[7:].strip()))
                except (ValueError, OSError) as problem:
                    print(problem)
            else:
                try:
                    writer.show(line)
                except ValueError as problem:  # too long, with its pictures, even alone: what stood before it is forgotten by then
                    print(problem)
                    writer.reset()


def find_eyes(folder, model, clip="", weights=""):
    """A function from image files to their features, by the encoder that the checkpoint was trained with (clip, weights: where it lies now)."""
    if not hasattr(model, "vision"):
        raise ValueError(f"{folder}: this model reads text only; a model with eyes is trained by python train.py --stage vlm")
    from nanomind.vision import looking
    return looking(model.vision, clip, weights)


def pictures_of(name):
    """--image: a file, or the pictures of a folder in the order of their names."""
    path = Path(name)
    if not path.exists():
        raise FileNotFoundError(f"--image {name}: no such file or folder")
    found = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
    if not found:
        raise ValueError(f"--image {name}: no picture in this folder; expected names ending in {' '.join(SUFFIXES)}")
    return found


def describe(writers, paths, prompt):
    """Show what each model says about each picture, in answer to the prompt or to the fixed ones."""
    from nanomind.exam import DESCRIBE
    for path in paths:
        print(f"[Image]: {path.name}")
        for question in [prompt] if prompt is not None else DESCRIBE:
            for writer in writers:
                writer.show_picture(path)
                writer.show(question)
                writer.reset()
        print()


def read(question):
    """A line from the terminal; Ctrl-D is an empty one."""
    try:
        return input(question)
    except EOFError:
        return ""


class Writer:
    """One model that answers or continues, and prints as it writes."""

    def __init__(self, name, model, tokenizer, sampling, max_new_tokens, chat, system="", look=None):
        self.name, self.model, self.tokenizer, self.sampling, self.max_new_tokens = name, model, tokenizer, sampling, max_new_tokens
        self.look = look
        self.chat, self.system = chat, [{"role": "system", "content": system}] if system else []
        self.stop = {number for number in (tokenizer.end_of_text, tokenizer.im_end) if number is not None}
        self.begin = [] if tokenizer.begin is None else [tokenizer.begin]
        self.reset()

    def reset(self):
        self.history, self.pictures, self.waiting = [], [], 0  # pictures: features of those in the history; waiting: how many await their question

    def show_picture(self, path):
        """Put a picture before the next question."""
        if self.look is None:
            raise ValueError("this model reads text only")
        self.pictures.append(self.look([path]))
        self.waiting += 1

    def show(self, text):
        """Print the text (of a chat: the question) and, token by token, what the model makes of it."""
        print(f"{self.name + ': ' if self.name else ''}{text}", end="\n" if self.chat else "", flush=True)
        ids = self.question(text) if self.chat else self.begin + self.tokenizer.encode(text)
        if not ids:
            raise ValueError("the prompt is empty, and this model needs at least one token to start from")
        stream, written, began = self.tokenizer.stream(), [], time.monotonic()
        for (token,) in self.steps(ids):
            print(stream.push(token), end="", flush=True)
            written.append(token)
        print(stream.end())
        if self.chat:
            self.history.append({"role": "assistant", "content": self.tokenizer.decode(written)})
        if sys.stdout.isatty():
            print(f"\033[2m{len(written)} tokens, {len(written) / (time.monotonic() - began):.0f} a second\033[0m")

    def question(self, text):
        """Ids of the conversation with a new question; when it no longer fits, the oldest turns are forgotten, with a notice."""
        self.history.append({"role": "user", "content": [None] * self.waiting + ["\n" + text] if self.waiting else text})
        room, forgotten, self.waiting = self.room(), 0, 0
        while True:
            ids = self.begin + self.tokenizer.render_prompt(self.system + self.history)
            patches = sum(features.size(1) - 1 for features in self.pictures)
            if len(ids) + patches <= room or len(self.history) == 1:
                break
            seen = sum(part is None for part in self.history[0]["content"])
            del self.history[:2], self.pictures[:seen]
            forgotten += 1
        if forgotten:
            print(f"[the conversation is longer than the model sees: the oldest {forgotten} turns are forgotten]", file=sys.stderr)
        return ids

    def room(self):
        """Tokens a prompt may have so that an answer fits behind it."""
        size = self.model.config.max_position_embeddings
        return size - min(self.max_new_tokens, size // 2)

    def steps(self, ids):
        """New tokens after `ids`; when they leave no room, the oldest are forgotten, with a notice."""
        from nanomind.generate import generate
        import torch
        features = torch.cat(self.pictures) if self.pictures else None
        room = self.room()
        if len(ids) > room and features is None:
            print(f"[the prompt has {len(ids)} tokens, the model sees {self.model.config.max_position_embeddings}: only its last {room} are used]",
                  file=sys.stderr)
            ids = ids[-room:]
        return generate(self.model, [ids], self.max_new_tokens, self.stop, self.sampling, [features])


if __name__ == "__main__":
    run(main)
