"""The demo world: true to its format, complete, the same bytes everywhere, quick to write.
In: nothing but the tables in data_prep/demo. Out: pass or fail.
Next: ../data_prep/demo/world.py
"""

import hashlib
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_prep import chat, demo, pairs
from data_prep.demo.chats import AUTOMATIC, conversations, single, topics
from data_prep.demo.pretrain import CHOICE, Dice, one_pass
from data_prep.demo.preferences import about_a_fact, about_nothing
from data_prep.demo.unknown import KINDS, unanswerable
from data_prep.demo.wording import answer, ask, decline, declined, known, said
from data_prep.demo.world import ALWAYS_ASKED, LANGUAGES, Fact, _read_table, held_out, passages, relations, sections
from nanomind.records import Reader
from sample import PROMPTS as CONTINUED, QUESTIONS

ROOT = Path(__file__).parents[1]
PROMPTS = {
    "zh": ["马克思主义基本原理", "人类大脑的主要功能", "万有引力原理是", "世界上最高的山峰是", "二氧化碳在空气中",
           "地球上最大的动物有", "杭州市的美食有"],
    "en": ["The capital of China is", "Water boils at", "The largest ocean on Earth is"],
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    began = time.process_time()
    [path] = demo.write(tmp_path_factory.mktemp("demo"), files=["pretrain.jsonl"])
    seconds = time.process_time() - began
    return path, [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()], seconds


@pytest.fixture(scope="module")
def chats():
    began = time.process_time()
    made = conversations()
    assert time.process_time() - began < 15
    return made


@pytest.fixture(scope="module")
def turns(chats):
    """(question, answer) of every turn, once."""
    told = [[message["content"] for message in chat if message["role"] != "system"] for chat in chats]
    return sorted({turn for texts in told for turn in zip(texts[::2], texts[1::2])})


def test_same_seed_same_bytes_even_in_another_process(tmp_path):
    """Hash randomisation, the file system's order and the locale must not reach the files."""
    own = demo.write(tmp_path / "own", exposures=2, asked=2, mixed=1)
    command = [sys.executable, "-m", "data_prep.demo", "--out", str(tmp_path / "other"), "--exposures", "2", "--asked", "2", "--mixed", "1"]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT, env={"PYTHONHASHSEED": "7", "LC_ALL": "C", "PATH": ""})
    assert [path.name for path in own] == list(demo.FILES)
    for path in own:
        assert hashlib.sha256(path.read_bytes()).digest() == hashlib.sha256((tmp_path / "other" / path.name).read_bytes()).digest(), path.name


def test_another_seed_mixes_otherwise(tmp_path):
    one, two = (demo.write(tmp_path / str(seed), seed=seed, exposures=2, asked=1) for seed in (1, 2))
    assert all(a.read_bytes() != b.read_bytes() for a, b in zip(one, two))


def test_dialogues_are_mixed_in_only_on_request(tmp_path):
    """The quick start's pretraining text must not change when the chats do."""
    plain, mixed = (demo.write(tmp_path / str(asked), exposures=1, mixed=asked, files=["pretrain.jsonl"])[0].read_text("utf-8") for asked in (0, 1))
    assert "\\n答：" not in plain and "\\nA: " not in plain
    assert mixed.count("答：") > 1500 and set(plain.splitlines()) < set(mixed.splitlines())


@pytest.mark.parametrize("form", ["relation", "subject", "random"])
def test_a_pass_states_every_fact_once(form):
    """The number of exposures is a promise: no fact may be lost in the cutting into documents."""
    world = [relation._replace(templates={lang: ["<{s}#{o}>"] * bool(relation.templates[lang]) for lang in LANGUAGES},
                               title={}, pronoun={})
             for relation in relations()]
    for lang in LANGUAGES:
        told = "".join(one_pass(Dice(3), world, lang, form)).count("#")
        expected = [relation for relation in world if form == "subject" or relation.name != "is"]
        assert told == sum(lang in fact.subject for relation in expected for fact in relation.facts)


def test_size_and_time(written):
    path, texts, seconds = written
    assert 6e6 < path.stat().st_size < 11e6
    assert seconds < 20
    assert all(text == text.strip() and text for text in texts)


def test_enough_facts_and_prose():
    world, prose = relations(), passages()
    assert sum(len(relation.facts) for relation in world if relation.name != "is") >= 700
    assert len(prose["zh"]) + len(prose["en"]) >= 200
    for relation in world:
        for lang in LANGUAGES:
            if any(lang in fact.subject for fact in relation.facts):
                least = 3 if lang == "en" else 6
                assert len(set(relation.templates[lang])) == len(relation.templates[lang]) >= least, (relation.name, lang)


def test_no_fact_twice_and_none_contradicts_another():
    """One row per (relation, subject), under any of its names, in either language."""
    for relation in relations():
        for lang in LANGUAGES:
            names = [name for fact in relation.facts if lang in fact.subject for name in fact.subject[lang]]
            assert len(names) == len(set(names)), (relation.name, lang, sorted(n for n in names if names.count(n) > 1))


def test_rows_and_their_translations_agree():
    """Where two rows share an object in one language, they share it in the other: catches a cell in the wrong row."""
    for relation in relations():
        seen = {}
        for fact in relation.facts:
            if len(fact.object) == 2:
                assert seen.setdefault(fact.object["en"][0], fact.object["zh"][0]) == fact.object["zh"][0], fact
        assert all(set(fact.subject) == set(fact.object) for fact in relation.facts)


def test_no_slot_or_choice_is_left_unfilled(written):
    for text in written[1]:
        assert not re.search(r"[{}|]", text), text
        assert "。。" not in text and "  " not in text and "\ufffd" not in text, text


def test_english_has_no_chinese_full_stop_and_sentences_end(written):
    for text in written[1]:
        last = text.splitlines()[-1]
        ended = last[-1] in "。！？”.!?\")" or "：" in last or ": " in last
        assert ended, text


def test_choices_are_settled_from_left_to_right():
    text = Dice(0).choose("{a|b} and {c|d}, {1} again, then {2}")
    assert re.fullmatch(r"(a|b) and (c|d), \1 again, then \2", text)
    assert not CHOICE.search(text)


def test_every_automatic_prompt_begins_texts_that_go_on(written):
    for prompts in PROMPTS.values():
        for prompt in prompts:
            found = {text for text in written[1] if text.startswith(prompt)}
            assert len(found) >= 3, prompt
            assert all(len(text) > len(prompt) + 3 for text in found), prompt


def test_prose_is_no_copy_of_itself():
    for lang, texts in passages().items():
        assert len(texts) == len(set(texts))
        for text in texts:
            assert text[-1] in "。！？”.!?\"", text
            numbers = [int(number) for number in re.findall(r"\{(\d)\}", text)]
            assert not numbers or max(numbers) <= len(re.findall(r"\{[^{}]*\|", text)), text


@pytest.mark.parametrize("content, complaint", [
    ("法国 | 巴黎\n", "t.txt:1: a table begins with"),
    ("[capital]\nzh: {s}的首都。\n", "t.txt:2: a template needs"),
    ("[capital]\n法国 | 巴黎 | France\n", "t.txt:2: a fact has 2 or 4 columns"),
])
def test_a_broken_table_is_named_by_file_and_line(tmp_path, content, complaint):
    path = tmp_path / "t.txt"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(complaint)):
        list(_read_table(path))


def test_zero_exposures_are_refused(tmp_path):
    for wrong in ({"exposures": 0}, {"asked": 0, "files": ["sft.jsonl"]}):
        with pytest.raises(ValueError, match="at least 1 is needed"):
            demo.write(tmp_path, **wrong)
    assert not list(tmp_path.iterdir())


def test_held_out_facts_are_a_fifth_and_stay_the_same():
    """The exam is frozen with them: another hash, another name order or another salt would make it ask what the chats taught."""
    facts = [fact for relation in relations() for fact in relation.facts]
    held = [fact for fact in facts if held_out(fact)]
    assert 0.15 < len(held) / sum(fact.relation not in ALWAYS_ASKED for fact in facts) < 0.22
    names = "\n".join(f"{fact.relation}|{next(iter(fact.subject.values()))[0]}" for fact in held)
    assert hashlib.sha256(names.encode()).hexdigest()[:16] == "26f0db3e0f1a4b92"
    assert held_out(Fact("capital", {"zh": ["瑞士", "x"], "en": ["y"]}, {})) and not held_out(Fact("is", {"zh": ["瑞士"]}, {}))


def test_every_relation_has_many_wordings():
    """Wording decides the exam: a prototype with seven cores a relation fell from 97 to 74 % on fresh ones."""
    for relation in relations():
        words = sections("questions")[relation.name]
        for lang, least in (("zh", 20), ("en", 10)):
            if any(lang in fact.subject for fact in relation.facts) and relation.templates[lang]:
                asks = words["ask_" + lang]
                assert len(set(asks)) == len(asks) >= least, (relation.name, lang)
                assert all("{s}" in each or "{a}" in each for each in asks), relation.name
            for back in words.get("back_" + lang, []):
                assert "{o}" in back and "{s}" not in back, back
            for check in words.get("check_" + lang, []):
                assert "{s}" in check and "{o}" in check and check[-1] in "？?", check
            for told in words.get("full_" + lang, []):
                assert "{o}" in told, told


def test_no_chat_asks_a_held_out_fact(monkeypatch):
    """Neither straight nor backwards nor in a follow-up, a list or a pair: every fact that is put into words passes these two."""
    from data_prep.demo import chats, preferences, unknown
    asked = []
    for module in (chats, preferences, unknown):
        for name in ("ask", "answer"):
            if hasattr(module, name):
                original = getattr(module, name)
                monkeypatch.setattr(module, name, lambda dice, fact, *rest, original=original, **named: asked.append(fact) or original(dice, fact, *rest, **named))
    chats.conversations(exposures=3)
    list(preferences.pairs(number=1000))
    assert len(asked) > 9000 and not [fact for fact in asked if held_out(fact)]
    for lang in LANGUAGES:
        for _, names in chats.groups(lang):
            assert len(names) >= 4
        assert not [fact for facts in known(lang).by_object.values() for fact in facts if held_out(fact)]


def test_every_subject_is_spoken_of(turns):
    """A subject of which no chat speaks is taken for unknown, and its held-out facts with it."""
    questions = "\n".join(question for question, _ in turns).lower()
    for relation in relations():
        for fact in relation.facts:
            for lang in fact.subject:
                if relation.templates[lang] and relation.name not in ("sum", "product"):
                    subject = fact.subject[lang][0].lower()
                    assert subject in questions or subject.removeprefix("the ") in questions, (relation.name, subject)


def test_conversations_are_well_formed(chats, turns):
    for each in chats:
        chat.checked(each)
    assert 40_000 < len(chats) < 80_000 and sum(len(each) > 3 for each in chats) > 2000
    for question, told in turns:
        assert not re.search(r"[{}|]", question + told), (question, told)
        assert told[-1] in "。！？”.!?\"" and told == told.strip() and question == question.strip() and question, (question, told)
        assert "。。" not in told and "  " not in told, told


def test_questions_get_answers_in_their_language(turns):
    """Only names cross the border: an English answer has no Chinese sentence mark, a Chinese one has no English words around it."""
    for question, told in turns:
        if not re.search(r"[\u4e00-\u9fff，。？（]", question) and re.search(r"[a-z]{3}", question) and "“" not in question:
            assert not re.search(r"[，。]", told) or re.fullmatch(r"\W*[\w'. ]+\W*", question), (question, told)


def test_a_fifth_of_the_chats_declines_in_many_words(chats):
    last = [each[-1]["content"] for each in chats]
    refused = [told for told in last if declined(told)]
    assert 0.15 < len(refused) / len(last) < 0.25
    assert len({told for told in refused if len(told) < 40}) > 30
    for lang in LANGUAGES:
        for how in ("full", "curt", "other"):
            assert all(declined(decline(Dice(i), lang, how, "X", section)) for i in range(40) for section in ("decline", "far", "bigger"))


def test_answers_of_facts_hold_the_object_and_are_no_refusals():
    dice = Dice(5)
    for lang in LANGUAGES:
        for fact in known(lang).facts:
            subject = fact.subject[lang][0]
            for how in ("full", "other", "curt", "long"):
                told = answer(dice, fact, lang, subject, how)
                assert fact.object[lang][0].lower() in told.lower() and not declined(told), (fact, told)
            if fact.relation + subject in known(lang).reversible:
                assert subject.lower() in answer(dice, fact, lang, subject, "curt", back=True).lower()
            assert subject in ask(dice, fact, lang, subject) or fact.relation in ("sum", "product") or lang == "en"


def test_both_styles_are_in_the_chats_equally_often(chats):
    """Otherwise preferences have nothing to teach: what one style has alone, fine-tuning has settled already."""
    dice, full, curt, short = Dice(3), 0, 0, {lang: known(lang).facts for lang in LANGUAGES}
    for lang in LANGUAGES:
        for fact in short[lang]:
            subject = fact.subject[lang][0]
            for _ in range(3):
                _, told, _ = single(dice, fact, lang)
                full += told == answer(dice, fact, lang, subject, "full")
                curt += told == answer(dice, fact, lang, subject, "curt")
    assert full > 2000 and 0.7 < full / curt < 1.4
    told = [each[-1]["content"] for each in chats]
    assert 0.7 < told.count("不知道。") / sum(each.startswith("抱歉，这个我不知道") for each in told) < 1.5
    assert 0.7 < told.count("I do not know.") / told.count("I am sorry, I do not know that.") < 1.5


def test_unanswerable_questions_name_nothing_known():
    """A made-up name must not be a known one, or the model learns to decline what it knows."""
    dice = Dice(9)
    for lang in LANGUAGES:
        found = [unanswerable(dice, lang) for _ in range(4000)]
        assert len({question for question, _, _ in found}) > 2000
        for own, absent, _ in __import__("data_prep.demo.unknown", fromlist=["classes"]).classes(lang):
            assert not [each for each in absent if each in {name for relation in own for fact in known(lang).relations[relation].facts
                                                            for name in fact.subject.get(lang, [])}], own
    assert set(KINDS) == {"absent", "misheard", "lacks", "far", "senseless", "bigger"}


def test_slips_and_wrappers_spare_the_name_and_meet_both_kinds_of_question():
    """Noise on one kind only would itself be the sign of an unknown thing."""
    dice = Dice(2)
    for lang, question, keep in (("zh", "罗马尼亚的首都是哪里？", "罗马尼亚"), ("en", "What is the capital of Romania?", "Romania")):
        made = [said(dice, question, lang, keep) for _ in range(800)]
        assert len(set(made)) > 250 and all(keep.lower() in each.lower() for each in made)
        assert 0.1 < made.count(question) / 800 < 0.5
    from inspect import getsource

    from data_prep.demo import chats
    assert "said(" in getsource(chats.refusal) and "said(" in getsource(chats.single)


def test_the_automatic_prompts_are_there_with_good_answers(turns):
    answers = {}
    for question, told in turns:
        answers.setdefault(question, set()).add(told)
    for question in QUESTIONS:
        assert answers[question] and not [told for told in answers[question] if declined(told) or len(told) < 30], question
    for prompt in CONTINUED:
        assert [told for told in answers[prompt] if told.startswith(prompt)], prompt
    for section in AUTOMATIC:
        assert sum(len(sections("talk")[section].get("ask_" + lang, [])) for lang in LANGUAGES) >= 8, section


def test_topics_are_explained_by_a_passage_of_their_own():
    for lang, least in (("zh", 120), ("en", 50)):
        found = topics(lang)
        assert len({topic for topic, _ in found}) == len(found) and len({passage for _, passage in found}) >= least


def test_pairs_are_read_by_data_prep_and_differ_in_the_answer(tmp_path, capsys):
    [path] = demo.write(tmp_path, files=["dpo.jsonl"])
    reader = Reader([path], 0, lambda size: None)
    found = list(pairs.items(reader))
    assert len(found) == 6000 and not reader.bad
    shares = [chosen[-1]["content"] in rejected[-1]["content"] for _, (chosen, rejected), _ in found]
    assert sum(shares) / len(shares) < 0.25  # the long and the rude ones
    for _, (chosen, rejected), _ in found:
        told = chosen[-1]["content"] + rejected[-1]["content"]
        assert not re.search(r"[{}|]", told)


def test_pairs_prefer_what_the_issue_wants():
    dice = Dice(1)
    for lang in LANGUAGES:
        for _ in range(100):
            question, chosen, rejected = about_a_fact(dice, "curt", lang)
            assert len(chosen) > len(rejected)
            question, chosen, rejected = about_a_fact(dice, "long", lang)
            assert chosen in rejected and len(rejected) > len(chosen)
            question, chosen, rejected = about_nothing(dice, "invented", lang)
            assert declined(chosen) and not declined(rejected)


@pytest.mark.parametrize("content", ["你好\n", "[hello]\n你好\n"])
def test_a_wording_without_its_section_is_named_by_file_and_line(tmp_path, monkeypatch, content):
    from data_prep.demo import world
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/w.txt").write_text(content, encoding="utf-8")
    monkeypatch.setattr(world, "FOLDER", tmp_path)
    with pytest.raises(ValueError, match=r"w.txt:\d: expected \[section\]"):
        sections.__wrapped__("bad")
