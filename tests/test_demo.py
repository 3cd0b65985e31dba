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
from dataclasses import replace
from pathlib import Path

import pytest

import bpe
from data_prep import demo
from data_prep.demo.pretrain import CHOICE, Dice, one_pass
from data_prep.demo.world import LANGUAGES, _read_table, passages, relations
from nanomind.config import PRESETS
from nanomind.stages import STAGES

ROOT = Path(__file__).parents[1]
PROMPTS = {
    "zh": ["马克思主义基本原理", "人类大脑的主要功能", "万有引力原理是", "世界上最高的山峰是", "二氧化碳在空气中",
           "地球上最大的动物有", "杭州市的美食有"],
    "en": ["The capital of China is", "Water boils at", "The largest ocean on Earth is"],
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    began = time.process_time()
    [path] = demo.write(tmp_path_factory.mktemp("demo"), mixed=0, files=["pretrain.jsonl"])
    seconds = time.process_time() - began
    return path, [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()], seconds


def test_same_seed_same_bytes_even_in_another_process(tmp_path):
    """Hash randomisation, the file system's order and the locale must not reach the files."""
    own = demo.write(tmp_path / "own", exposures=2, asked=2, mixed=1, files=demo.FILES[:3])  # the pictures have their own test
    command = [sys.executable, "-c", f"from data_prep import demo; demo.write({str(tmp_path / 'other')!r}, exposures=2, asked=2, mixed=1, files=demo.FILES[:3])"]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT, env={"PYTHONHASHSEED": "7", "LC_ALL": "C", "PATH": ""})
    assert [path.name for path in own] == list(demo.FILES[:3])
    for path in own:
        assert hashlib.sha256(path.read_bytes()).digest() == hashlib.sha256((tmp_path / "other" / path.name).read_bytes()).digest(), path.name


def test_another_seed_mixes_otherwise(tmp_path):
    one, two = (demo.write(tmp_path / str(seed), seed=seed, exposures=2, asked=1, files=demo.FILES[:3]) for seed in (1, 2))
    assert all(a.read_bytes() != b.read_bytes() for a, b in zip(one, two))


def test_dialogues_are_mixed_in_only_on_request(tmp_path):
    """The quick start's pretraining text must not change when the chats do."""
    plain, mixed = (demo.write(tmp_path / str(asked), exposures=1, mixed=asked, files=["pretrain.jsonl"])[0].read_text("utf-8") for asked in (0, 1))
    assert not any(speaker in plain for speaker in ("\\n答：", "\\nassistant: "))
    assert mixed.count("答：") > 1500 and mixed.count("\\nassistant: ") > 1000 and set(plain.splitlines()) < set(mixed.splitlines())


def test_the_roles_of_a_chat_are_a_token_each(tmp_path):
    """They stand in every turn of every later stage. The tokenizer of the journey learns them from the dialogues."""
    vocab_size = STAGES["pretrain"].demo["vocab_size"]
    tokenizer = bpe.train(demo.write(tmp_path, files=STAGES["pretrain"].builtin), vocab_size)
    assert [len(tokenizer.encode(role)) for role in ("user", "assistant")] == [1, 1]


def test_the_student_has_at_most_three_tenths_of_its_teacher():
    """A bigger vocabulary costs the student more than its teacher."""
    teacher, student = (replace(PRESETS[STAGES[name].demo.get("preset") or STAGES[name].defaults["preset"]][0], vocab_size=STAGES[name].demo["vocab_size"])
                        for name in ("pretrain", "distill"))
    assert student.parameters() <= 0.3 * teacher.parameters()


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
    assert 7e6 < path.stat().st_size < 15e6
    assert seconds < 20
    assert all(text == text.strip() and text for text in texts)


def test_enough_facts_and_prose():
    world, prose = relations(), passages()
    assert sum(len(relation.facts) for relation in world if relation.name != "is") >= 600
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
