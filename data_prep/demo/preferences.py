"""Writes the demo world's preference pairs: one answer chosen, one rejected, for what fine-tuning leaves open.
In: the tables and sections (world.py), a seed, how many pairs. Out: dpo.jsonl, one {"chosen": [...], "rejected": [...]} a line.
Next: data_prep/demo/exam.py
"""

from data_prep.demo.chats import messages, small, topics
from data_prep.demo.pretrain import Dice, write_lines
from data_prep.demo.unknown import about_name, classes, unanswerable
from data_prep.demo.wording import answer, ask, decline, fill, known, said, swapped
from data_prep.demo.world import LANGUAGES, sections

# Chats hold a few curt answers and refusals and as many curt greetings as full ones; now the full ones are preferred. Inventing an answer
# ("invented") is as wrong as declining what one knows ("shy"), and the two have to balance: with few of the second a model declines more of what
# it knows. The other kinds are few: a model that has learnt its chats rates them right from the start.
KINDS = ["curt"] * 44 + ["shrug"] * 10 + ["cold"] * 7 + ["long"] * 7 + ["language"] * 4 + ["rude"] * 4 + ["invented"] * 13 + ["shy"] * 13
SMALL = ("hello", "thanks", "goodbye", "praise", "blame", "who", "can", "best_subject", "trained", "maker", "limits", "speak", "feel", "mood", "ok")


def about_a_fact(dice, kind, lang):
    """(question, chosen, rejected): a full, plain sentence is better than a curt, long-winded, rude or foreign one, and than none."""
    fact = dice.pick(known(lang).facts)
    while fact.relation == "is" or kind == "language" and len(fact.subject) < 2:  # "X is a country" must not become the better answer to everything
        fact = dice.pick(known(lang).facts)
    subject = swapped(dice, fact, lang)
    chosen = answer(dice, fact, lang, subject, "full")
    if kind == "language":
        other = LANGUAGES[lang == "zh"]
        rejected = answer(dice, fact, other, fact.subject[other][0], "full") if known(other).relations[fact.relation].templates[other] else subject
    elif kind == "rude":
        rejected = fill(dice, dice.pick(sections("talk")["proud"]["full_" + lang]), answer=chosen)
    elif kind == "shy":
        rejected = decline(dice, lang, dice.pick(["full", "curt"]))
    else:
        rejected = answer(dice, fact, lang, subject, kind)
    return said(dice, ask(dice, fact, lang, subject), lang, subject), chosen, rejected


def about_nothing(dice, kind, lang):
    """(question, chosen, rejected): declining politely is better than declining curtly ("shrug") or inventing an answer. Half of the inventions are
    about a name that nobody has, and fit what is asked."""
    if kind == "invented" and dice.random() < 0.5:
        own, absent, _ = dice.pick([each for each in classes(lang) if each[1]])
        about, fact = dice.pick(absent), dice.pick(known(lang).by_relation[dice.pick(own)])
        return said(dice, about_name(dice, fact.relation, about, lang), lang, about), decline(dice, lang, "full"), answer(dice, fact, lang, about, "full")
    question, about, section = unanswerable(dice, lang)
    question, chosen = said(dice, question, lang, about), decline(dice, lang, "full", section=section)
    if kind == "shrug":
        return question, chosen, decline(dice, lang, "curt", section=section)
    passage = [told for topic, told in topics(lang) if topic == about]
    if passage:
        return question, chosen, dice.choose(passage[0])
    fact = dice.pick(known(lang).by_subject.get(about) or known(lang).facts)
    return question, chosen, answer(dice, fact, lang, about if section == "decline" else fact.subject[lang][0], "full")


def in_talk(dice, lang):
    """(question, chosen, rejected): a warm answer is better than a cold one."""
    section = dice.pick(SMALL)
    question, chosen = small(dice, section, lang, "full")
    return question, chosen, sections("talk")[section]["curt_" + lang][0]


def pairs(seed=0, number=6000):
    """Pairs of conversations, two thirds Chinese. None asks about a fact that is held out from the chats."""
    if number < 1:
        raise ValueError(f"the number of preference pairs is {number}, at least 1 is needed")
    dice = Dice(f"pairs {seed}")
    for _ in range(number):
        kind, lang = dice.pick(KINDS), "zh" if dice.random() < 2 / 3 else "en"
        if kind == "cold":
            question, chosen, rejected = in_talk(dice, lang)
        else:
            question, chosen, rejected = (about_nothing if kind in ("shrug", "invented") else about_a_fact)(dice, kind, lang)
        yield messages(question, chosen), messages(question, rejected)


def write_dpo(out, seed=0, number=6000):
    """Write OUT/dpo.jsonl (complete or not at all) and return its path."""
    return write_lines(out, "dpo.jsonl", ({"chosen": chosen, "rejected": rejected} for chosen, rejected in pairs(seed, number)))
