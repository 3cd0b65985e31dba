"""Puts questions to a model and marks its answers: right or not, declined or not, with an interval that says how sure the share is.
In: a file of {"question", "answer" or "answers", optional "category"}, a line each, and a chat model. Out: shares by category.
An answer is right when it holds an accepted one as a whole and does not decline; no accepted answer at all means that it should decline.
Next: data_prep/distill.py
"""

import re
import unicodedata
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

from nanomind.images import find_image
from nanomind.judge import answers
from nanomind.records import Reader

# What makes an answer count as declining: chats that decline use one of these, exams do not expect them in an answer.
DECLINES = ("不知道", "不清楚", "不了解", "没有学过", "没学过", "不在我", "无法回答", "抱歉",
            "don't know", "do not know", "not know", "not sure", "haven't learned", "sorry")
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\ud7ff\uf900-\ufaff\U00020000-\U0003ffff"  # Thai to Korean: words are not kept apart by spaces
LETTER = f"[^\\W_{UNSPACED}]"  # of a script that does, or a digit
NUMERAL = "[零一二三四五六七八九十百千万亿]"
MAX_NEW_TOKENS = 64
BATCH = 128  # questions answered at once

# What is asked when nobody asks: of a model that answers, of one that continues text, of one that sees.
QUESTIONS = ("请介绍一下自己。", "你更擅长哪一个学科？", "鲁迅的《狂人日记》是如何批判封建礼教的？", "我咳嗽已经持续了两周，需要去医院检查吗？", "详细的介绍光速的物理概念。",
             "推荐一些杭州的特色美食吧。", "请为我讲解“大语言模型”这个概念。", "如何理解ChatGPT？", "Introduce the history of the United States, please.")
PROMPTS = ("马克思主义基本原理", "人类大脑的主要功能", "万有引力原理是", "世界上最高的山峰是", "二氧化碳在空气中", "地球上最大的动物有", "杭州市的美食有",
           "The capital of China is", "Water boils at", "The largest ocean on Earth is")
DESCRIBE = ("请描述这张图片。", "Describe this picture.")


class Share(NamedTuple):
    right: float  # share of the questions, 0..1
    low: float  # Wilson's interval at 95 %
    high: float
    n: int


class Score(NamedTuple):
    categories: dict  # category -> Share
    declined: float  # share of the questions with an answer that were declined
    ended: float  # share of all answers that ended by themselves
    answers: list  # texts, in the order of the items


class _Strict(Reader):
    """An exam with a line left out is another exam."""

    def reject(self, where, reason, detail=""):
        raise ValueError(f"{where}: {reason}{detail}")


def read_exam(path):
    """The questions of a file: dicts with question, answers (a list), category, and, where the file has them, ignore (names in which an
    accepted answer is only a part of something else: 柏林, Berlin, in 都柏林, Dublin) and image (a path, in the file relative to the file)."""
    items = []
    for where, record in _Strict([path]):
        given = [field for field in ("answer", "answers") if field in record]
        found = record[given[0]] if len(given) == 1 else None
        found = [found] if given == ["answer"] else found
        image = record.get("image")
        problems = [text for wrong, text in (
            (not isinstance(record.get("question"), str) or not str(record["question"]).strip(), '"question": expected a text'),
            (not isinstance(found, list) or not all(isinstance(text, str) and normalise(text) for text in found),
             'expected "answer": a text, or "answers": a list of texts ([] where it should decline)'),
            (not isinstance(record.get("category", ""), str), '"category": expected a text'),
            (not _texts(record.get("ignore", [])), '"ignore": expected a list of texts'),
            (image is not None and not isinstance(image, str), '"image": expected the path of a picture')) if wrong]
        if problems:
            raise ValueError(f"{where}: {'; '.join(problems)}")
        item = {"question": record["question"], "answers": found, "ignore": record.get("ignore", []), "category": record.get("category") or "all"}
        if image:
            try:
                item["image"] = find_image(image, Path(path).parent)
            except ValueError as problem:
                raise ValueError(f"{where}: {''.join(problem.args).split(';')[0]}") from None
        items.append(item)
    return items


def _texts(value):
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


@lru_cache(4096)
def normalise(text):
    """What remains when width, case, accents, punctuation and the spaces that mean nothing are taken away: 「８,８４８.８６ 米。」 -> 8848.86米"""
    text = unicodedata.normalize("NFKD", text.replace("\u2212", "-").replace("’", "'"))
    text = unicodedata.normalize("NFC", re.sub("[\u0300-\u036f]", "", text)).casefold()
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))|'", "", text)  # 8,848 and don't
    text = re.sub(r" ?per ?cent\b", "%", text)
    text = re.sub(rf"[^\w%.-]|_|(?<!\d)\.|\.(?!\d)|-(?!\d)|(?<={LETTER})-", " ", text)  # a point within a number and a minus before it stay
    return re.sub(rf"\s*([{UNSPACED}])\s*", r"\1", re.sub(r"\s+", " ", text)).strip()


def contains(text, piece, ignore=()):
    """Does a text hold a piece as a whole (all normalised), not cut out of a longer number or word, nor out of one of the names to ignore?"""
    if piece not in text:
        return False
    before = after = ""
    if re.match(LETTER, piece[0]) or piece[0] == "-":
        before = rf"(?<!{LETTER})(?<!\d\.)(?<!-)" if piece[0].isdigit() else rf"(?<!{LETTER})"
    if re.fullmatch(r"[\d.%-]+", piece):
        after = r"(?!\d|\.\d|[万亿]| [mb]illion)"
    elif re.match(LETTER, piece[-1]):
        after = rf"(?!{LETTER})"
    if re.fullmatch(f"{NUMERAL}+", piece):
        before, after = f"(?<!{NUMERAL})", f"(?!{NUMERAL})"
    names = [match.span(1) for name in ignore for match in re.finditer(f"(?=({re.escape(name)}))", text)]
    places = (match.start(1) for match in re.finditer(f"(?={before}({re.escape(piece)}){after})", text))
    return any(not any(low <= at and at + len(piece) <= high for low, high in names) for at in places)


def grade(answer, item):
    """-> (right, declined). It marks words, not sense: an answer that names everything is right, one that says "not Paris" names Paris."""
    text = normalise(answer)
    declined = any(contains(text, normalise(marker)) for marker in DECLINES)
    ignore = [name for name in map(normalise, item.get("ignore", [])) if name]
    if item["answers"]:
        return not declined and any(contains(text, normalise(accepted), ignore) for accepted in item["answers"]), declined
    return declined, declined


def wilson(right, n, z=1.959964):
    """The interval of a share `right` of n (E. B. Wilson 1927, equation 4), at 95 %: honest for few questions and near 0 and 1 too. -> (low, high)"""
    share, weight = right / n, z * z / n
    middle = (share + weight / 2) / (1 + weight)
    half = z * ((share * (1 - share) + weight / 4) / n) ** 0.5 / (1 + weight)
    return max(0.0, middle - half), min(1.0, middle + half)


def score(model, tokenizer, items, write=answers):
    """Ask every question as a chat of its own, greedily. -> Score

    `write` answers prompts as judge.answers does. The content of a question with an image is [None, text], None standing for the
    image (see tokenizer.render_prompt), so a model with eyes brings a `write` that knows the pictures of the prompts, in their order.
    """
    begin = [] if tokenizer.begin is None else [tokenizer.begin]
    prompts, room = [], model.config.max_position_embeddings - MAX_NEW_TOKENS
    for item in items:
        if "image" in item and write is answers:
            raise ValueError(f"{item['question'][:40]!r} asks about a picture, which this model cannot see: name a checkpoint of --stage vlm")
        content = [None, "\n" + item["question"]] if "image" in item else item["question"]
        prompts.append(begin + tokenizer.render_prompt([{"role": "user", "content": content}]))
        if len(prompts[-1]) > room:
            raise ValueError(f"{item['question'][:40]!r}... has {len(prompts[-1])} tokens, {room} leave room for an answer: shorten the question")
    found = write(model, prompts, MAX_NEW_TOKENS, {tokenizer.end_of_text, tokenizer.im_end} - {None})
    texts = [tokenizer.decode(ids, specials=False) for ids, _ in found]
    marks = [grade(text, item) for text, item in zip(texts, items)]
    categories = {}
    for category in dict.fromkeys(item["category"] for item in items):
        own = [right for (right, _), item in zip(marks, items) if item["category"] == category]
        categories[category] = Share(sum(own) / len(own), *wilson(sum(own), len(own)), len(own))
    known = [declined for (_, declined), item in zip(marks, items) if item["answers"]]
    return Score(categories, sum(known) / max(1, len(known)), sum(ended for _, ended in found) / len(found), texts)


def sit(model, tokenizer, items, look=None, blind=False):
    """Put an exam to a model. look: of a model with eyes, what vision.looking gives; each picture is encoded once, a hundred at a time. blind: each
    question gets the picture of another. -> Score"""
    pictures, features = [item["image"] for item in items if "image" in item], None
    if look and pictures:
        different = list(dict.fromkeys(pictures))
        encoded = (one for at in range(0, len(different), 100) for one in look(different[at:at + 100]).split(1))
        seen = dict(zip(different, encoded))
        shown = iter([*pictures[len(pictures) // 2:], *pictures[:len(pictures) // 2]] if blind else pictures)
        features = [seen[next(shown)] if "image" in item else None for item in items]
    elif pictures:
        return score(model, tokenizer, items)  # which says that it cannot see
    return score(model, tokenizer, items, partial(answers, batch=BATCH, features=features))


def table(result):
    """A Score as lines to print."""
    lines = [f"{category:10} {100 * share.right:5.1f} % right (95 % interval {100 * share.low:.1f} to {100 * share.high:.1f}, {share.n} questions)"
             for category, share in result.categories.items()]
    return "\n".join([*lines, f"declined   {100 * result.declined:5.1f} % of the questions that have an answer",
                      f"ended      {100 * result.ended:5.1f} % of the answers by themselves"])
