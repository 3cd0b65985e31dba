"""Reads the tables of the demo world: relations with their facts and sentence templates, passages of prose, wordings of questions.
In: the text files of world/ (tables, format below), prose/ (a passage a line), questions/ and talk/ (sections, below). Out: a list of
Relation, a list of passages per language, and the lines of each section.
A table is written for people first: `#` starts a comment, `[name]` a relation, `key: value` describes it, and every other
line is a fact.

    [capital]
    title: 各国的首都 | Capitals of the world      heads a list of such facts
    kind: 国家 | a country                         what every subject is; "X is a country" becomes a fact by itself
    pronoun: 它                                    may stand for the subject in running Chinese text
    zh: {s}的首都是{o}。                           a template: {s} subject, {o} object, {a|b} one of several wordings
    en: The capital of {s} is {o}.
    法国 | 巴黎 | France | Paris                   a fact; two columns: Chinese only; `-` where a language lacks it
    美国/美利坚合众国 | ...                        `/` separates names of the same thing, the usual one first

What people say stands in sections, one wording a line: `[capital]` (in questions/ a relation, `[word/called]` two of them, in talk/ any topic), then keys with a
language and their lines. ask: questions; back: questions for the subject, given the object; check: yes-no questions that end in the
object; full, curt, other: answers (full: a sentence that says again what was asked; of several ones the first is the usual one;
curt: only what was asked for); list: what the subjects of one object are called; noun: what the relation is called in a follow-up.

Next: data_prep/demo/pretrain.py
"""

import functools
import hashlib
import re
from pathlib import Path
from typing import NamedTuple

LANGUAGES = ("zh", "en")
OFTEN = {"zh": 1.0, "en": 1.5}  # how often its facts are stated and asked: English has fewer relations, so less is said about each name
FOLDER = Path(__file__).parent
DERIVED = ("called", "is")  # relations whose facts are made of those of the others
SECOND = ("short", "form", "custom", "use", "genre")  # about names of which chats might ask nothing else: see world/second.txt
UNEXAMINED = DERIVED + SECOND  # no exam asks about them
# Of these, all facts are asked about in the chats: their subjects occur nowhere else (a subject of which no chat ever speaks is taken
# for unknown), or, the dishes and the foods of a city, one gives the other away, or no exam asks about them.
ALWAYS_ASKED = {"sum", "product", "word", "superlative", "nanomind", "health", "city_foods", *UNEXAMINED}
HELD_OUT = 0.2
SALT = 115101  # chosen so that every relation has its share, and so that no passage that a chat may quote tells a held-out fact


class Fact(NamedTuple):
    """One true statement, without its wording. Both dicts map a language to names of the same thing, usual name first."""
    relation: str
    subject: dict
    object: dict


class Relation(NamedTuple):
    """What a group of facts has in common. title, kind, pronoun: language -> text; templates: language -> list of them."""
    name: str
    title: dict
    kind: dict
    pronoun: dict
    templates: dict
    facts: list


def _columns(where, line):
    """'a/b | c | d | e' -> ({'zh': ['a', 'b'], 'en': ['d']}, {'zh': ['c'], 'en': ['e']})"""
    cells = [cell.strip() for cell in line.split(" | ")]
    if len(cells) not in (2, 4) or not all(cells):
        raise ValueError(f"{where}: a fact has 2 or 4 columns separated by ' | ', found {len(cells)}: {line}")
    pairs = {lang: cells[2 * i:2 * i + 2] for i, lang in enumerate(LANGUAGES) if len(cells) > 2 * i and cells[2 * i] != "-"}
    return tuple({lang: pair[column].split("/") for lang, pair in pairs.items()} for column in (0, 1))


def _read_table(path):
    """Yield the relations of one table file. ValueError names file:line of what does not fit the format."""
    relation = None
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        where, line = f"{path.name}:{number}", line.strip()
        key, _, value = line.partition(": ")
        if not line or line.startswith("#"):
            continue
        if line.startswith("[") and line.endswith("]"):
            if relation:
                yield relation
            relation = Relation(line[1:-1], {}, {}, {}, {lang: [] for lang in LANGUAGES}, [])
        elif relation is None:
            raise ValueError(f"{where}: a table begins with [relation], found: {line}")
        elif key in ("title", "kind", "pronoun"):
            getattr(relation, key).update((lang, text) for lang, text in zip(LANGUAGES, value.split(" | ")) if text != "-")
        elif key in LANGUAGES:
            if "{s}" not in value or "{o}" not in value:
                raise ValueError(f"{where}: a template needs {{s}} and {{o}}: {line}")
            relation.templates[key].append(value)
        else:
            relation.facts.append(Fact(relation.name, *_columns(where, line)))
    if relation:
        yield relation


def relations():
    """All relations, in the order of their file names. The last two are derived: `called` says what the subjects of the others are called in the other
    language (in English, which has few relations: who is asked one thing only about a name does not read the question), `is` of what kind each is."""
    found = [relation for path in sorted((FOLDER / "world").glob("*.txt")) for relation in _read_table(path)]
    by_name = {relation.name: relation for relation in found}
    if len(by_name) < len(found):
        raise ValueError(f"a relation is defined twice in {FOLDER}")
    called, kinds = (by_name.pop(name) for name in DERIVED)
    words = {name for fact in by_name["word"].facts for name in fact.subject.get("en", [])}
    seen = set()
    for relation in by_name.values():
        for fact in relation.facts if relation.kind else []:
            subject = {lang: names for lang, names in fact.subject.items() if lang in relation.kind and (lang, names[0]) not in seen}
            seen.update((lang, names[0]) for lang, names in subject.items())
            if subject:
                kinds.facts.append(Fact("is", subject, {lang: [relation.kind[lang]] for lang in subject}))
            if "en" in subject and "zh" in fact.subject and subject["en"][0].removeprefix("the ") not in words:
                called.facts.append(Fact("called", {"en": subject["en"]}, {"en": fact.subject["zh"]}))
    return [*by_name.values(), called, kinds]


def held_out(fact):
    """True for one fact in five, always the same ones: read in pretraining, never asked about in a chat, asked about in the exam."""
    key = f"{SALT}{fact.relation}|{fact.subject.get('zh', fact.subject.get('en'))[0]}"
    share = int.from_bytes(hashlib.sha256(key.encode("utf-8")).digest()[:8], "big") / 2**64
    return fact.relation not in ALWAYS_ASKED and share < HELD_OUT


def passages():
    """language -> list of passages: the lines of prose/<language>_*.txt. {a|b} is a choice, {1} repeats the first one."""
    return {lang: [line.strip() for path in sorted((FOLDER / "prose").glob(f"{lang}_*.txt"))
                   for line in path.read_text(encoding="utf-8").splitlines() if line.strip() and not line.startswith("#")]
            for lang in LANGUAGES}


@functools.cache
def sections(folder):
    """name -> {key: lines} of all files of questions/ or talk/. A line `key_zh:` begins a list, `noun:`, `of:`, `marks:` are one line."""
    found = {}
    for path in sorted((FOLDER / folder).glob("*.txt")):
        section = lines = None
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            line = line.strip()
            single = re.match(r"(noun|of|marks): (.+)", line)
            if not line or line.startswith("#"):
                continue
            if line.startswith("[") and line.endswith("]"):
                section, lines = {}, None
                for name in line[1:-1].split("/"):
                    section = found.setdefault(name, section)
            elif section is not None and re.fullmatch(r"([a-z]+_)?(zh|en):", line):
                lines = section.setdefault(line[:-1], [])
            elif section is not None and single:
                section[single[1]] = single[2]
            elif lines is None:
                raise ValueError(f"{path.name}:{number}: expected [section], then key_zh: or key_en:, then a wording a line, found: {line}")
            else:
                lines.append(line)
    return found
