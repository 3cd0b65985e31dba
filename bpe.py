"""Learns a byte-level BPE tokenizer from raw text, and shows how one splits text.
In: .txt, .jsonl or .json files (also .gz, .xz) or folders. Out: a folder with tokenizer.json (the same file, to the byte, that Hugging
Face `tokenizers` makes of these texts), tokenizer_config.json with the chat template, and vocab.txt to read.
Next: nanomind/images.py

    python bpe.py train FILES... --vocab-size 6400 --out DIR
    python bpe.py show DIR [TEXT]
"""

import os
from pathlib import Path

from nanomind.cli import Parser, run

GB = 1e9
BASE_MEMORY, WORD_MEMORY, BYTE_MEMORY = 0.2 * GB, 60, 11  # measured peak: interpreter, per different word, per byte of these
SAMPLES = {
    "Chinese": "人工智能是研究、开发用于模拟、延伸和扩展人的智能的理论、方法、技术及应用系统的一门新的技术科学。它的目标是让机器像人一样"
               "思考，能看、能听、能说、能写。今天，人们用手机就可以和它聊天，问它问题，请它写一首关于春天的诗。",
    "English": "Artificial intelligence is the study of machines that perceive, learn and reason. Today people talk to it on their phones, "
               "ask it questions about the weather, and have it write a short poem about spring. It's not magic: it's next-token prediction."}
CHAT = [{"role": "system", "content": "你是一个乐于助人的助手。"}, {"role": "user", "content": "Hello! 你来自哪里？"},
        {"role": "assistant", "content": "我来自地球 🌍, and I am happy to help."}]


def main():
    parser = Parser(description="learn a byte-level BPE tokenizer, or look at one", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    learn = commands.add_parser("train", help="learn a tokenizer from text files")
    learn.add_argument("files", nargs="+", metavar="FILES", help=".txt .jsonl .json, also .gz .xz, or folders of these")
    learn.add_argument("--vocab-size", type=int, default=6400, help="special tokens + 256 bytes + merges (6400)")
    learn.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    learn.add_argument("--pattern", choices=("gpt2", "gpt4"), default="gpt2",
                       help="how text is cut into words; gpt4: numbers in groups of up to 3 digits (gpt2)")
    learn.add_argument("--min-frequency", type=int, default=0, help="merge no pair that is rarer (0)")
    learn.add_argument("--memory", type=float, metavar="GB", help="use at most so much memory (3/4 of what is free)")
    learn.add_argument("--max-bad", type=float, default=0.01, help="share of bad records that is tolerated (0.01)")
    show = commands.add_parser("show", help="show how a tokenizer splits text, and how well it compresses")
    show.add_argument("folder", metavar="DIR")
    show.add_argument("text", nargs="?", metavar="TEXT")
    args = parser.parse_args()
    if args.command == "show":
        return print_split(args.folder, args.text)
    if Path(args.out).exists() and not Path(args.out).is_dir():  # said now, not when the work is done
        raise ValueError(f"{args.out}: this is a file; --out needs the name of a folder")
    tokenizer = train(args.files, args.vocab_size, args.pattern, args.min_frequency, args.memory, args.max_bad, log=print)
    tokenizer.save(args.out)
    write_listing(tokenizer, Path(args.out) / "vocab.txt")
    print(f"wrote {args.out}/tokenizer.json, tokenizer_config.json and vocab.txt (to read)")
    return check_chat(tokenizer)


def train(files, vocab_size=6400, pattern="gpt2", min_frequency=0, memory=None, max_bad=0.01, log=lambda line: None):
    """Files -> Tokenizer. `memory`: GB at most; what would need more is learnt from a sample, and said."""
    from nanomind import merges, tokenizer
    from nanomind.records import Reader
    specials = tokenizer.SPECIALS
    n_merges = vocab_size - 256 - len(specials)
    if n_merges < 0:
        raise ValueError(f"--vocab-size {vocab_size} is too small: {len(specials)} special tokens + 256 bytes need at least {256 + len(specials)}")
    limit = free_memory() if memory is None else memory * GB
    if not limit >= 2 * BASE_MEMORY:  # "not": nan is too little, too
        raise ValueError(f"--memory {limit / GB:.2f} is too little: {2 * BASE_MEMORY / GB:.1f} GB is the least this needs")
    if not 0 <= max_bad <= 1:
        raise ValueError(f"--max-bad {max_bad:g}: expected a share from 0 to 1")
    reader = Reader(files, max_bad)
    size = sum(path.stat().st_size * (4 if path.suffix in (".gz", ".xz") else 1) for path in reader.files)
    log(f"{len(reader.files)} files, about {size / GB:.3f} GB of text: will use up to {memory_needed(size / 15, size) / GB:.1f} GB of memory"
        f" (limit {limit / GB:.1f} GB, --memory)")
    table = count_words(reader, pattern, limit, log)
    log(f"{table.size:,} different words with {table.n_bytes / 1e6:.1f} MB: merging them uses {memory_needed(table.size, table.n_bytes) / GB:.1f} GB")
    flat, block_counts = merges.lay_out(*table.words())
    found = merges.train(flat, block_counts, n_merges, min_frequency, progress_bar)
    if len(found) < n_merges:
        log(f"only {len(found):,} merges instead of {n_merges:,}: no pair is left that occurs {max(1, min_frequency)} times; "
            f"the vocabulary has {vocab_size - n_merges + len(found):,} tokens instead of {vocab_size:,}")
    return tokenizer.new(found, specials, pattern)


def count_words(reader, pattern, limit, log):
    """Read all texts, cut them, and count the different words. Where they would not fit, thin out the rare ones."""
    from nanomind.pretokenize import Cutter, WordTable, batches
    cutter, table = Cutter(pattern), WordTable()
    with progress_bar("reading and pre-tokenising", reader.total_bytes) as bar:
        reader.progress = bar.update
        for cut in one_ahead(cutter.cut, batches(text for _, text in reader.texts())):
            table.add(cut)
            while memory_needed(table.size, table.n_bytes) > limit:
                table.thin(table.level + 1)
                if table.level > 20 or not table.size:
                    raise ValueError(f"--memory {limit / GB:.2f} is too little for this text: its frequent or very long words alone need more")
                log(f"the memory limit is reached ({limit / GB:.1f} GB): from here on one of {2 ** table.level} rare words stands for all; "
                    "the merges will differ a little from those of the whole text (a larger --memory avoids that)")
    return table


def one_ahead(function, items):
    """map(function, items), the next one already under way in a thread while the caller works with this one."""
    from concurrent.futures import ThreadPoolExecutor
    with ThreadPoolExecutor(1) as pool:
        running = None
        for item in items:
            running, done = pool.submit(function, item), running
            if done:
                yield done.result()
        if running:
            yield running.result()


def memory_needed(n_words, n_bytes):
    """Peak memory in bytes of training on so many different words with so many bytes in all."""
    return BASE_MEMORY + WORD_MEMORY * n_words + BYTE_MEMORY * n_bytes


def free_memory():
    """Three quarters of the memory that is free now."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 750 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable")))
    except (OSError, StopIteration):
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 8 * GB
        return pages // 2


def progress_bar(phase, total):
    """A bar over so many bytes, or over 100 percent."""
    from tqdm import tqdm
    return tqdm(total=total, desc=phase, unit="%" if total == 100 else "B", unit_scale=True, disable=None)


def readable(data):
    """Bytes of a token for people: Chinese as it is, a blank as '␣', a newline as '\\n', bytes that are no whole character as <E4>."""
    def show(char):
        if "\udc80" <= char <= "\udcff":
            return f"<{ord(char) - 0xDC00:02X}>"
        return char if char.isprintable() else char.encode("unicode_escape").decode()
    return "".join("␣" if char == " " else show(char) for char in data.decode("utf-8", "surrogateescape"))


def write_listing(tokenizer, path):
    """vocab.txt: id, bytes, token."""
    from nanomind.tokenizer import write_whole
    names = {i: text for text, i in tokenizer.special.items()}
    lines = [f"{i}\t{len(data)}\t{names.get(i) or readable(data)}" for i, data in enumerate(tokenizer.token_bytes)]
    write_whole(path, "id\tbytes\ttoken\n" + "\n".join(lines) + "\n")


def check_chat(tokenizer):
    """Render a chat of three turns and decode it again."""
    ids, mask = tokenizer.render_chat(CHAT)
    text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in CHAT)
    same = tokenizer.decode(ids) == text
    print(f"a chat of three turns:\n{text}vocabulary {tokenizer.vocab_size:,} tokens, the chat {len(ids)} ids ({sum(mask)} to learn), "
          f"decoding gives the text back: {'yes' if same else 'NO'}")
    return 0 if same else 1


def print_split(folder, text):
    """Show a text token by token, and characters and bytes per token on it, on Chinese and on English."""
    from nanomind.tokenizer import Tokenizer
    tokenizer = Tokenizer.load(folder)
    print(f"vocabulary {tokenizer.vocab_size:,}, special tokens {' '.join(tokenizer.special)}")
    for name, sample in ({"this text": text} if text else {} | SAMPLES).items():
        ids = tokenizer.encode(sample)
        print(f"\n{name}: " + "|".join(readable(tokenizer.token_bytes[i]) for i in ids))
        if text:
            print("ids: " + " ".join(map(str, ids)))
    print(f"\n{'':10s} {'characters':>10s} {'bytes':>8s} {'tokens':>8s} {'chars/token':>12s} {'bytes/token':>12s}")
    for name, sample in ({"this text": text} if text else {} | SAMPLES).items():
        n, chars, size = len(tokenizer.encode(sample)), len(sample), len(sample.encode("utf-8", "replace"))
        print(f"{name:10s} {chars:10,} {size:8,} {n:8,} {chars / n:12.2f} {size / n:12.2f}")


if __name__ == "__main__":
    run(main)
