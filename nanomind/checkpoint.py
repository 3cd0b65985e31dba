"""Checkpoints: a Hugging Face folder that can also be trained on.
In: a model, its tokenizer, an optimiser, a few numbers. Out: config.json, model.safetensors, tokenizer.json, state-STEP.safetensors, log.jsonl.
Next: nanomind/parallel.py

Only safetensors and JSON: reading a folder never runs code from it. A save is one atomic rename: the optimiser's state goes first into a file
of its own name, then model.safetensors, whose header says which step it is, takes the place of the old one. Killed at any moment, the folder
is all old or all new.
"""

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from nanomind.config import ModelConfig, read_json
from nanomind.model import LanguageModel
from nanomind.optim import whole
from nanomind.tokenizer import Tokenizer, write_whole
from nanomind.vision import VisionLanguageModel


def write_tensors(path, tensors, metadata):
    """Write a safetensors file so that a reader sees the old or the new one; metadata: dict of strings, kept in the file's header."""
    beside = path.with_name(path.name + ".tmp")
    try:
        try:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, beside, metadata=metadata)
        except SafetensorError as problem:  # a full disk arrives as its text
            raise OSError(f"{path}: could not be written: {problem}") from None
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def read_tensors(path):
    """-> (dict of tensors, metadata), or a ValueError that names the file."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: not found") from None
    except SafetensorError as problem:
        raise ValueError(f"{path}: is not a whole safetensors file ({problem})") from None


def begin_folder(folder, config, tokenizer, chat, vision=None):
    """Make the parts of a checkpoint that do not change during a run. chat: does the model answer (or continue text)? vision: of a
    VisionLanguageModel, kept in vision.json."""
    folder.mkdir(parents=True, exist_ok=True)
    eos = tokenizer.im_end if chat else tokenizer.end_of_text
    write_whole(folder / "config.json", json.dumps({**config.to_hf(eos), "nanomind": {"chat": chat}}, indent=2) + "\n")
    if vision:
        write_whole(folder / "vision.json", json.dumps(vision, ensure_ascii=False, indent=1) + "\n")
    tokenizer.save(folder)


def gather(tensors, keep):
    """Tensors whose parts several processes may hold -> whole ones, for the process that will `keep` them; one at a time, in the computer's memory."""
    found = {}
    for name, tensor in tensors.items():
        full = whole(tensor)
        if keep:
            found[name] = full if full is tensor else full.cpu()
    return found


def save(folder, model, optimizer, progress, writes=True):
    """Save weights, optimiser and `progress` (a JSON-able dict with "step"); commits with the rename of model.safetensors. Of a sharded model
    every process calls this, one of them `writes`: the folder is the same as without."""
    step = str(progress["step"])
    weights = model.state_dict()
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]  # the embedding, once
    state, weights = gather(optimizer.tensors(), writes), gather(weights, writes)
    if not writes:
        return
    write_tensors(folder / f"state-{step}.safetensors", state, {"progress": json.dumps(progress)})
    eyes = {name: weights.pop(name) for name in list(weights) if name.startswith("projector.")}
    if eyes:  # beside the language model, which stays one that every tool can load
        write_tensors(folder / f"projector-{step}.safetensors", eyes, {"format": "pt"})
    write_tensors(folder / "model.safetensors", weights, {"format": "pt", "step": step})
    for old in (*folder.glob("state-*.safetensors*"), *folder.glob("projector-*.safetensors*")):
        if old.name not in (f"state-{step}.safetensors", f"projector-{step}.safetensors"):
            old.unlink(missing_ok=True)


def load_model(folder, checkpointing=False):
    """A checkpoint folder of ours or any Llama or Qwen3 folder -> LanguageModel, or VisionLanguageModel where there is a vision.json; fp32.
    Names and shapes must agree exactly."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: no config.json, expected a checkpoint folder (config.json, model.safetensors, tokenizer.json)")
    config = ModelConfig.from_hf(read_json(folder / "config.json"), str(folder / "config.json"))
    if not (folder / "model.safetensors").is_file():
        others = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".safetensors") and not path.name.startswith(("state-", "projector-")))
        raise FileNotFoundError(f"{folder}: no model.safetensors" + (f"; {', '.join(others[:3])} is not read here (pickles may run code, parts "
                                "must be joined): save one model.safetensors with transformers' save_pretrained" if others else
                                ", so nothing was saved here yet"))
    weights, header = read_tensors(folder / "model.safetensors")
    vision = read_json(folder / "vision.json") if (folder / "vision.json").is_file() else None
    if vision:
        weights.update(read_tensors(folder / f"projector-{header.get('step')}.safetensors")[0])
    with torch.device("meta"):  # shapes only: no time spent on random numbers that are overwritten
        model = VisionLanguageModel(config, vision, checkpointing) if vision else LanguageModel(config, checkpointing)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights.get("model.embed_tokens.weight", torch.empty(0))
    problems = [f"missing {name}" for name in expected if name not in weights]
    problems += [f"unexpected {name}" for name in weights if name not in expected]
    problems += [f"{name} is {tuple(weights[name].shape)}, expected {shape}" for name, shape in expected.items()
                 if name in weights and tuple(weights[name].shape) != shape]
    if problems:
        raise ValueError(f"{folder / 'model.safetensors'}: does not fit its config.json: {'; '.join(problems[:4])}"
                         + (f" and {len(problems) - 4} more" if len(problems) > 4 else ""))
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, assign=True)
    for p in model.parameters():
        p.requires_grad_(True)
    if config.tie_word_embeddings:  # `assign` gave the head a tensor of its own
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


def load(folder):
    """A checkpoint folder -> (LanguageModel, Tokenizer)."""
    model, tokenizer = load_model(folder), Tokenizer.load(folder)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, the model an embedding for {model.config.vocab_size}")
    return model, tokenizer


def is_chat(folder, tokenizer):
    """Does this model answer (True) or continue text? Ours say so in config.json; others by having chat tokens and a template."""
    ours = read_json(Path(folder) / "config.json").get("nanomind")
    return bool(ours["chat"]) if ours else tokenizer.im_start is not None and "chat_template" in tokenizer.config


def saved_step(folder):
    """The step of the last save of a folder, as text, or None when nothing was saved."""
    weights = Path(folder) / "model.safetensors"
    if not weights.is_file():
        return None
    try:
        with safe_open(weights, framework="pt") as file:
            step = (file.metadata() or {}).get("step")
    except SafetensorError as problem:
        raise ValueError(f"{weights}: is not a whole safetensors file ({problem})") from None
    if step is None:
        raise ValueError(f"{folder}: this model was not saved by train.py; start from it with --init {folder}")
    return step


def load_progress(folder):
    """What the last save of a folder said, or None when nothing was saved. -> (optimiser tensors, progress dict)."""
    step = saved_step(folder)
    if step is None:
        return None
    tensors, metadata = read_tensors(Path(folder) / f"state-{step}.safetensors")
    return tensors, json.loads(metadata["progress"])


def finish(folder, record):
    """Note beside the last save that the run has reached its end, and how (record: with "step")."""
    write_whole(folder / "finished.json", json.dumps(record, ensure_ascii=False, indent=1) + "\n")


def finished(folder):
    """What `finish` noted, or None where the run has not reached its end or went on behind it."""
    path = Path(folder) / "finished.json"
    record = read_json(path) if path.is_file() else None
    return record if record and str(record["step"]) == saved_step(folder) else None


def read_log(path):
    """The records of a log.jsonl, up to half a line that a killed run may have left at its end."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return found


class Log:
    """log.jsonl: one JSON object a line. Opening it at `step` cuts off whatever a killed run wrote after its last save."""

    def __init__(self, path, step=0, fresh=True):
        kept = [] if fresh else [record for record in read_log(path) if record.get("step", 0) <= step]
        write_whole(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept))
        self.file = open(path, "a", encoding="utf-8")

    def write(self, record):
        self.file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self.file.flush()


def newest(out="out", run="", stage=""):
    """The folder of the newest saved checkpoint under out/RUN/STAGE."""
    found = [path.parent for path in Path(out).glob(f"{run or '*'}/{stage or '*'}/model.safetensors")]
    if not found:
        raise FileNotFoundError(f"no checkpoint in {out}/{run or 'RUN'}/{stage or 'STAGE'}: train one first: python train.py --stage pretrain")
    return max(found, key=lambda folder: (folder / "model.safetensors").stat().st_mtime)
