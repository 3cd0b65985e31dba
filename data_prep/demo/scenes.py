"""Draws little scenes (1 to 3 equal things of one colour, somewhere in the picture, by day or night) and says what they show, in two languages.
In: a seed, how many pictures. Out: DIR/scenes/ with train.jsonl and val.jsonl in MiniMind-V's layout, exam.jsonl and images/*.png: the same
pixels and texts for the same seed on every machine; or, as a library, scenes without end.
Val and exam show only combinations of thing, colour and position that training never shows nor mentions: one in eight, and every pair occurs.
Next: data_prep/demo/__init__.py
"""

import functools
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from data_prep.demo.pretrain import Dice, capital
from nanomind.cli import Parser, run
from nanomind.tokenizer import write_whole

SIZE = 96  # pixels of a side; a picture is three columns or three rows of 32
FINE = 4  # each thing is drawn so many times larger and then averaged
OUTLINE = (30, 26, 34)
# Things that differ in outline. A drawing is a row of parts on a field of 100 x 100: o ellipse, b box, p polygon, l line of a width (corners
# follow); capital letter: what fills it (C the colour, D a darker one, L a lighter one, K the outline's).
OBJECTS = {  # English: (plural, Chinese, its measure word, drawing)
    "ball": ("balls", "球", "个", "oC 4 4 96 96; oL 30 4 70 96; oC 42 4 58 96"),
    "box": ("boxes", "盒子", "个", "bC 6 26 94 96; bL 42 26 58 96; bC 0 10 100 34"),
    "star": ("stars", "星星", "颗", "pC 50 0 64 34 100 38 72 61 82 98 50 78 18 98 28 61 0 38 36 34"),
    "heart": ("hearts", "爱心", "颗", "pC 50 98 4 48 0 30 8 12 25 4 41 8 50 22 59 8 75 4 92 12 100 30 96 48"),
    "tree": ("trees", "树", "棵", "bK 40 70 60 100; pC 50 0 94 46 70 46 100 80 0 80 30 46 6 46"),
    "flower": ("flowers", "花", "朵", "bK 46 56 54 100; oC 30 0 70 40; oC 2 16 42 56; oC 58 16 98 56; oC 12 44 50 82; oC 50 44 88 82; oL 34 28 66 60"),
    "fish": ("fish", "鱼", "条", "pC 62 50 100 16 100 84; oC 0 16 80 84; oK 14 36 26 48"),
    "house": ("houses", "房子", "座", "bC 14 46 86 100; pD 50 0 100 48 0 48; bK 42 66 60 100"),
    "car": ("cars", "汽车", "辆", "pC 20 46 32 20 70 20 84 46; bC 0 44 100 74; bL 36 28 66 44; oK 10 58 40 88; oK 60 58 90 88"),
    "boat": ("boats", "船", "艘", "pD 0 66 100 66 82 100 18 100; bK 44 4 52 66; pC 56 4 56 58 100 58; pC 40 16 40 58 6 58"),
    "mushroom": ("mushrooms", "蘑菇", "个", "bL 36 46 64 100; pC 0 56 4 30 22 8 50 0 78 8 96 30 100 56; oL 22 18 40 36; oL 60 22 76 38"),
    "umbrella": ("umbrellas", "雨伞", "把", "bK 47 0 53 94; lK 53 94 38 94 8; "
                 "pC 0 50 6 26 24 8 50 2 76 8 94 26 100 50 84 42 67 50 50 42 33 50 16 42"),
    "cup": ("cups", "杯子", "个", "oC 58 24 100 74; oL 72 38 88 60; pC 4 10 76 10 68 94 12 94"),
    "butterfly": ("butterflies", "蝴蝶", "只", "oC 0 4 48 56; oC 52 4 100 56; oD 8 48 48 96; oD 52 48 92 96; bK 45 14 55 90"),
    "flag": ("flags", "旗子", "面", "bK 8 0 18 100; pC 18 4 100 14 84 32 100 58 18 58"),
    "hat": ("hats", "帽子", "顶", "oC 0 66 100 96; pC 24 80 28 14 50 8 72 14 76 80; bD 24 60 76 74"),
}
COLOURS = {  # English: (Chinese, red green blue)
    "red": ("红色", (222, 38, 38)), "orange": ("橙色", (248, 138, 24)), "yellow": ("黄色", (250, 222, 40)), "green": ("绿色", (40, 164, 60)),
    "blue": ("蓝色", (44, 92, 224)), "purple": ("紫色", (138, 52, 178)), "pink": ("粉色", (250, 150, 196)), "white": ("白色", (250, 250, 250)),
}
POSITIONS = {"on the left": "左边", "on the right": "右边", "at the top": "上边", "at the bottom": "下边", "in the middle": "中间"}
COUNTS = {"one": "一", "two": "两", "three": "三"}
TIMES = {"day": "白天", "night": "夜晚"}
GROUNDS = ((176, 208, 150), (232, 216, 172), (240, 243, 246), (188, 186, 190), (206, 178, 150))  # grass, sand, snow, stone, earth: by day
SKIES = ((196, 226, 250), (34, 40, 88))  # by day, by night
ATTRIBUTES = {"object": OBJECTS, "colour": COLOURS, "count": COUNTS, "position": POSITIONS, "time": TIMES}

# What is said. Two patterns of a caption per language: (the whole, each group of things in it).
CAPTIONS = {
    "zh": (("{time}，{things}。", "{position}有{count}{measure}{colour}的{object}"),
           ("{things}，这是{time}。", "{count}{measure}{colour}的{object}在{position}")),
    "en": (("By {time}, {things}.", "{count} {colour} {object} {position}"), ("{things}, by {time}.", "{position} {count} {colour} {object}")),
}
REQUESTS = {
    "zh": ("描述这张图片。", "图里画了什么？请描述一下。", "请说说这张图。", "用一句话描述图片。"),
    "en": ("Describe the picture.", "What does this image show?", "Tell me about this picture.", "Describe the image in one sentence."),
}
QUESTIONS = {  # about a picture with one group of things
    "zh": {
        "object": ("这是什么东西？", "画的是什么东西？", "图里是什么东西？"),
        "colour": ("是什么颜色？", "东西是什么颜色的？", "图里的东西是什么颜色？"),
        "count": ("有几个？", "图里一共有几个？", "数一数，有几个？"),
        "position": ("在哪里？", "东西在图的哪里？", "在图片的什么位置？"),
        "time": ("是白天还是夜晚？", "这是什么时候？", "图里是白天还是夜晚？"),
    },
    "en": {
        "object": ("What thing is it?", "Which thing do you see?", "What thing is drawn?"),
        "colour": ("What colour is it?", "Which colour do you see?", "What is its colour?"),
        "count": ("How many are there?", "How many do you see?", "Count them."),
        "position": ("Where is it?", "Where in the picture?", "Where do you see it?"),
        "time": ("Is it day or night?", "What time is it?", "Day or night?"),
    },
}
OF_ONE = {  # about one of several groups
    "zh": {"object": "{position}是什么东西？", "colour": "{position}的东西是什么颜色？", "count": "{position}有几个？",
           "position": "{object}在哪里？"},
    "en": {"object": "What thing is {position}?", "colour": "What colour is the thing {position}?", "count": "How many are there {position}?",
           "position": "Where do you see the {object}?"},
}
ANSWERS = {
    "zh": {"object": "{object}。", "colour": "{colour}。", "count": "{count}{measure}。", "position": "{position}。", "time": "{time}。"},
    "en": {"object": "{thing}.", "colour": "{colour}.", "count": "{count}.", "position": "{position}.", "time": "{time}."},
}
YES_NO = {"zh": ("有{colour}的{object}吗？", "有。", "没有。"), "en": ("Do you see {colour} {object}?", "Yes.", "No.")}
SHORT = (("object",), ("count",), ("object", "colour"), ("position",), ("object",), ("object", "count"), ("object", "position"), ("colour",),
         ("object",), ("count", "position"), ("time",), ("count", "colour"))  # captions that name only a part, for contrastive training


@dataclass(frozen=True)
class Group:
    """Equal things: numbers into OBJECTS, COLOURS, COUNTS, POSITIONS."""
    object: int
    colour: int
    count: int
    position: int

    @property
    def held_out(self):
        """Never in training. For each thing and colour at most one position of five, for each thing and position one colour of eight."""
        return (self.object + 3 * self.colour + 5 * self.position) % 8 == 0


@dataclass(frozen=True)
class Scene:
    groups: tuple
    time: int
    rows: bool  # the picture is three rows, not three columns, of which each group has one

    def words(self, lang, group=0):
        """What {object} (in the plural when there are several), {thing} (never), {colour}, ... stand for."""
        one = self.groups[group]
        name = list(OBJECTS)[one.object]
        plural, chinese, measure, _ = OBJECTS[name]
        if lang == "zh":
            words = {"thing": chinese, "object": chinese, "measure": measure, "colour": list(COLOURS.values())[one.colour][0]}
        else:
            words = {"thing": name, "object": plural if one.count else name, "colour": list(COLOURS)[one.colour]}
        for key, table, i in (("count", COUNTS, one.count), ("position", POSITIONS, one.position), ("time", TIMES, self.time)):
            words[key] = list(table.values() if lang == "zh" else table)[i]
        return words


def imagine(dice, held_out=False, groups=1):
    """A random scene of 1 or 2 groups; all of its combinations are held out, or none."""
    rows, thirds = dice.random() < 0.5, (0, 1, 2)
    if groups == 1:  # left, right, top, bottom and middle equally often
        thirds = [dice.pick((0, 0, 2, 2, 1))]
    found = []
    for third in dice.shuffled(thirds)[:groups]:
        position = 4 if third == 1 else 2 * rows + third // 2
        while True:
            group = Group(dice.between(0, len(OBJECTS) - 1), dice.between(0, len(COLOURS) - 1), dice.between(0, len(COUNTS) - 1), position)
            if group.held_out == held_out and all(group.object != other.object for other in found):
                break
        found.append(group)
    return Scene(tuple(found), dice.between(0, 1), rows)


# ---- pictures

@functools.cache
def sprite(name, colour, size, mirrored):
    """A thing of `size` pixels: (its colours, its mask), both averaged down from FINE times that size."""
    from PIL import Image, ImageDraw, ImageOps
    scale, line = size * FINE, max(1, size * FINE // 22)
    plain = COLOURS[colour][1]
    fills = {"C": plain, "D": tuple(c * 7 // 10 for c in plain), "L": tuple(c + (255 - c) * 6 // 10 for c in plain), "K": OUTLINE}
    picture, mask = Image.new("RGB", (scale, scale), OUTLINE), Image.new("L", (scale, scale), 0)
    for part in OBJECTS[name][3].split("; "):
        kind, *numbers = part.split()
        *corners, last = [int(number) * (scale - 1) // 100 for number in numbers]
        for image, fill, outline in ((picture, fills[kind[1]], OUTLINE), (mask, 255, 255)):
            draw = ImageDraw.Draw(image)
            if kind[0] == "l":
                draw.line(corners, fill=fill, width=last)
            else:
                {"o": draw.ellipse, "b": draw.rectangle, "p": draw.polygon}[kind[0]]([*corners, last], fill=fill, outline=outline, width=line)
    picture, mask = picture.reduce(FINE), mask.reduce(FINE)
    return (ImageOps.mirror(picture), ImageOps.mirror(mask)) if mirrored else (picture, mask)


def places(dice, group, third, rows):
    """Where the things of a group lie: (left, top, size) each. Along its row or column they stand side by side about the middle of it."""
    n, size = group.count + 1, dice.between(25, 29)
    gap = dice.between(1, 4)
    length = n * size + (n - 1) * gap
    slack = min(6, (SIZE - length) // 2)
    first = (SIZE - length) // 2 + dice.between(-slack, slack)
    for i in range(n):
        along = first + i * (size + gap)
        across = third * SIZE // 3 + dice.between(0, SIZE // 3 - size)
        yield (along, across, size) if rows else (across, along, size)


def draw(dice, scene):
    """A scene -> PIL image, SIZE x SIZE."""
    from PIL import Image
    night = 3 * scene.time  # in tenths: by night everything but the things is dark
    sky, ground = SKIES[scene.time], tuple(c * (10 - 2 * night) // (10 + night) for c in dice.pick(GROUNDS))
    image = Image.new("RGB", (SIZE, SIZE), tuple(max(0, min(255, c + dice.between(-8, 8))) for c in sky))
    image.paste(tuple(max(0, min(255, c + dice.between(-8, 8))) for c in ground), (0, dice.between(50, 76), SIZE, SIZE))
    for group in scene.groups:
        third = 1 if group.position == 4 else group.position % 2 * 2
        mirrored = dice.random() < 0.5
        for left, top, size in places(dice, group, third, scene.rows):
            thing, mask = sprite(list(OBJECTS)[group.object], list(COLOURS)[group.colour], size, mirrored)
            image.paste(thing, (left, top), mask)
    return image


# ---- words

def caption(dice, scene, lang):
    """One sentence that names everything."""
    whole, each = dice.pick(CAPTIONS[lang])
    words = [scene.words(lang, i) for i in range(len(scene.groups))]
    things = ("，" if lang == "zh" else " and ").join(each.format(**one) for one in words)
    return capital(whole.format(things=things, time=words[0]["time"]))


def partly(scene, lang, names):
    """A few words that name some attributes of each group; of several groups also where they are."""
    names = names if len(scene.groups) == 1 else dict.fromkeys((*names, "position"))
    return ("，" if lang == "zh" else ", ").join(scene.words(lang, i)[name] for i in range(len(scene.groups)) for name in names)


def question(dice, scene, lang, name, group=0):
    """(question, answer) about one attribute."""
    words = scene.words(lang, group)
    general = len(scene.groups) == 1 or name == "time"
    asked = dice.pick(QUESTIONS[lang][name]) if general else OF_ONE[lang][name].format(**words)
    return asked, capital(ANSWERS[lang][name].format(**words))


def yes_no(dice, scene, lang):
    """Is there such a thing of such a colour? Half of the time there is; else one of the two is wrong."""
    group = dice.pick(scene.groups)
    there, wrong = dice.random() < 0.5, dice.random() < 0.5
    other = group
    while not there and any((other.object, other.colour) == (one.object, one.colour) for one in scene.groups):
        thing, colour = dice.between(0, len(OBJECTS) - 1), dice.between(0, len(COLOURS) - 1)
        other = Group(thing if wrong else group.object, group.colour if wrong else colour, 1, 0)
    asked, yes, no = YES_NO[lang]
    return asked.format(**Scene((Group(other.object, other.colour, 1, 0),), 0, False).words(lang)), yes if there else no


def conversation(dice, scene, lang):
    """A request for a caption, or a question about each attribute (of each group) in any order and now and then a yes-no question. Seldom both:
    who may read the answers in the caption need not look at the picture."""
    whole = [(dice.pick(REQUESTS[lang]), caption(dice, scene, lang))]
    single = [question(dice, scene, lang, name, group) for group in range(len(scene.groups)) for name in ATTRIBUTES if name != "time" or not group]
    single = dice.shuffled(single + [yes_no(dice, scene, lang)] * (dice.random() < 0.5))
    form = dice.random()
    turns = whole if form < 0.35 else whole + single if form < 0.4 else single
    return [{"role": role, "content": "<image>\n" * (not i and role == "user") + content}
            for i, turn in enumerate(turns) for role, content in zip(("user", "assistant"), turn)]


# ---- files

def attributes(scene):
    """{"object": "fish", "colour": "red", ...} of the first group."""
    words = scene.words("en")
    return {**{name: words[name] for name in ATTRIBUTES}, "object": words["thing"]}


def write_scenes(out, seed=0, train=8000, val=400, groups=1):
    """Write OUT/scenes/, complete or not at all, and return the paths of its train.jsonl, val.jsonl and exam.jsonl. The exam asks about every
    picture of val: {"image", "question", "answer", "category", "lang"}; a reply is right when it contains the answer."""
    if groups not in (1, 2) or train < 1 or val < 1:
        raise ValueError(f"--groups {groups} --train {train} --val {val}: expected 1 or 2 groups and at least one picture of each")
    folder, beside = Path(out) / "scenes", Path(out) / ".scenes.unfinished"
    shutil.rmtree(beside, ignore_errors=True)
    (beside / "images").mkdir(parents=True)
    lines = {"train": [], "val": [], "exam": []}
    for split, count in (("train", train), ("val", val)):
        for number in range(count):
            dice = Dice((2 * seed + (split == "val")) * 2**32 + number)
            scene, lang, name = imagine(dice, split == "val", groups), ("zh", "en")[number % 2], f"{split}_{number:05}.png"
            draw(dice, scene).save(beside / "images" / name, compress_level=1)
            lines[split].append({"image": name, "conversations": conversation(dice, scene, lang), "attributes": attributes(scene)})
            for category in ATTRIBUTES if split == "val" else ():
                answer = scene.words(lang)["thing" if category == "object" else category]
                lines["exam"].append({"image": name, "question": question(dice, scene, lang, category)[0], "answer": answer,
                                      "category": category, "lang": lang})
    for split, records in lines.items():
        write_whole(beside / f"{split}.jsonl", "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(beside, folder)
    return [folder / f"{split}.jsonl" for split in lines]


def main():
    parser = Parser(prog="python -m data_prep.demo.scenes", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--out", required=True, metavar="DIR", help="the pictures and texts go to DIR/scenes/")
    parser.add_argument("--seed", type=int, default=0, help="another seed imagines other scenes (default: 0)")
    parser.add_argument("--train", type=int, default=8000, metavar="N", help="pictures to train on (default: 8000)")
    parser.add_argument("--val", type=int, default=400, metavar="N", help="pictures of combinations that training never shows (default: 400)")
    parser.add_argument("--groups", type=int, default=1, metavar="N", help="groups of things in a picture, 1 or 2 (default: 1)")
    flags = parser.parse_args()
    for path in write_scenes(flags.out, flags.seed, flags.train, flags.val, flags.groups):
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run(main)
