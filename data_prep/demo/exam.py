"""Writes the demo world's exams: its facts asked in wordings that no training text uses, and questions that it cannot answer.
In: exam/first.txt and exam/second.txt (wordings, hand-written, frozen), exam/accept.txt (what else is true), the tables (world.py).
Out: exam-first.jsonl and exam-second.jsonl, a question a line: {"question", "answers", "ignore", "category", "lang"}.
Next: data_prep/demo/scenes.py
"""

import hashlib
import json
import re
from pathlib import Path

from data_prep.demo.pretrain import capital
from data_prep.demo.world import FOLDER, LANGUAGES, UNEXAMINED, held_out, relations
from nanomind.tokenizer import write_whole

SETS = ("first", "second")  # looked at while tuning; scored once, at the end
COUNTS = {"seen": {"zh": 240, "en": 160}, "read": {"zh": 180, "en": 140}}  # facts that chats ask about; facts only read in pretraining
UNKNOWN = ("absent", "attribute", "elsewhere")  # not in this world: an unheard name, a known one with an unheard attribute, neither
LISTS = ("city_foods",)  # each member of such an object is a right answer


def _sections(name):
    """Yield (file:line, section, line) of a file of exam/."""
    path, section = FOLDER / "exam" / name, None
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("[") and line.endswith("]"):
            section = line[1:-1]
        elif line and not line.startswith("#"):
            yield f"{path.name}:{number}", section, line


def wordings(which):
    """section -> language -> wordings of a set; a section is a relation or one of UNKNOWN."""
    found = {}
    for where, section, line in _sections(f"{which}.txt"):
        lang, _, text = line.partition(": ")
        if lang not in LANGUAGES or section not in UNKNOWN and "{s}" not in text:
            raise ValueError(f"{where}: expected `zh: ` or `en: ` and a wording with {{s}}, found: {line}")
        found.setdefault(section, {lang: [] for lang in LANGUAGES})[lang].append(text)
    return found


def accepted():
    """(relation, usual name of a subject or object) -> what is right too; None: not to be asked about."""
    found = {}
    for where, relation, line in _sections("accept.txt"):
        name, bar, more = line.partition(" | ")
        if not bar or (relation, name) in found:
            raise ValueError(f"{where}: expected one `name | more/more` for each name, found: {line}")
        found[relation, name] = None if more == "-" else more.split("/")
    return found


def chinese_number(number):
    """The numeral of 2..99: 21 -> 二十一."""
    tens, ones = divmod(number, 10)
    digits = ["", *"一二三四五六七八九"]
    return (digits[tens] if tens > 1 else "") + ("十" if tens else "") + digits[ones]


def answers(fact, lang, more):
    """Everything that is a right answer to a question about a fact; none when it is not to be asked."""
    extra = [more.get((fact.relation, names[lang][0]), []) for names in (fact.subject, fact.object)]
    if None in extra:
        return []
    if fact.relation == "word":  # whose names are those of both languages: keep what is of the object's
        extra = [[text for text in texts if text.isascii() == (lang == "zh")] for texts in extra]
    found = list(fact.object[lang])
    for text in fact.object[lang]:
        bare = re.sub(r"^(a|an|the|about) ", "", text) if lang == "en" else text.removesuffix("左右")
        found.append(bare)
        if fact.relation in LISTS:
            found += re.split("[、和]", text) if lang == "zh" else [part for piece in text.split(", ") for part in piece.split(" and ", 1)]
        if lang == "zh" and text.isdecimal() and 1 < int(text) < 100:  # 一 is in 一种, 一个
            found.append(chinese_number(int(text)))
    return list(dict.fromkeys(found + extra[0] + extra[1]))


def ignored(fact, lang, right, relation):
    """Names in which a right answer is only a part: the subject itself (黑 in 黑龙江), and other objects of the relation (柏林 in 都柏林)."""
    pieces = re.compile("|".join(rf"(?<![A-Za-z0-9]){re.escape(text)}(?![A-Za-z0-9])" for text in right))
    others = [name for other in relation.facts if lang in other.object for name in other.object[lang] if name not in right and pieces.search(name)]
    return list(dict.fromkeys(fact.subject[lang] + others))


def _shuffled(items, *key):
    """In the order of a hash, so that a new fact or wording leaves the others where they are."""
    return sorted(items, key=lambda item: hashlib.sha256("\t".join([*key, str(item)]).encode()).hexdigest())


def questions(which):
    """All questions of a set. One relation after the other gives a fact, round and round, until there are enough; the wordings take turns."""
    asked, more, found = wordings(which), accepted(), []
    world = [relation for relation in relations() if relation.name not in UNEXAMINED]
    turns, by_name = {}, {relation.name: relation for relation in world}  # (relation, language) -> its wordings used so far
    for category, counts in COUNTS.items():
        for lang, count in counts.items():
            queues = [[fact for fact in _shuffled(relation.facts, which, lang) if lang in fact.subject and held_out(fact) == (category == "read")
                       and answers(fact, lang, more)] for relation in world]
            rounds = [queue[turn] for turn in range(max(map(len, queues))) for queue in queues if turn < len(queue)]
            for fact in rounds[:count]:
                own, turn = _shuffled(asked[fact.relation][lang], which), turns.get((fact.relation, lang), 0)
                turns[fact.relation, lang] = turn + 1
                text = own[turn % len(own)].replace("{s}", fact.subject[lang][0])
                right = answers(fact, lang, more)
                found.append({"question": capital(text) if lang == "en" else text, "answers": right,
                              "ignore": ignored(fact, lang, right, by_name[fact.relation]), "category": category, "lang": lang})
    for section in UNKNOWN:
        for lang in LANGUAGES:
            found += [{"question": re.sub("[{}]", "", text), "answers": [], "category": "unknown", "lang": lang}
                      for text in asked[section][lang]]
    return found


def write_exam(out):
    """Write the exam files into the folder `out` (each complete or not at all) and return their paths."""
    paths = [Path(out) / f"exam-{which}.jsonl" for which in SETS]
    for which, path in zip(SETS, paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in questions(which)))
    return paths
