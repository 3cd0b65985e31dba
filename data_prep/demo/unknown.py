"""Questions that the demo world cannot answer: absent and misheard names, things its subjects lack, and what lies far from it.
In: the classes of talk/unknown.txt and the tables. Out: (question, the name it asks about, the section that declines).
Next: data_prep/demo/chats.py
"""

import functools

from data_prep.demo.world import sections
from data_prep.demo.wording import ask, fill, known

# Asked about a subject of another class, these are plainly senseless ("the capital of the octopus").
SENSELESS = ("capital", "author", "symbol", "inventor", "festival_date", "language", "planet_order")
PHRASES = {"health", "superlative"}  # their subjects are no names
KINDS = ["absent"] * 34 + ["misheard"] * 15 + ["lacks"] * 22 + ["told"] * 12 + ["far"] * 13 + ["strange"] * 12 + ["senseless"] * 5 + ["bigger"] * 5


@functools.cache
def all_classes(lang):
    """(relations that exist in the language, absent names, questions about what the subjects lack) of each class."""
    found = []
    for section in sections("talk").values():
        if "of" in section:
            names = "/".join(section.get("absent_" + lang, [])) if lang == "en" else " ".join(section.get("absent_zh", []))
            own = [each for each in section["of"].split() if each in known(lang).by_relation]
            found.append((own, [each for each in names.split("/" if lang == "en" else " ") if each], section.get("lacks_" + lang, [])))
    return found


@functools.cache
def classes(lang):
    """Those of which the world holds something."""
    return [each for each in all_classes(lang) if each[0]]


@functools.cache
def told(lang):
    """(name that the prose tells much of, questions about what it does not tell) in the language."""
    found = [(section.get("told_" + lang, []), section.get("lacks_" + lang)) for section in sections("talk").values()]
    return [(name, lacks) for names, lacks in found for line in names for name in line.split("/" if lang == "en" else " ")]


def misheard(dice, relation, lang):
    """A name that nobody has: two halves of known ones, or a known one with one wrong character. None where that is a sentence."""
    names = [fact.subject[lang][0] for fact in known(lang).by_relation[relation]]
    for _ in range(0 if relation in PHRASES else 8):
        one, two = (dice.pick(names).strip("《》").removeprefix("the ") for _ in range(2))
        if len(one) > (6 if lang == "zh" else 14) or " " in one + two or len(one) < 2:
            continue
        if dice.random() < 0.5 or lang == "en":
            made = one[:(len(one) + 1) // 2] + two[len(two) // 2:]
        else:
            i = dice.between(0, len(one) - 1)
            made = one[:i] + dice.pick(two) + one[i + 1:]
        made = f"《{made}》" if names[0][0] == "《" else made
        if made not in known(lang).names and made != one and len(made) > 1:
            return made
    return None


def unanswerable(dice, lang):
    """(question, name in it, section of talk/ that declines it)"""
    kind = dice.pick(KINDS)
    own, absent, lacks = dice.pick(classes(lang))
    if kind in ("absent", "misheard"):
        relation = "is" if dice.random() < 0.12 else dice.pick(own)
        made = misheard(dice, dice.pick(own), lang) if kind == "misheard" else None
        made = made or (dice.pick(absent) if absent else None)
        if made:
            return about_name(dice, relation, made, lang), made, "decline"
    if kind == "lacks":
        while not lacks:
            own, absent, lacks = dice.pick(classes(lang))
        relation = dice.pick(own)
        subject = dice.pick([fact for fact in known(lang).facts + known(lang).unasked if fact.relation == relation]).subject[lang][0]
        return fill(dice, dice.pick(lacks), s=subject), subject, "decline"
    if kind == "told":
        subject, lacks = dice.pick(told(lang))
        return fill(dice, dice.pick(lacks), s=subject), subject, "decline"
    if kind == "strange":  # of a class the world has nothing of
        _, absent, lacks = dice.pick([each for each in all_classes(lang) if not each[0] and each[1] and each[2]])
        made = dice.pick(absent)
        return about_name(dice, "is", made, lang) if dice.random() < 0.2 else fill(dice, dice.pick(lacks), s=made), made, "decline"
    if kind == "senseless":
        relation = dice.pick([each for each in SENSELESS if each in known(lang).by_relation])
        classed = [each for each in classes(lang) if relation not in each[0] and not PHRASES & set(each[0])]
        subject = dice.pick(known(lang).by_relation[dice.pick(dice.pick(classed)[0])]).subject[lang][0]
        if len(subject) < (9 if lang == "zh" else 24) and subject not in {fact.subject[lang][0] for fact in known(lang).by_relation[relation]}:
            return about_name(dice, relation, subject, lang), subject, "decline"
    if kind == "bigger":
        one, two = str(dice.between(23, 999)), str(dice.between(12, 999))
        return fill(dice, dice.pick(sections("talk")["bigger"]["ask_" + lang]), a=one, b=two), one, "bigger"
    return fill(dice, dice.pick(sections("talk")["far"]["ask_" + lang])), "", "far"


def about_name(dice, relation, subject, lang):
    """A question of a relation about a name that is not among its subjects."""
    return ask(dice, known(lang).by_relation[relation][0], lang, subject)
