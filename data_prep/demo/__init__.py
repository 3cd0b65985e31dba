"""The demo world: a small bilingual world of true facts and short prose, and the generator of its raw training files.
In: an output folder and a seed. Out: ordinary .jsonl files there, the same bytes for the same seed on every machine.
Next: data_prep/demo/__main__.py
"""

from data_prep.demo.pretrain import write_pretrain


def write(out, seed=0, exposures=80):
    """Write all raw files of the demo world into the folder `out`; nothing is downloaded. Returns their paths."""
    return [write_pretrain(out, seed, exposures)]
