"""The demo world: a small bilingual world of true facts and short prose, and the generators of its raw training files.
In: an output folder and a seed. Out: ordinary .jsonl files there, the same bytes for the same seed on every machine.
Next: data_prep/demo/__main__.py
"""

FILES = ("pretrain.jsonl", "sft.jsonl", "recall.jsonl", "prompts.jsonl", "dpo.jsonl", "replay.jsonl", "scenes/train.jsonl")


def write(out, seed=0, exposures=140, asked=36, mixed=8, files=FILES):
    """Write the raw files of the demo world into the folder `out`; nothing is downloaded. Returns their paths. `mixed` is how often
    each fact is also asked about in the pretraining text, as dialogues written out; `files` are those that are wanted. recall.jsonl: pretraining
    text for beside the chats, so that over them it is not forgotten."""
    from data_prep.demo.chats import as_documents, write_prompts, write_sft  # here, so that python -m data_prep.demo.scenes imports itself once
    from data_prep.demo.preferences import write_dpo
    from data_prep.demo.pretrain import write_pretrain
    from data_prep.demo.scenes import write_scenes
    writers = {"pretrain.jsonl": lambda: write_pretrain(out, seed, exposures, as_documents(seed, mixed) if mixed else ()),
               "sft.jsonl": lambda: write_sft(out, seed, asked), "recall.jsonl": lambda: write_pretrain(out, f"{seed} recall", 3 * asked, name="recall.jsonl"),
               "prompts.jsonl": lambda: write_prompts(out, seed), "dpo.jsonl": lambda: write_dpo(out, seed),
               "replay.jsonl": lambda: write_prompts(out, f"{seed} replay", 3, "replay.jsonl"), "scenes/train.jsonl": lambda: write_scenes(out, seed)[0]}
    return [writers[file]() for file in files]
