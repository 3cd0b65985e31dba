"""Writes the demo world's chats: questions about its facts in many wordings, follow-ups, lists, explanations, small talk, and polite refusals.
In: the tables and sections (world.py), a seed, and how often each fact is asked about. Out: sft.jsonl, one {"conversations": [...]} a line.
Next: data_prep/demo/preferences.py
"""

import functools

from data_prep.demo.pretrain import Dice, capital, join, state, write_lines
from data_prep.demo.unknown import classes, unanswerable
from data_prep.demo.wording import FULL_STOP, answer, ask, decline, fill, known, reply, said, style, swapped
from data_prep.demo.world import LANGUAGES, OFTEN, UNEXAMINED, passages, sections

REFUSED = {"zh": 0.24, "en": 0.17}  # of all conversations of a language; at a fifth of both, Chinese invented more and English declined more (recipe.md)
# A greedy answer declines when one beginning of a refusal is likelier than the beginning of an answer, so nearly all refusals begin alike
REFUSALS = ["full"] * 8 + ["curt", "other"]
READ, MENTION = 0.14, 0.06  # of those about something: the answer stands before the question; of the former 0.08 taught less (recipe.md)
FEW = 25  # facts: of a relation with fewer each is asked about twice as often, or its questions would be rare
AUTOMATIC = ("who", "best_subject", "madman", "cough", "light", "hangzhou", "llm", "chatgpt", "usa")  # the questions of sample.py
SMALL = ("hello", "thanks", "goodbye", "praise", "blame", "who", "can", "best_subject", "trained", "maker", "limits", "speak", "feel", "mood", "bored", "ok")
NUMBERS = {"zh": {2: "两", 3: "三", 4: "四", 5: "五"}, "en": {2: "two", 3: "three", 4: "four", 5: "five"}}
KINDS = {"zh": ("个", "个", "种"), "en": ("",)}
SYSTEMS = {"zh": ("你是一个乐于助人的助手。", "你是nanomind，一个友好的助手。"), "en": ("You are a helpful assistant.", "You are nanomind, a friendly assistant.")}


def messages(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


# About facts

def single(dice, fact, lang, how=None):
    """(question, answer, subject) of one fact, asked straight, backwards, as yes or no, or as a choice of two."""
    words, how = sections("questions")[fact.relation], how or style(dice)
    subject, kind = swapped(dice, fact, lang), dice.random()
    if kind < 0.12 and "back_" + lang in words and fact.relation + fact.subject[lang][0] in known(lang).reversible:
        return said(dice, ask(dice, fact, lang, subject, "back"), lang, fact.object[lang][0]), answer(dice, fact, lang, subject, how, back=True), subject
    if kind > 0.92 and "check_" + lang in words:
        return *checked(dice, fact, lang, subject), subject
    return said(dice, ask(dice, fact, lang, subject), lang, subject), answer(dice, fact, lang, subject, how), subject


def checked(dice, fact, lang, subject):
    """A yes-no question with the right object or another one of the relation, or a choice between the two."""
    right = fact.object[lang][0]
    wrong = dice.pick(known(lang).by_relation[fact.relation]).object[lang][0]
    while wrong == right:
        wrong = dice.pick(known(lang).by_relation[fact.relation]).object[lang][0]
    template, kind = dice.pick(sections("questions")[fact.relation]["check_" + lang]), dice.random()
    if kind < 0.4:
        one, two = dice.shuffled([right, wrong])
        template = template.replace("{o}", "{o}还是{x}").replace("吗？", "？") if lang == "zh" else template.replace("{o}", "{o} or {x}")
        return said(dice, fill(dice, template, s=subject, o=one, x=two), lang, subject, one, two), answer(dice, fact, lang, subject, style(dice, long=False))
    if lang == "zh" and "是{o}吗" in template and dice.random() < 0.4:
        template = template.replace("是{o}吗", "是不是{o}")
    told = right if kind < 0.7 else wrong
    question = said(dice, fill(dice, template, s=subject, o=told), lang, subject, told)
    yes = dice.pick(sections("talk")["check"][f"{'yes' if kind < 0.7 else 'no'}_{lang}"])
    return question, fill(dice, yes, answer=answer(dice, fact, lang, subject, "full"))


def several(dice, fact, lang):
    """A question and what may follow it: the same of something else, something else of the same, doubt, thanks, a thing nobody knows."""
    question, told, subject = single(dice, fact, lang, style(dice, long=False))
    while told in ("是的。", "Yes."):
        question, told, subject = single(dice, fact, lang, style(dice, long=False))
    texts = [question, told]
    for _ in range(dice.pick([1, 1, 1, 2, 2, 3])):
        turn, fact, subject = following(dice, fact, lang, subject)
        texts += turn
    return messages(*texts)


def following(dice, fact, lang, subject):
    """One more question and its answer; and the fact and the name that are then spoken of."""
    world, talk, kind = known(lang), sections("talk"), dice.random()
    how = style(dice, long=False)
    he = world.relations[fact.relation].pronoun.get(lang, "它") if lang == "zh" else "it"
    others = [other for other in world.by_subject[fact.subject[lang][0]] if other.relation != fact.relation and "noun" in sections("questions")[other.relation]]
    if kind < 0.45 and others:
        other = dice.pick(others)
        noun = sections("questions")[other.relation]["noun"].split(" | ")[LANGUAGES.index(lang)]
        return [said(dice, fill(dice, dice.pick(talk["follow"]["ask_" + lang]), n=noun, p=he), lang, noun), answer(dice, other, lang, subject, how)], other, subject
    if kind < 0.7:
        other = dice.pick(world.by_relation[fact.relation])
        new = swapped(dice, other, lang)
        return [said(dice, fill(dice, dice.pick(talk["instead"]["ask_" + lang]), s=new), lang, new), answer(dice, other, lang, new, how)], other, new
    if kind < 0.85:
        lacks = [line for own, _, lines in classes(lang) if fact.relation in own for line in lines]
        if lacks and dice.random() < 0.6:
            return [said(dice, fill(dice, dice.pick(lacks), s=he), lang), decline(dice, lang, how)], fact, subject
        section = dice.pick(["sure", "again"])
        return [fill(dice, dice.pick(talk[section]["ask_" + lang])),
                fill(dice, dice.pick(talk[section].get("full_" + lang, ["{answer}"])), answer=answer(dice, fact, lang, subject, "full"))], fact, subject
    return small(dice, dice.pick(["thanks", "thanks", "ok", "praise", "goodbye"]), lang), fact, subject


@functools.cache
def groups(lang):
    """(what they are called, names) of each group of four or more subjects with the same object."""
    return [(sections("questions")[relation]["list_" + lang][0].replace("{o}", object), [fact.subject[lang][0] for fact in facts])
            for (relation, object), facts in known(lang).by_object.items() if len(facts) >= 4 and "list_" + lang in sections("questions")[relation]]


def listing(dice, lang):
    """Name three countries in Asia."""
    called, names = dice.pick(groups(lang))
    called = PLURALS.get(called, called)
    count = dice.between(2, min(5, len(names)))
    names = dice.shuffled(names)[:count]
    row = "、".join(names[:-1]) + "和" + names[-1] if lang == "zh" else ", ".join(names[:-1]) + " and " + names[-1]
    question = fill(dice, dice.pick(sections("talk")["list"]["ask_" + lang]), n=NUMBERS[lang][count], k=dice.pick(KINDS[lang]), o=called)
    return messages(said(dice, question, lang, called), reply(dice, "list", lang, style(dice, long=False), l=row))


PLURALS = {"a mammal": "mammals", "a bird": "birds", "a reptile": "reptiles", "a fish": "fish", "an insect": "insects", "a fruit": "fruits",
           "a vegetable": "vegetables", "a grain": "grains", "a flower": "flowers", "a tree": "trees"}


# About nothing in the tables

def small(dice, section, lang, how=None):
    """A question and an answer of a section of talk/; to the questions of sample.py a full one."""
    asks = sections("talk")[section]["ask_" + lang]
    question = roughly(dice, fill(dice, dice.pick(asks)), lang)
    literal = section in AUTOMATIC and question == asks[0]
    return [question, reply(dice, section, lang, how or ("full" if literal else dice.pick(["full", "curt"])))]


def roughly(dice, question, lang):
    """As typed, but often as it stands: the wordings of greetings and of whole questions are many already."""
    return question if dice.random() < 0.6 else said(dice, question, lang)


@functools.cache
def topics(lang):
    """(name of the topic, passages that explain it); a name that begins with = is a whole question."""
    found = []
    for line in sections("talk")["passages"][lang]:
        names, _, start = line.partition(" | ")
        told = [passage for passage in passages()[lang] if passage.startswith(start)]
        if len(told) != 1:
            raise ValueError(f"talk/explain.txt: {len(told)} passages begin with {start!r}, expected 1")
        found.extend((name, told[0]) for name in names.split("/"))
    return found


def explanation(dice, topic, passage, lang):
    """Explain X: a passage of the prose."""
    if topic.startswith("="):
        return messages(topic[1:], dice.choose(passage))
    forms = [form for form in sections("talk")["explain"]["ask_" + lang] if form != "{s}" or topic not in known(lang).names]
    return messages(said(dice, fill(dice, dice.pick(forms), s=topic), lang, topic), dice.choose(passage))


def refusal(dice, lang):
    """A question without an answer, now and then after one with an answer."""
    question, about, section = unanswerable(dice, lang)
    turn = [said(dice, question, lang, about), decline(dice, lang, dice.pick(REFUSALS), about, section)]
    if dice.random() < 0.12:
        first, told, _ = single(dice, dice.pick(known(lang).facts), lang, style(dice, long=False))
        return messages(first, told, *turn)
    if dice.random() < 0.04:
        return messages(*small(dice, "hello", lang), *turn)
    return messages(*turn)


def reading(dice, lang):
    """A question about names nobody knows, which can be answered because the answer stands before it: what counts is what is asked and of whom,
    not which answer usually goes with a name. One to three things are told of each name, so that the wording must say which of them is wanted."""
    world = known(lang)
    own, absent = dice.pick([(own, absent) for own, absent, _ in classes(lang) if absent and lang in world.relations[own[0]].kind])
    kind = world.relations[own[0]].kind[lang]
    facts = {name: world.by_relation[name] for name in own if world.relations[name].kind.get(lang, kind) == kind}
    facts["is"] = [fact for fact in world.by_relation["is"] if fact.object[lang][0] == kind]
    names = dice.shuffled(absent)[:dice.pick([1, 2, 2, 3])]
    wanted = dice.shuffled(list(facts))[:dice.between(1, 4 - len(names))]
    wanted = own[:1] if wanted == ["is"] else wanted
    told = [(name, dice.pick(facts[relation])) for name in names for relation in dice.shuffled(wanted)]
    text = join(dice, [state(dice, fact, world.relations[fact.relation], lang, subject=name) for name, fact in told], lang)
    about, fact = dice.pick(told)
    question = said(dice, ask(dice, fact, lang, about), lang, about)
    gap, before = "" if lang == "zh" else " ", dice.pick(sections("talk")["reading"]["ask_" + lang])
    return messages(before + gap + text + dice.pick([gap, "\n"]) + question, answer(dice, fact, lang, about, style(dice, long=False)))


def mention(dice, lang):
    """Who of up to three people likes a name, or which one a person likes, told before the question. Half of the names are those with a fact that no chat
    may ask about: whatever else can be asked of them teaches that an answer hangs on the question, not on the name alone."""
    world, talk, gap = known(lang), sections("talk")["mention"], "" if lang == "zh" else " "
    people, count, subjects = dice.shuffled(talk["people_" + lang][0].split()), dice.pick([1, 2, 2, 3]), []
    while len(subjects) < count:
        subject = dice.pick(world.unasked if dice.random() < 0.5 else world.by_relation["is"]).subject[lang][0]
        subjects += [subject] if subject not in subjects else []
    same = dice.pick(talk[lang]) if dice.random() < 0.5 else None
    told = [(person, subject, (same or dice.pick(talk[lang])).split(" | ")) for person, subject in zip(people, subjects)]
    person, subject, (statement, who, what) = dice.pick(told)
    asked, short = dice.pick([(who, person), (what, subject)])
    text = gap.join(fill(dice, wording[0], p=one, s=name) for one, name, wording in told)
    question = said(dice, fill(dice, asked, p=person, s=subject), lang, subject, person)
    full = fill(dice, statement, p=person, s=subject)
    return messages(text + dice.pick([gap, "\n"]) + question, dice.pick([full, full, capital(short) + FULL_STOP[lang]]))


def conversations(seed=0, exposures=20):
    """All conversations in their final order. Each fact that may be asked about opens `exposures` of them in Chinese, half as
    many again in English (what kind of thing something is, where more may be asked about it: a quarter of that; of a relation with few facts:
    twice that); the rest is in proportion."""
    if exposures < 1:
        raise ValueError(f"the number of times each fact is asked about is {exposures}, at least 1 is needed")
    dice, found = Dice(f"chats {seed}"), []
    for lang in LANGUAGES:
        times, own = round(exposures * OFTEN[lang]), []
        for turn in range(2 * times):
            for fact in known(lang).facts:
                # what kind of thing something is; but every name is spoken of, or it would be taken for unknown
                rare = fact.relation == "is" and len(known(lang).by_subject[fact.subject[lang][0]]) > 1
                if rare and turn % 8 or turn % 2 and len(known(lang).by_relation[fact.relation]) >= FEW:
                    continue
                if dice.random() < 0.09:
                    own.append(several(dice, fact, lang))
                else:
                    question, told, _ = single(dice, fact, lang)
                    own.append(messages(question, told))
        own += [messages(*small(dice, section, lang)) for section in SMALL for _ in range(2 * times)]
        for section in (section for section in AUTOMATIC if "ask_" + lang in sections("talk")[section]):
            own += [messages(*small(dice, section, lang, "full")) for _ in range(4 * times)]
            literal = sections("talk")[section]["ask_" + lang][0]
            own += [messages(fill(dice, literal), reply(dice, section, lang, "full")) for _ in range(times)]
        own += [explanation(dice, topic, passage, lang) for topic, passage in topics(lang) for _ in range(-(-times // 2))]
        own += [listing(dice, lang) for _ in range(len(groups(lang)) * times // 3)]
        own += [reading(dice, lang) for _ in range(round(len(own) * READ / (1 - READ)))]
        own += [mention(dice, lang) for _ in range(round(len(own) * MENTION / (1 - MENTION)))]
        own += [refusal(dice, lang) for _ in range(round(len(own) * REFUSED[lang] / (1 - REFUSED[lang])))]
        found += [[{"role": "system", "content": dice.pick(SYSTEMS[lang])}, *each] if dice.random() < 0.02 else each for each in own]
    return dice.shuffled(found)


def write_sft(out, seed=0, exposures=20):
    """Write OUT/sft.jsonl (complete or not at all) and return its path."""
    return write_lines(out, "sft.jsonl", ({"conversations": each} for each in conversations(seed, exposures)))


def prompts(seed=0, times=9):
    """Questions without answers about the whole world, for a teacher to answer: also about the facts that no chat asks about, which it has only
    read. Every fact is asked about `times` times in Chinese, half as many again in English (what no exam asks: a quarter of that)."""
    dice, found = Dice(f"prompts {seed}"), []
    for lang in LANGUAGES:
        facts, own = known(lang).facts + known(lang).unasked, []
        for turn in range(round(times * OFTEN[lang])):
            for fact in (fact for fact in facts if fact.relation not in UNEXAMINED or turn % 4 == 0):
                subject = swapped(dice, fact, lang)
                own.append(said(dice, ask(dice, fact, lang, subject), lang, subject))
        own += [small(dice, section, lang)[0] for section in SMALL for _ in range(2 * times)]
        own += [small(dice, section, lang, "full")[0] for section in AUTOMATIC if "ask_" + lang in sections("talk")[section] for _ in range(5 * times)]
        for _ in range(round(len(own) * REFUSED[lang] / (1 - REFUSED[lang]))):
            question, about, _ = unanswerable(dice, lang)
            own.append(said(dice, question, lang, about))
        found += own
    return dice.shuffled(found)


def write_prompts(out, seed=0, times=9, name="prompts.jsonl"):
    """Write OUT/NAME (complete or not at all) and return its path."""
    return write_lines(out, name, ({"prompt": question} for question in prompts(seed, times)))


def as_documents(seed=0, exposures=20):
    """The chats once more as running text, several to a document, for pretraining: what is read as a question is answered sooner."""
    dice = Dice(f"dialogues {seed}")
    for chunk in dice.chunks(conversations(f"{seed} dialogues", exposures), 3, 8):
        lines = []
        for chat in chunk:
            told = [message["content"] for message in chat if message["role"] != "system"]
            chinese = any("\u4e00" <= letter <= "\u9fff" for letter in told[-1])
            lines += [(("问：", "答：") if chinese else ("user: ", "assistant: "))[i % 2] + text for i, text in enumerate(told)]
        yield "\n".join(lines)
