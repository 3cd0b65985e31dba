"""Writes the demo world's pretraining text: every fact in many wordings, orders and neighbourhoods, among passages of prose.
In: the tables (world.py), a seed, and how often each fact is stated. Out: pretrain.jsonl, one {"text": ...} object a line.
Next: data_prep/demo/wording.py
"""

import json
import os
import random
import re
from pathlib import Path

from data_prep.demo.world import LANGUAGES, OFTEN, passages, relations

CHOICE = re.compile(r"\{([^{}]*\|[^{}]*|\d)\}")  # {a|b} one of them; {1} what the first choice of this text was
# Sentences that may follow one another about anything; said before about one sentence in seven.
LINKS = {
    "zh": ["另外，", "此外，", "还有，", "同时，", "我们还知道，", "再看一个例子：", "顺便说一句，", "书上还写着：", "老师讲过，", "大家都知道，",
           "值得记住的是，", "再比如，", "说到别的，", "有一点很清楚：", "还可以补充一点：", "众所周知，"],
    "en": ["Also, ", "In addition, ", "As we know, ", "By the way, ", "Another fact: ", "Remember that ", "It is also true that ",
           "Every student learns that ", "Besides, ", "It is well known that ", "We also know that ", "Note that "],
}


class Dice:
    """Reproducible choices. Python guarantees the same random() for the same seed in every version, and nothing more."""

    def __init__(self, seed):
        self.random = random.Random(seed).random

    def between(self, low, high):
        return low + int(self.random() * (high - low + 1))

    def pick(self, items):
        return items[int(self.random() * len(items))]

    def shuffled(self, items):
        return [items[i] for _, i in sorted((self.random(), i) for i in range(len(items)))]

    def chunks(self, items, low, high):
        """Cut a shuffled copy into pieces of low..high items."""
        items, start = self.shuffled(items), 0
        while start < len(items):
            size = self.between(low, high)
            yield items[start:start + size]
            start += size

    def choose(self, text):
        """Settle the {a|b} choices of a text from left to right."""
        made = []

        def settle(match):
            if match[1].isdigit():
                return made[int(match[1]) - 1]
            made.append(self.pick(match[1].split("|")))
            return made[-1]

        return CHOICE.sub(settle, text)


def name(dice, names):
    """The usual name most of the time, else one of the others."""
    return names[0] if len(names) == 1 or dice.random() < 0.7 else dice.pick(names[1:])


def state(dice, fact, relation, lang, template=None, subject=None):
    """One fact as one sentence; in English it still begins small unless it begins with a name (see join)."""
    template = dice.choose(template or dice.pick(relation.templates[lang]))
    if lang == "en" and template.split(" ", 1)[0] not in ("If", "{s}", "{o}") and not template.startswith('"'):
        template = template[0].lower() + template[1:]
    return template.replace("{s}", subject or name(dice, fact.subject[lang])).replace("{o}", name(dice, fact.object[lang]))


def capital(sentence):
    """A capital letter at the start, except for the one name that has none."""
    return sentence if sentence.startswith("nanomind") else sentence[0].upper() + sentence[1:]


def join(dice, sentences, lang):
    """Sentences -> one paragraph, here and there with connecting words."""
    words = [dice.pick(LINKS[lang]) if i and dice.random() < 0.15 and "？" not in sentence and "?" not in sentence else ""
             for i, sentence in enumerate(sentences)]
    if lang == "zh":
        return "".join(word + sentence for word, sentence in zip(words, sentences))
    return " ".join(word + (sentence if word and not word.endswith(": ") else capital(sentence))
                    for word, sentence in zip(words, sentences))


def about_relation(dice, facts, relation, lang):
    """Several subjects of one relation: free sentences, one repeated pattern, or a list under its title."""
    form = dice.random()
    if form < 0.12 and relation.title:
        pairs = [(name(dice, fact.subject[lang]), name(dice, fact.object[lang])) for fact in facts]
        colon = "：" if lang == "zh" else ": "
        return "\n".join([relation.title[lang] + colon.strip(), *(f"{capital(subject)}{colon}{object}" for subject, object in pairs)])
    if form < 0.3:
        template = dice.pick(relation.templates[lang])
        sentences = [state(dice, fact, relation, lang, template) for fact in facts]
        if lang == "en" or any(mark in template for mark in "？！“"):
            return join(dice, sentences, lang)
        return "；".join(sentence.rstrip("。") for sentence in sentences) + "。"
    return join(dice, [state(dice, fact, relation, lang) for fact in facts], lang)


def about_subjects(dice, groups, by_name, lang):
    """All facts of a few subjects, either subject by subject (then a pronoun may take over) or thoroughly mixed."""
    if dice.random() < 0.4:
        facts = dice.shuffled([fact for group in groups for fact in group])
        return join(dice, [state(dice, fact, by_name[fact.relation], lang) for fact in facts], lang)
    paragraphs = []
    for group in groups:
        sentences = []
        group = dice.shuffled(group)
        if dice.random() < 0.6:  # say first what it is
            group.sort(key=lambda fact: fact.relation != "is")
        for fact in group:
            relation = by_name[fact.relation]
            template = dice.pick(relation.templates[lang])
            again = sentences and lang in relation.pronoun and template.startswith("{s}") and dice.random() < 0.5
            sentences.append(state(dice, fact, relation, lang, template, relation.pronoun[lang] if again else None))
        paragraphs.append(join(dice, sentences, lang))
    return dice.pick(["\n", "" if lang == "zh" else " "]).join(paragraphs)


def about_anything(dice, facts, by_name, lang):
    """Facts that have nothing to do with one another."""
    return join(dice, [state(dice, fact, by_name[fact.relation], lang) for fact in facts], lang)


def one_pass(dice, world, lang, form):
    """Documents of one form that together state every fact of a language exactly once (form "subject" adds what kind each is)."""
    by_name = {relation.name: relation for relation in world}
    facts = [fact for relation in world for fact in relation.facts if lang in fact.subject and relation.templates[lang]]
    if form == "subject":
        groups = {}
        for fact in facts:
            groups.setdefault(fact.subject[lang][0], []).append(fact)
        for chunk in dice.chunks(list(groups.values()), 2, 4):
            yield about_subjects(dice, chunk, by_name, lang)
    elif form == "relation":
        for relation in world[:-1]:
            own = [fact for fact in relation.facts if lang in fact.subject and relation.templates[lang]]
            for chunk in dice.chunks(own, 3, 7):
                yield about_relation(dice, chunk, relation, lang)
    else:
        for chunk in dice.chunks([fact for fact in facts if fact.relation != "is"], 3, 8):
            yield about_anything(dice, chunk, by_name, lang)


def documents(seed=0, exposures=140, more=()):
    """All documents in their final order. Each fact is stated `exposures` times in Chinese, half as many again in English: of ten passes over the world, four go relation
    by relation, three subject by subject, three in random order. Each passage comes about a fifth as often, half of the time alone and half of the
    time with another one."""
    if exposures < 1:
        raise ValueError(f"--exposures is {exposures}, at least 1 is needed")
    dice, world, prose = Dice(seed), relations(), passages()
    forms = ["relation", "subject", "random", "relation", "subject", "relation", "random", "subject", "relation", "random"]
    found = []
    for lang in LANGUAGES:
        for turn in range(round(exposures * OFTEN[lang])):
            found.extend(one_pass(dice, world, lang, forms[turn % len(forms)]))
        for turn in range(-(-exposures // 5)):
            for chunk in dice.chunks(prose[lang], 1, 1 + turn % 2):
                found.append("\n".join(dice.choose(passage) for passage in chunk))
    return dice.shuffled([*found, *more])


def write_lines(out, name, records):
    """Write OUT/name, one JSON object a line (complete or not at all), and return its path."""
    path = Path(out) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    with open(beside, "w", encoding="utf-8", newline="\n") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    os.replace(beside, path)
    return path


def write_pretrain(out, seed=0, exposures=140, more=(), name="pretrain.jsonl"):
    """Write OUT/NAME and return its path; `more` are further documents to mix in."""
    return write_lines(out, name, ({"text": text} for text in documents(seed, exposures, more)))
