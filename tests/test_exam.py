"""Exams: what counts as right, as declined, and how sure a share is; the demo world's two exams are complete, fair, and nobody's copy.
In: hand-made answers, a tiny model, the tables and wordings of data_prep/demo. Out: pass or fail.
Next: ../nanomind/exam.py
"""

import hashlib
import itertools
import json
import re
import subprocess
import sys

import pytest

from conftest import ROOT
from data_prep.demo import exam as demo
from data_prep.demo.pretrain import Dice
from data_prep.demo.world import LANGUAGES, UNEXAMINED, held_out, passages, relations, sections
from nanomind.exam import DECLINES, grade, normalise, read_exam, score, table, wilson

FROZEN = {"first": "10a82a4be747066d", "second": "a9484054e2f9b5ec"}
WORLD = {relation.name: relation for relation in relations() if relation.name not in UNEXAMINED}


def lines(path, *records):
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.mark.parametrize("answer, accepted, right", [
    ("它的高度是８，８４８．８６ 米。", "8848.86米", True),  # full width, separator, spaces
    ("It is 8,848.86 metres high", "8848.86", True),
    ("高度是18848.86米", "8848.86", False), ("高度是8848.86米", "8848", False), ("8848.8米", "848.8", False),  # a piece of another number
    ("是5。", "5", True), ("是1.5", "5", False), ("是15", "5", False), ("是-5度", "5", False), ("5万", "5", False), ("150 million", "150", False),
    ("2004, 2005", "2004", True), ("月球约38.4万千米", "38.4万", True), ("公元前221年。", "公元前221年", True), ("Number 5. Yes", "5", True),
    ("有十四条", "四", False), ("四条腿", "四", True), ("二十一", "二十", False),
    ("The symbol is Na.", "N", False), ("The symbol is N.", "N", True), ("用 Na 表示", "na", True), ("H₂O", "H2O", True), ("它是CO2", "O2", False),
    ("H2O", "H2", False), ("I like catfish", "cat", False), ("A CAT!", "cat", True), ("category", "cat", False),
    ("达.芬奇", "达·芬奇", True), ("蒂姆·伯纳斯·李", "蒂姆·伯纳斯-李", True), ("Wu Cheng’en", "Wu Cheng'en", True), ("by Charlotte Bronte", "Charlotte Brontë", True),
    ("《 狂人 日记》", "狂人日记", True), ("the east china\nsea", "the East China Sea", True), ("21 percent", "21%", True), ("零下−273.15", "-273.15", True),
    ("我不知道，可能是北京。", "北京", False), ("Sorry, it is Paris.", "Paris", False), ("I don’t know. Paris?", "Paris", False),  # declined
    ("", "北京", False), ("москва́ столица", "Москва", True), ("северомосква", "москва", False)])
def test_right_is_the_whole_answer_and_nothing_cut_out_of_another(answer, accepted, right):
    """`in` marks 1 right where the model says 21, H in He, cat in category, and an answer that says at once that it does not know."""
    assert grade(answer, {"answers": [accepted]})[0] == right


def test_names_that_hold_an_answer_by_chance():
    """黑龙江 holds its own abbreviation, 都柏林 the capital of another country: repeating the question was marked right."""
    item = {"answers": ["黑"], "ignore": ["黑龙江省", "黑龙江"]}
    assert not grade("黑龙江省的简称是龙。", item)[0] and grade("黑龙江省的简称是黑。", item)[0] and grade("黑", item)[0]
    assert not grade("德国的首都是都柏林。", {"answers": ["柏林"], "ignore": ["都柏林"]})[0]
    assert grade("突尼斯的首都是突尼斯市。", {"answers": ["突尼斯市"], "ignore": ["突尼斯"]})[0]


@pytest.mark.parametrize("answer", ["这个我不知道。", "抱歉，我没学过这个。", "这不在我的世界里。", "I am sorry, I haven't learned that.", "I do not know.", "I'm NOT  sure"])
def test_declining(answer):
    assert grade(answer, {"answers": []}) == (True, True) and grade(answer, {"answers": ["that"]}) == (False, True)


@pytest.mark.parametrize("answer", ["巴黎。", "", "Nobody knows the trouble", "知道"])
def test_an_answer_to_what_cannot_be_known_is_wrong(answer):
    assert grade(answer, {"answers": []}) == (False, False)


@pytest.mark.parametrize("right, n, low, high", [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662)])
def test_wilson(right, n, low, high):
    """Newcombe 1998 (table I, 81 of 263) and the textbook values; the plain interval of 10 of 10 is one point."""
    assert wilson(right, n) == pytest.approx((low, high), abs=6e-5)


def test_exam_file_of_a_user(tmp_path):
    (tmp_path / "cat.png").write_bytes(b"picture")
    path = lines(tmp_path / "mine.jsonl", {"question": "1+1?", "answer": "2"}, {"question": "?", "answers": ["a", "b"], "category": "letters", "note": 1},
                 {"question": "我的名字？", "answers": []}, {"question": "What is it?", "answer": "a cat", "image": "cat.png"})
    items = read_exam(path)
    assert [item["answers"] for item in items] == [["2"], ["a", "b"], [], ["a cat"]]
    assert [item["category"] for item in items] == ["all", "letters", "all", "all"] and items[3]["image"] == tmp_path / "cat.png"


@pytest.mark.parametrize("line, complaint", [
    ('{"question": "a?"}', 'expected "answer"'), ('{"question": "a?", "answer": 2}', 'expected "answer"'), ('{"question": "a?", "answers": "b"}', 'expected "answer"'),
    ('{"question": "a?", "answer": "b", "answers": ["b"]}', 'expected "answer"'), ('{"question": "a?", "answer": "?!"}', 'expected "answer"'),
    ('{"answer": "b"}', '"question"'), ('{"question": " ", "answer": "b"}', '"question"'), ('{"question": "a?", "answer": "b", "category": 3}', '"category"'),
    ('{"question": "a?", "answer": "b", "ignore": "b"}', '"ignore"'), ('{"question": "a?", "answer": "b", "image": "none.png"}', "an image that is not there"),
    ('{"question": "a?", ', "broken JSON"), ('["a?", "b"]', "a JSON list")])
def test_a_bad_line_is_refused_by_file_and_line(tmp_path, line, complaint):
    """An exam that silently loses the lines it cannot read reports the score of another exam."""
    path = tmp_path / "mine.jsonl"
    path.write_text('{"question": "1+1?", "answer": "2"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises((ValueError, FileNotFoundError), match=f"mine.jsonl:2: .*{re.escape(complaint)}") as error:
        read_exam(path)
    assert "\n" not in str(error.value)


class Model:
    class config:
        max_position_embeddings = 200


def test_score(tokenizer, tmp_path):
    """Shares by category, declined only among what has an answer, answers in the order of the questions although they are written by length."""
    items = read_exam(lines(tmp_path / "e.jsonl", {"question": "天" * 30, "answer": "地", "category": "a"}, {"question": "天", "answer": "地", "category": "a"},
                            {"question": "玄", "answers": [], "category": "b"}, {"question": "黄", "answer": "地", "category": "a"}))
    said = iter(["地。", "不知道", "抱歉", "天"])

    def write(model, prompts, max_new_tokens, stop):
        assert [tokenizer.decode(prompt).count("天") for prompt in prompts] == [30, 1, 0, 0] and tokenizer.im_end in stop
        return [(tokenizer.encode(next(said)), i < 3) for i in range(len(prompts))]

    result = score(Model, tokenizer, items, write)
    assert result.categories["a"][::3] == (1 / 3, 3) and result.categories["b"][::3] == (1.0, 1)
    assert result.declined == 1 / 3 and result.ended == 3 / 4 and result.answers == ["地。", "不知道", "抱歉", "天"]
    assert "a           33.3 % right (95 % interval 6.1 to 79.2, 3 questions)" in table(result)


def test_score_asks_the_model(tokenizer):
    """The default writer is the greedy one of judge.py: the same model gives the same answers twice."""
    import torch
    from conftest import TINY
    from nanomind.config import ModelConfig
    from nanomind.model import LanguageModel
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig.from_hf(TINY)).eval()
    items = [{"question": "天" * n, "answers": ["地"], "category": "a"} for n in (3, 1, 2)]
    first, again = (score(model, tokenizer, items) for _ in range(2))
    assert first == again and len(first.answers) == 3 and first.categories["a"].n == 3
    with pytest.raises(ValueError, match="shorten the question"):
        score(model, tokenizer, [{"question": "天地" * 50, "answers": [], "category": "a"}])
    with pytest.raises(ValueError, match="asks about a picture"):
        score(model, tokenizer, [{"question": "?", "answers": [], "category": "a", "image": "x.png"}])


# ---- the demo world's exams


@pytest.fixture(scope="module")
def sets():
    return {which: demo.questions(which) for which in demo.SETS}


def test_every_relation_is_asked_about_in_every_language_it_has():
    """A relation without wordings is a hole in the exam that nobody sees in its score."""
    for which in demo.SETS:
        asked = demo.wordings(which)
        assert set(asked) == {*WORLD, *demo.UNKNOWN}
        for name, relation in WORLD.items():
            for lang, least, most in (("zh", 4, 6), ("en", 2, 3)):
                has = any(lang in fact.subject for fact in relation.facts)
                assert (least <= len(asked[name][lang]) <= most) if has else not asked[name][lang], (which, name, lang)
                assert all(text.count("{s}") == 1 for text in asked[name][lang])


def test_no_wording_occurs_twice_or_in_the_tables():
    """The second set tells something only if the first was not the same; nor may the tables' own sentences ask the exam's questions."""
    seen = set()
    for which in demo.SETS:
        for section, texts in demo.wordings(which).items():
            for text in texts["zh"] + texts["en"]:
                assert normalise(text) not in seen, text
                seen.add(normalise(text))
    read = {normalise(part) for relation in WORLD.values() for lang in LANGUAGES for text in relation.templates[lang] for part in re.split("(?<=[。？?])", text)}
    assert not seen & read


def settled(wording):
    """Every text that a wording of the chats may become, whatever is chosen; its name is X."""
    parts = [part[1:-1].split("|") if part[0] == "{" and "|" in part else [part.replace("{s}", "X")] for part in re.split(r"(\{[^{}]*\|[^{}]*\})", wording) if part]
    return {normalise("".join(chosen)) for chosen in itertools.product(*parts)}


def test_no_chat_asks_in_the_words_of_an_exam():
    """What the README claims of both sets; wordings may be added to the chats, so this is checked and not remembered."""
    assert settled("{s}的{国都|}在{哪|哪儿}？") >= {normalise("X的国都在哪？"), normalise("X的在哪儿？")}
    asked = {relation: set().union(*(settled(line) for key, lines in own.items() if key.startswith("ask") for line in lines))
             for relation, own in sections("questions").items()}
    talked = set().union(*(settled(line) for own in sections("talk").values() for key, lines in own.items() if key.startswith(("ask", "lacks")) for line in lines))
    for which in demo.SETS:
        for section, texts in demo.wordings(which).items():
            for text in texts["zh"] + texts["en"]:
                assert normalise(re.sub("[{}]", "", text.replace("{s}", "X"))) not in (asked[section] if section in asked else talked), (which, section, text)


def test_the_wordings_are_frozen():
    """A question made easier after its answer was seen is no question any more. Who changes one says so here, and scores everything again."""
    for which, digest in FROZEN.items():
        text = (demo.FOLDER / "exam" / f"{which}.txt").read_text(encoding="utf-8")
        assert hashlib.sha256(text.encode("utf-8")).hexdigest().startswith(digest), which


def test_names_of_unknown_questions():
    """A 'does not exist here' that stands in a table after all would punish the right answer; so would an unheard attribute of an unheard thing."""
    names = normalise(" | ".join(name for relation in WORLD.values() for fact in relation.facts for side in fact[1:] for own in side.values() for name in own))
    prose = normalise(" ".join(text for texts in passages().values() for text in texts))
    for which in demo.SETS:
        asked = demo.wordings(which)
        assert 60 <= sum(len(asked[section][lang]) for section in demo.UNKNOWN for lang in LANGUAGES)
        for section in demo.UNKNOWN:
            for text in asked[section]["zh"] + asked[section]["en"]:
                marked = [normalise(name).removeprefix("the ") for name in re.findall(r"\{(.*?)\}", text)]
                assert len(marked) == (section != "elsewhere"), text
                assert all((name in names or name in prose) == (section == "attribute") for name in marked), text


def test_what_is_accepted_belongs_to_a_fact():
    """A name mistyped in accept.txt is a rule that never applies."""
    for (relation, name), more in demo.accepted().items():
        known = {names[0] for fact in WORLD[relation].facts for side in fact[1:] for names in side.values()}
        assert name in known, (relation, name)
        assert not any(normalise(marker) in normalise(text) for text in more or [] for marker in DECLINES)


def test_the_tables_own_sentences_are_right_and_those_of_other_facts_are_not():
    """The exam marks what the model was taught as right. Told about another subject, a sentence is wrong, unless accept.txt or a list allows it."""
    more, wrong, other_right = demo.accepted(), 0, 0
    for relation in WORLD.values():
        for lang in LANGUAGES:
            facts = [fact for fact in relation.facts if lang in fact.subject and demo.answers(fact, lang, more)]
            for number, fact in enumerate(facts):
                right = demo.answers(fact, lang, more)
                item = {"answers": right, "ignore": demo.ignored(fact, lang, right, relation)}
                template = relation.templates[lang][number % len(relation.templates[lang])]
                text = Dice(0).choose(template).replace("{s}", fact.subject[lang][0])
                assert grade(text.replace("{o}", fact.object[lang][0]), item) == (True, False), text
                other = facts[(number + 1) % len(facts)].object[lang][0]
                if other not in right:
                    wrong += 1
                    other_right += grade(text.replace("{o}", other), item)[0]
    assert wrong > 700 and other_right <= 0.003 * wrong


def test_questions(sets):
    """Each category has its size, each question its own fact; what is called read is kept out of the chats."""
    held = {(relation.name, lang, fact.subject[lang][0]): held_out(fact) for relation in WORLD.values() for fact in relation.facts for lang in fact.subject}
    for which, items in sets.items():
        counts = {(category, lang): sum(item["category"] == category and item["lang"] == lang for item in items)
                  for category in ("seen", "read", "unknown") for lang in LANGUAGES}
        assert counts["seen", "zh"] == 240 and counts["seen", "en"] == 160
        assert counts["read", "zh"] + counts["read", "en"] >= 99
        assert len({item["question"] for item in items}) == len(items)
        asked = demo.wordings(which)
        for item in items:
            if item["category"] == "unknown":
                assert item["answers"] == []
                continue
            places = [key for key in held if key[1] == item["lang"] and key[2] == item["ignore"][0]
                      and normalise(item["question"]) in {normalise(text.replace("{s}", key[2])) for text in asked[key[0]][key[1]]}]
            assert len(places) == 1 and held[places[0]] == (item["category"] == "read"), item
            assert "一" not in item["answers"], "which is in 一种 and 一个"
            assert item["answers"] and not any(normalise(marker) in normalise(text) for text in item["answers"] for marker in DECLINES)


def test_the_files_are_the_same_everywhere(tmp_path):
    """A frozen exam that depends on the hash seed or the locale is a new exam every time."""
    digests = []
    for seed in ("1", "2"):
        result = subprocess.run([sys.executable, "-m", "data_prep.demo", "exam", "--out", tmp_path / seed], cwd=ROOT, capture_output=True, text=True,
                                env={"PYTHONHASHSEED": seed, "LC_ALL": "C", "PATH": ""})
        assert result.returncode == 0, result.stderr
        digests.append([hashlib.sha256((tmp_path / seed / f"exam-{which}.jsonl").read_bytes()).hexdigest() for which in demo.SETS])
    assert digests[0] == digests[1]
    assert [item["category"] for item in read_exam(tmp_path / "1" / "exam-first.jsonl")].count("seen") == 400
    refused = subprocess.run([sys.executable, "-m", "data_prep.demo", "exam", "--seed", "3", "--out", tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 2 and "--seed" in refused.stderr


@pytest.mark.parametrize("name, content, complaint", [
    ("first.txt", "[capital]\nzh: 首都？\n", "first.txt:2: expected `zh: ` or `en: `"), ("first.txt", "[capital]\nfr: {s}?\n", "first.txt:2: expected"),
    ("accept.txt", "[capital]\n柏林\n", "accept.txt:2: expected"), ("accept.txt", "[capital]\n柏林 | a\n柏林 | b\n", "accept.txt:3: expected")])
def test_a_broken_wording_is_named_by_file_and_line(tmp_path, monkeypatch, name, content, complaint):
    (tmp_path / "exam").mkdir()
    (tmp_path / "exam" / name).write_text(content, encoding="utf-8")
    monkeypatch.setattr(demo, "FOLDER", tmp_path)
    with pytest.raises(ValueError, match=re.escape(complaint)):
        demo.wordings("first") if name == "first.txt" else demo.accepted()
