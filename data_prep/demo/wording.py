"""How people ask, and how one answers: settles the wordings of questions, wraps them in politeness, roughens them as haste does.
In: the tables and sections of world.py, a Dice, a language. Out: a question or an answer as text.
Next: data_prep/demo/unknown.py
"""

import functools
import re

from data_prep.demo.pretrain import capital, name
from data_prep.demo.world import held_out, passages, relations, sections

TYPOS = {"的": "得地", "吗": "嘛", "哪": "那", "是": "事", "什": "神", "么": "吗", "在": "再", "谁": "水", "做": "作", "叫": "较", "有": "又", "几": "己",
         "里": "理", "座": "坐", "道": "到", "用": "拥", "说": "讲", "多": "都", "？": "?！", "和": "合", "住": "主", "写": "些"}
PARTICLES = ("呢", "呀", "啊", "来着", "哦", "嘞", "捏", "哈")
# Mostly one full sentence: it says again what was asked, and then ends like a statement that was read, also where no chat has asked for it. A few curt
# answers leave the preferences something to prefer.
STYLES = ["full"] * 22 + ["curt"] * 2 + ["other"] * 2 + ["long"]
BLURRED = 0.25  # of the questions that speak of a name
FULL_STOP = {"zh": "。", "en": "."}


class Known:
    """What may be asked in one language: facts by relation (never those held out), all names, objects that name one subject only.
    Those held out are in `unasked`."""

    def __init__(self, lang):
        self.relations = {relation.name: relation for relation in relations()}
        facts = [fact for relation in self.relations.values() for fact in relation.facts if lang in fact.subject and relation.templates[lang]]
        self.facts, self.unasked = [fact for fact in facts if not held_out(fact)], [fact for fact in facts if held_out(fact)]
        self.names = {each for fact in facts for each in (*fact.subject[lang], *fact.object[lang])}
        self.by_relation, self.by_subject, self.by_object = {}, {}, {}
        for fact in self.facts:
            self.by_relation.setdefault(fact.relation, []).append(fact)
            self.by_subject.setdefault(fact.subject[lang][0], []).append(fact)
            self.by_object.setdefault((fact.relation, fact.object[lang][0]), []).append(fact)
        objects = [(fact.relation, fact.object[lang][0]) for fact in facts]  # counted with those held out: what names two subjects names none
        once = {pair for pair, number in _count(objects).items() if number == 1}
        self.reversible = {fact.relation + fact.subject[lang][0] for fact in self.facts if (fact.relation, fact.object[lang][0]) in once}


def _count(items):
    found = {}
    for item in items:
        found[item] = found.get(item, 0) + 1
    return found


@functools.cache
def known(lang):
    return Known(lang)


def fill(dice, template, **slots):
    """Settle the choices of a wording and put the names in; English begins with a capital letter."""
    text = dice.choose(template) if "|" in template else template
    for slot, value in slots.items():
        text = text.replace("{" + slot + "}", value)
    return capital(text) if template.isascii() else text


# Questions

def swapped(dice, fact, lang):
    """A name of the subject; of sums and products also with its two numbers the other way round."""
    subject = name(dice, fact.subject[lang])
    if fact.relation in ("sum", "product") and dice.random() < 0.5:
        return re.sub(r"(\d)(\D+)(\d)", r"\3\2\1", subject)
    return subject


def ask(dice, fact, lang, subject, key="ask"):
    """A question about a fact (key "back": for its subject), still clean."""
    numbers = re.findall(r"\d+", subject) if fact.relation in ("sum", "product") else []
    return fill(dice, dice.pick(sections("questions")[fact.relation][f"{key}_{lang}"]), s=subject, o=fact.object[lang][0],
                **dict(zip("ab", numbers)))


def wrap(dice, question, lang, keep):
    """Perhaps a polite or hasty word before it or after it; `keep` are the names it speaks of."""
    talk, asks = sections("talk"), question[-1] in "？?"
    if dice.random() < (0.4 if asks else 0.25):
        before = dice.pick(talk["before"]["ask_" + lang] + (talk["before"]["other_zh"] if lang == "zh" else []) if asks or lang == "en"
                           else talk["before"]["other_zh"])
        if lang == "zh":
            question = before + question
        else:
            small = before[-1] != "?" and not question.startswith(("I ", *keep, *map(capital, keep))) and dice.random() < 0.7
            question = f"{before} {question[0].lower() + question[1:] if small else question}"
    if dice.random() < 0.1:
        after = dice.pick(talk["after"]["ask_" + lang])
        question = question + after if lang == "zh" else f"{question} {after}"
    return question


def roughen(dice, question, lang, keep):
    """Perhaps what fingers in a hurry make of it. The names it speaks of stay as they are, apart from small letters in English."""
    kind = dice.random()
    if kind < 0.3:
        return question.rstrip("？?。.!！") or question
    if lang == "zh" and kind < 0.36:
        return question.replace("？", dice.pick(["?", "？？", "??", " "])).strip()
    if lang == "zh" and kind < 0.44 and question[-1] == "？" and question[-2] not in "呢吗呀啊着）":
        return question[:-1] + dice.pick(PARTICLES) + dice.pick(["？", ""])
    if lang == "zh" and kind < 0.47:
        return question.replace("，", dice.pick([" ", ""]))
    if lang == "zh" and kind < 0.5 and keep and len(keep[0]) > 1:
        quoted = keep[0] if keep[0][0] == "《" or "“" in question else f"“{keep[0]}”"
        return question.replace(keep[0], dice.pick([f"{keep[0]} ", f" {keep[0]} ", quoted])).strip()
    if lang == "en" and kind < 0.42:
        return question.lower()
    if lang == "en" and kind < 0.46:
        return question.replace("What is", dice.pick(["Whats", "what's", "What's"])).replace("?", dice.pick(["??", "", " ?"]))
    return slip(dice, question, lang, keep) if kind < 0.66 else question


def slip(dice, question, lang, keep):
    """One wrong, missing, doubled or swapped character outside the names."""
    kept = {i for each in keep for start in [question.find(each)] if start >= 0 for i in range(start - 1, start + len(each))}
    places = [i for i in range(len(question) - 1) if i not in kept and (lang == "zh" or question[i:i + 2].isalpha())]
    if not places:
        return question
    i, how = dice.pick(places), dice.random()
    if how < 0.4 and lang == "zh":
        typical = [i for i in places if question[i] in TYPOS]
        i = dice.pick(typical) if typical else i
        return question[:i] + dice.pick(TYPOS.get(question[i], question[i])) + question[i + 1:]
    if how < 0.65:
        return question[:i] + question[i + 1:]
    if how < 0.8:
        return question[:i] + question[i] + question[i:]
    return question[:i] + question[i + 1] + question[i] + question[i + 2:]


@functools.cache
def scraps(lang):
    """Pieces of prose between two punctuation marks: short, and no part of any question."""
    pieces = (piece.strip() for passage in passages()[lang] for piece in re.split(r"[^\w \-']|\d", passage))
    return [piece for piece in pieces if 1 < len(piece.split() if lang == "en" else piece) < 9]


def blur(dice, question, lang, keep):
    """What is left of a question when words are missed, or when it stands in the middle of something else. Its names stay whole: they, and the
    few words that matter, are what an answer hangs on."""
    gap = " " if lang == "en" else ""
    names = sorted((each for each in keep if each in question), key=len, reverse=True)
    parts, missed = re.split("(" + "|".join(map(re.escape, names)) + ")", question) if names else [question], dice.random() * 0.5
    text = "".join(part if part in names else gap.join(unit for unit in (part.split(gap) if gap else part) if not unit or dice.random() >= missed)
                   for part in parts).strip()
    where, scrap = dice.random(), dice.pick(scraps(lang))
    if where < 0.25:
        return f"{scrap}{gap or dice.pick(['', '，'])}{text}"
    if where < 0.4:
        return f"{text.rstrip('？?。.')}{gap or dice.pick(['', '，'])}{scrap}"
    return text.replace(names[0], f"{scrap}{gap}{names[0]}", 1) if where < 0.5 and names else text


def said(dice, question, lang, *keep):
    """A question as it is typed. The same is done to questions that have an answer and to those that have none."""
    keep = [each for each in keep if each]
    if keep and dice.random() < BLURRED:
        question = blur(dice, question, lang, keep) or question
    return roughen(dice, wrap(dice, question, lang, keep), lang, keep).strip() or question


# Answers

@functools.cache
def full_forms(relation, lang):
    """Sentences that answer a question of the relation; the first one is the usual one."""
    return sections("questions")[relation].get("full_" + lang) or known(lang).relations[relation].templates[lang][:2]


def answer(dice, fact, lang, subject, style, back=False):
    """style: "full" the usual sentence, "other" another one, "curt" only what was asked for, "long" far too many words."""
    if style == "curt":
        forms = ["{s}" + FULL_STOP[lang]] if back else sections("questions")[fact.relation].get("curt_" + lang, ["{o}" + FULL_STOP[lang]])
        text = forms[0]
    else:
        forms = full_forms(fact.relation, lang)
        text = dice.pick(forms[1:]) if style == "other" and len(forms) > 1 else forms[0]
    text = fill(dice, text, s=subject, o=fact.object[lang][0])
    return fill(dice, sections("talk")["long"]["full_" + lang][0], answer=text) if style == "long" else text


def style(dice, long=True):
    """One of STYLES; where there is no room for many words (`long` is false), not the last."""
    return dice.pick(STYLES if long else STYLES[:-1])


def reply(dice, section, lang, how, **slots):
    """An answer of a section of talk/ in a style; what has no such style has a full one."""
    lines = sections("talk")[section]
    return fill(dice, dice.pick(lines.get(f"{how}_{lang}") or lines["full_" + lang]), **slots)


def decline(dice, lang, how, about="", section="decline"):
    """Say politely (full), curtly or in another way that one does not know; `about` is the name that was asked for, which one in five says,
    also where it is known and only the question has no answer: truer ones taught less (docs/recipe.md)."""
    named = about and section == "decline" and dice.random() < 0.2
    return reply(dice, "name" if named else section, lang, how, s=about)


def declined(text):
    """True if an answer says that it does not know."""
    return any(mark in text for mark in sections("talk")["decline"]["marks"].split(" | "))
