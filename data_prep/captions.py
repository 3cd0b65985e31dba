"""Pictures with captions, for contrastive training: drawn scenes without end, or the pictures of record files.
In: a seed, or .jsonl and .json files. Out: `batch(step, size)`, a pure function of (seed, step), and held-out examples with what they show.
Next: data_prep/clip.py
"""

from pathlib import Path

import numpy as np
from PIL.Image import BICUBIC

from data_prep import chat
from data_prep.common import _share
from data_prep.demo import scenes
from data_prep.demo.pretrain import Dice
from nanomind.images import find_image, open_image
from nanomind.records import Reader

VAL_SHARE = 0.05  # of the pictures, kept out of training when no others are given


class Scenes:
    """Drawn scenes without end, each seen once. Two captions each: one names everything, the other a part, the same part throughout a
    batch, for else the part named of one picture would be true of others as well. groups=2: every other batch shows two groups of things."""

    def __init__(self, seed, size, groups=1):
        if size != scenes.SIZE:
            raise ValueError(f"--config: image_size is {size}, the drawn scenes have {scenes.SIZE}")
        self.seed, self.groups = seed, groups

    def some(self, first, count, held_out=False, groups=1):
        """-> pictures (count, S, S, 3) uint8, their dice, scenes and languages."""
        made = []
        for number in range(first, first + count):
            dice = Dice((2 * self.seed + held_out) * 2**40 + number)
            scene = scenes.imagine(dice, held_out, groups)
            lang = dice.pick(("zh", "en"))
            made.append((np.asarray(scenes.draw(dice, scene)), dice, scene, lang))
        pictures, *rest = zip(*made)
        return np.stack(pictures), list(zip(*rest))

    def batch(self, step, size):
        """-> pictures (B, S, S, 3) uint8, [B captions each, ...]"""
        pictures, made = self.some(step * size, size, groups=self.groups if step % 2 else 1)
        part = scenes.SHORT[step // self.groups % len(scenes.SHORT)]
        return pictures, [[scenes.caption(*one) for one in made], [scenes.partly(scene, lang, part) for _, scene, lang in made]]

    def examples(self, count, held_out=False):
        """Scenes of one group -> pictures, captions, attributes of each."""
        pictures, made = self.some(2**39, count, held_out)
        return pictures, [scenes.caption(*one) for one in made], [scenes.attributes(scene) for _, scene, _ in made]


class Folder:
    """The pictures of record files, all in memory, seen once an epoch in an order of (seed, epoch), each with one of its captions."""

    def __init__(self, files, val, seed, size):
        self.seed, self.epoch, records = seed, -1, {False: {}, True: {}}
        for held_out, names in ((False, files), (True, val)):
            for path, caption, attributes in captioned(Reader(names)) if names else ():
                side = held_out or not val and _share(path.name) < VAL_SHARE
                records[side].setdefault(path, ([], attributes))[0].append(caption)
        self.pictures, self.captions, self.attributes = {}, {}, {}
        for side, found in records.items():
            if len(found) < 2:
                raise ValueError(f"{' '.join(map(str, files))}: {len(found)} pictures to {'report on' if side else 'train on'}, expected more")
            self.pictures[side] = np.stack([opened(path, size) for path in found])
            self.captions[side] = [captions for captions, _ in found.values()]
            self.attributes[side] = [attributes for _, attributes in found.values()]

    def batch(self, step, size):
        chosen, count = [], len(self.captions[False])
        for place in range(step * size, (step + 1) * size):
            if self.epoch != place // count:
                self.epoch, self.order = place // count, np.random.default_rng([self.seed, place // count]).permutation(count)
            chosen.append(self.order[place % count])
        return self.pictures[False][chosen], [[Dice(step * size + i).pick(self.captions[False][n]) for i, n in enumerate(chosen)]]

    def examples(self, count, held_out=False):
        return self.pictures[held_out][:count], [captions[0] for captions in self.captions[held_out][:count]], self.attributes[held_out][:count]


def captioned(reader):
    """(path of the picture, caption, attributes or None) of each record. The caption is `caption`, `text`, or all that the assistant says."""
    for where, record in reader:
        try:
            path = find_image(str(record.get("image")), Path(where.rpartition(":")[0]).parent)
            kinds = [kind for kind, (fields, inner) in chat.FORMATS.items() if chat.fits(record, fields, inner)]
            said = [m["content"] for m in chat.checked(chat.to_messages(record, kinds[0])) if m["role"] == "assistant"] if kinds else []
            caption = record.get("caption") or record.get("text") or " ".join(said)
            if not isinstance(caption, str) or not caption.strip():
                raise ValueError("no caption, text or conversations with a text")
        except (ValueError, TypeError) as problem:
            reader.reject(where, *problem.args)
        else:
            yield path, caption, record.get("attributes")


def opened(path, size):
    """A picture as open_clip's own preprocessing would show it: (size, size, 3) uint8."""
    return np.asarray(open_image(path.read_bytes(), str(path)).resize((size, size), BICUBIC))
