"""The table: what each stage trains on, what it starts from, how it is built, what it minimises.
In: a TrainConfig. Out: a row of STAGES, and the three things a run needs made from it: data folder, model, objective.
Next: nanomind/plan.py
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import bpe
from data_prep import demo
from data_prep.common import fingerprint, prepare
from data_prep.distill import write_answers
from nanomind import bins
from nanomind.checkpoint import load, load_model, read_tensors, write_tensors
from nanomind.config import ModelConfig, TrainConfig, read_json
from nanomind.data import PackedTokens
from nanomind.model import LanguageModel
from nanomind.objectives import DPO, Describe, Distill, NextToken, TeacherStates, reference_log_probs
from nanomind.records import find_files
from nanomind.tokenizer import Tokenizer
from nanomind.vision import Features, add_eyes, load_encoder, matching_encoder


CHAT_PROMPTS = ("请介绍一下自己。", "Introduce the history of the United States, please.")


@dataclass(frozen=True)
class Stage:
    kind: str  # of its data: text, chat, pairs or images (the module of data_prep that makes it)
    builtin: tuple  # files of the built-in corpus it trains on when --data is not given
    starts_from: tuple  # stages of the same run whose checkpoint it starts from, the first that exists; () = random weights
    objective: object  # called with the Run below -> the objective
    defaults: dict  # of TrainConfig, over those of the preset
    prompts: tuple  # what samples are made from while it trains
    flags: tuple = ()  # fields of TrainConfig that only such stages know
    trains: str = ""  # what its parameters' names begin with, when the rest is frozen
    demo: dict = field(default_factory=dict)  # of TrainConfig, over those, when it trains on the built-in world
    replay: tuple = ()  # stages of the same run; on the built-in world the first that exists answers questions beside, so that what it knew is not forgotten
    minutes: float = 4.0  # of a run on the built-in corpus without a length; rows that share a --time-limit share it in proportion
    tokens: float = 1e6  # about what its built-in corpus gives, for a dry run

    @property
    def chat(self):
        """Does it see conversations (kept whole in a row), or text (a stream that is cut)?"""
        return self.kind != "text"


@dataclass
class Run:
    """What an objective may need to be made: the settings, the teacher and, of little data, what it thinks of all of it (distill), the
    reference's log-probabilities (dpo)."""
    cfg: object
    teacher: object = None
    states: TeacherStates = None
    reference: dict = None


EYES = ("clip", "clip_weights", "projector", "projector_lr", "feature_budget")
SHORT = {"vocab_size": 4480, "seq_len": 256, "batch_size": 8}  # documents are short; so many tokens that two names in five are one (docs/recipe.md)
STAGES = {
    "pretrain": Stage("text", ("pretrain.jsonl",), (), NextToken, {}, ("万有引力原理是", "The largest ocean on Earth is"),
                      demo={**SHORT, "preset": "demo", "lr": 0.015, "adam_lr": 0.008}, minutes=1.7, tokens=3.4e6),
    "sft": Stage("chat", ("sft.jsonl", "recall.jsonl"), ("pretrain",), NextToken, {"seq_len": 512, "lr": 0.003, "adam_lr": 0.001, "weight_decay": 0.0}, CHAT_PROMPTS,
                 demo={**SHORT, "lr": 0.012, "adam_lr": 0.005}, minutes=7.1, tokens=7.2e6),
    "distill": Stage("chat", ("prompts.jsonl",), (), Distill, {"preset": "pico", "seq_len": 512}, CHAT_PROMPTS, flags=("teacher", "alpha", "distill_temperature"),
                     demo={**SHORT, "lr": 0.03, "adam_lr": 0.02}, minutes=2.3, tokens=0.5e6),
    "dpo": Stage("pairs", ("dpo.jsonl",), ("sft",), DPO, {"optimizer": "adamw", "lr": 1e-4, "weight_decay": 0.0, "batch_size": 4, "seq_len": 1024}, CHAT_PROMPTS,
                 flags=("beta", "label_smoothing", "dpo_loss"), demo={**SHORT, "lr": 3e-5}, minutes=0.9, tokens=0.45e6),
    "vlm-1": Stage("images", ("scenes/train.jsonl",), ("dpo", "sft", "pretrain"), Describe, {"seq_len": 512, "weight_decay": 0.0}, (), EYES, "projector.",
                   SHORT, ("dpo", "sft"), 0.8),
    "vlm-2": Stage("images", ("scenes/train.jsonl",), ("vlm-1",), Describe, {"seq_len": 512, "lr": 0.006, "adam_lr": 0.003, "weight_decay": 0.0}, (), EYES,
                   demo={**SHORT, "lr": 0.003, "adam_lr": 0.0015}, replay=("dpo", "sft"), minutes=1.7),
}
JOURNEY = "all"  # the group that goes on by itself where it was interrupted, and is measured after every stage (journey.py)
GROUPS = {"vlm": ("vlm-1", "vlm-2"), JOURNEY: tuple(STAGES)}  # names of several rows, one after the other; --phase N takes the N-th
JOURNEY_FLAGS = ("stage", "run", "overwrite", "minutes", "seed", "threads", "precision", "device", "dry_run")


def rows(given):
    """The flags that were given -> a list of them for every row of the table they name: one for one stage, several for a name of GROUPS."""
    name, phase = given.get("stage", TrainConfig.stage), given.get("phase", "both")
    unknown = [f"--{flag.replace('_', '-')}" for flag in given if name == JOURNEY and flag not in JOURNEY_FLAGS]
    if unknown:
        raise ValueError(f"--stage {name} does not know {', '.join(unknown)}: it runs every stage with its defaults and takes "
                         f"{', '.join('--' + flag.replace('_', '-') for flag in JOURNEY_FLAGS)}")
    if name not in GROUPS:
        if name not in STAGES:
            raise ValueError(f"--stage {name}: expected {', '.join([*(n for n in STAGES if n not in GROUPS['vlm']), *GROUPS])}")
        if "phase" in given:
            raise ValueError(f"--phase {phase}: --stage {name} has no phases; vlm has")
        if "minutes" in given:
            raise ValueError(f"--minutes {given['minutes']:g}: is shared by several stages ({', '.join(GROUPS)}); --stage {name} takes --time-limit")
        return [given]
    chosen = GROUPS[name] if phase == "both" else GROUPS[name][int(phase) - 1:int(phase)]
    found, minutes = [], sum(STAGES[row].minutes for row in chosen)
    if "minutes" in given and ("time_limit" in given or not 0 < given["minutes"] < float("inf")):
        raise ValueError(f"--minutes {given['minutes']:g}: expected more than 0, and no --time-limit beside it")
    for row in chosen:
        own = {key: value for key, value in given.items() if key not in ("phase", "minutes") and not (found and key in ("init", "preset") and "dry_run" not in given)}
        if "time_limit" in given or "minutes" in given:
            own["time_limit"] = given.get("minutes", given.get("time_limit")) * STAGES[row].minutes / minutes
        found.append({**own, "stage": row})
    return found


def defaults(given):
    """Of TrainConfig, over those of the preset: the stage's own, and on the built-in world, unless a --preset is asked for, those that suit it."""
    stage = STAGES[given.get("stage", TrainConfig.stage)]
    own = {**stage.defaults, **given}
    return stage.defaults if own.get("data") or given.get("preset") else {**stage.defaults, **stage.demo}


def check_flags(given, name):
    """Refuse flags that belong to other stages."""
    owners = {flag: other for other, stage in STAGES.items() for flag in stage.flags}
    foreign = [f"--{flag.replace('_', '-')} (of --stage {owners[flag]})" for flag in given if flag in owners and flag not in STAGES[name].flags]
    if foreign:
        raise ValueError(f"--stage {name} does not know {', '.join(foreign)}")


def teacher_folder(cfg):
    """Where the teacher of a distillation lies."""
    folder = Path(cfg.teacher) if cfg.teacher else Path("out") / cfg.run / "sft"
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: no teacher there; train one (--stage sft --run {cfg.run}) or name its folder with --teacher")
    return folder


def make_objective(cfg, stage, model, tokenizer, train, val, folder, machine):
    """The objective of a run, with what it needs: a frozen teacher, or the log-probabilities of the model the run starts from. Those are computed
    once and kept with the run, so a resumed run reads the same numbers."""
    run = Run(cfg)
    if "teacher" in stage.flags:
        teacher, theirs = load(teacher_folder(cfg))
        if theirs.hash != tokenizer.hash:
            raise ValueError(f"{teacher_folder(cfg)}: the teacher has another tokenizer than the data: prepare the data with --tokenizer {teacher_folder(cfg)}")
        if teacher.config.vocab_size != model.config.vocab_size:  # some pad their embedding
            raise ValueError(f"{teacher_folder(cfg)}: the teacher tells {teacher.config.vocab_size:,} tokens apart and the student {model.config.vocab_size:,}: their "
                             "distributions cannot be compared; let it write answers (python -m data_prep.distill) and train --stage sft on them")
        run.teacher = teacher.to(machine.device).eval()
        run.states = TeacherStates(run.teacher, train, machine) if TeacherStates.fit(run.teacher, train) else None
    if "beta" in stage.flags:
        path = folder / "reference.safetensors"
        if not path.is_file():
            model.eval()
            write_tensors(path, {name: reference_log_probs(model, rows, machine) for name, rows in (("train", train), ("val", val)) if rows}, {})
            model.train()
        run.reference, _ = read_tensors(path)
    return stage.objective(run)


def parts(names):
    """"a, b" -> [Path("a"), Path("b")]"""
    return [Path(name.strip()) for name in names.split(",") if name.strip()]


def prepared(cfg):
    """The data folder that --data names, or None when it names raw files or nothing."""
    paths = parts(cfg.data)
    return paths[0] if len(paths) == 1 and any((paths[0] / name).is_file() for name in ("meta.json", "train/tokens.bin")) else None


def estimated_tokens(cfg):
    """About how many tokens the raw files of a run will give (3.5 bytes of text make a token, a compressed byte holds four), for a dry run."""
    if not cfg.data:
        return STAGES[cfg.stage].tokens
    return sum(file.stat().st_size * (4 if file.suffix in (".gz", ".xz") else 1) for file in find_files(parts(cfg.data))) / 3.5


def find_data(cfg, stage, run_folder):
    """The data folder of a run: --data as it is, or made (once, into the run's folder) from raw files or the built-in corpus."""
    if prepared(cfg):
        if cfg.val:
            raise ValueError(f"--val {cfg.val}: {cfg.data} is a data folder and holds its validation text already; --val goes with raw files")
        folder = bins.open_folder(prepared(cfg))
        if cfg.tokenizer and Tokenizer.load(cfg.tokenizer).hash != folder.tokenizer.hash:
            raise ValueError(f"--tokenizer {cfg.tokenizer}: {cfg.data} was made with another one, which it holds: leave out --tokenizer")
        if cfg.vocab_size not in (TrainConfig.vocab_size, folder.tokenizer.vocab_size):
            raise ValueError(f"--vocab-size {cfg.vocab_size}: {cfg.data} holds its tokenizer already, of {folder.tokenizer.vocab_size:,}: leave out --vocab-size")
        return folder
    paths = raw_files(cfg, stage, run_folder)
    val = find_files(parts(cfg.val)) if cfg.val else [] if cfg.data else [file for file in [paths[0].with_name("val.jsonl")] if file.is_file()]
    tokenizer_folder = find_tokenizer(cfg, paths, run_folder)
    out = run_folder / "data" / f"{stage.kind}-{fingerprint(paths, 'validated on', *val, Tokenizer.load(tokenizer_folder).hash)}"
    if not (out / "meta.json").is_file():
        prepare(stage.kind, paths, tokenizer_folder, out, val=val)
    return bins.open_folder(out)


def raw_files(cfg, stage, run_folder):
    """The raw files of a run: those of --data, or the built-in corpus, which is written when it is not there yet."""
    if cfg.data:
        return find_files(parts(cfg.data))
    folder = run_folder / "raw"
    demo.write(folder, files=[name for name in stage.builtin if not (folder / name).is_file()])
    files = [folder / name for name in stage.builtin]
    if "teacher" in stage.flags:  # of the built-in world it has the questions: the teacher answers
        return [answered(teacher_folder(cfg), *files, cfg, 64)]  # tokens: the few long answers would cost a small student much of its time
    known = [path for path in (run_folder / name for name in stage.replay) if (path / "model.safetensors").is_file()]
    try:
        files += [answered(path, folder / "replay.jsonl", cfg, 128) for path in known[:1]]
    except ValueError as problem:
        print(f"nothing to replay: {problem}")  # a model that cannot answer has nothing to forget
    return files


def answered(model_folder, prompts, cfg, longest):
    """The file with a model's own answers, of at most so many tokens, to questions about the whole built-in world (a file of it), written when it is
    not there yet."""
    if not prompts.is_file():
        demo.write(prompts.parent, files=(prompts.name,))
    answers = prompts.with_name(f"answers-{fingerprint([model_folder / 'model.safetensors', prompts])}.jsonl")
    if not answers.is_file():
        write_answers(model_folder, [prompts], answers, batch_size=512, max_new_tokens=longest, threads=cfg.threads, precision=cfg.precision)
    return answers


def find_tokenizer(cfg, paths, run_folder):
    """--tokenizer, else that of the checkpoint the run starts from or of its teacher, else one learnt (once) from the raw files themselves."""
    if cfg.tokenizer:
        return Path(cfg.tokenizer)
    if "teacher" in STAGES[cfg.stage].flags:
        return teacher_folder(cfg)
    if find_init(cfg):
        return find_init(cfg)
    folder = run_folder / f"tokenizer-{fingerprint(paths, cfg.vocab_size)}"
    if not (folder / "tokenizer.json").is_file():
        bpe.train(paths, cfg.vocab_size, log=print).save(folder)
    return folder


def shape(cfg, preset_config, given):
    """-> (ModelConfig of the model a run starts with, what to call it): that of its checkpoint, or the preset's."""
    init = find_init(cfg)
    if init is None:
        return replace(preset_config, vocab_size=cfg.vocab_size), cfg.preset or "nano"
    if "preset" in given:
        raise ValueError(f"--preset {cfg.preset}: the run starts from {init}, which has its shape: leave out --preset")
    if not (init / "config.json").is_file():
        raise FileNotFoundError(f"{init}: no config.json, expected a checkpoint folder (config.json, model.safetensors, tokenizer.json)")
    config = ModelConfig.from_hf(read_json(init / "config.json"), str(init / "config.json"))
    if cfg.seq_len > config.max_position_embeddings:
        raise ValueError(f"--seq-len {cfg.seq_len}: the model in {init} is made for at most {config.max_position_embeddings} tokens")
    return config, str(init)


def build(cfg, model_config, tokenizer, encoder=None):
    """The model a run starts with: the checkpoint of --init or of the stage before, or random weights of the preset's shape."""
    init = find_init(cfg)
    if init is not None and Tokenizer.load(init).hash != tokenizer.hash:
        raise ValueError(f"{init} was trained with another tokenizer than the data was made with: prepare the data with --tokenizer {init}")
    model = load_model(init, cfg.checkpointing) if init else LanguageModel(model_config, cfg.checkpointing).init_weights(cfg.seed)
    if encoder:
        vision = {"encoder": encoder.identity, "patches": encoder.patches, "width": encoder.width, "projector": cfg.projector, "mark": tokenizer.end_of_text}
        had = getattr(model, "vision", None)
        if had and had["encoder"]["sha256"] != encoder.identity["sha256"]:
            raise ValueError(f"--clip {cfg.clip}: {init} was trained with another encoder, {had['encoder']['clip']} {had['encoder']['weights']}")
        model = model if had else add_eyes(model, vision, cfg.checkpointing, cfg.seed)
    return freeze(model, STAGES[cfg.stage])


def freeze(model, stage):
    """Mark what a stage trains; the rest keeps its weights."""
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith(stage.trains))
    return model


def find_encoder(cfg, stage, given, saved_folder=None):
    """The frozen encoder of a stage that sees, or None: the one its checkpoint was trained with (a --clip must be the same one), or that of --clip."""
    if "clip" not in stage.flags:
        return None
    for folder in (saved_folder, find_init(cfg)):
        if folder and (folder / "vision.json").is_file():
            return matching_encoder(read_json(folder / "vision.json"), given.get("clip", ""), given.get("clip_weights", ""))
    return load_encoder(cfg.clip, cfg.clip_weights)


def find_init(cfg):
    """Folder of the checkpoint to start from, or None for random weights: of a first stage, or where there is no checkpoint but a --preset."""
    if cfg.init:
        return Path(cfg.init)
    stage = STAGES[cfg.stage]
    folders = [Path("out") / cfg.run / name for name in stage.starts_from]
    for folder in folders:
        if (folder / "model.safetensors").is_file():
            return folder
    if folders and not cfg.preset:
        raise FileNotFoundError(f"--stage {cfg.stage} starts from {' or '.join(map(str, folders))}, which is not there: "
                                f"python train.py --stage {stage.starts_from[-1]} --run {cfg.run}, or name a checkpoint with --init, or begin "
                                "with random weights of a --preset")
    return None


def datasets(cfg, folder, stage, encoder=None, machine=None):
    """-> (training rows, validation rows or None when the folder has none). With an encoder they bring the features of their pictures."""
    if folder.meta["kind"] != stage.kind:
        raise ValueError(f"{folder.path}: a data folder of {folder.meta['kind']}, --stage {cfg.stage} needs one made by python -m data_prep.{stage.kind}")
    if encoder and not len(folder.train.refs):
        raise ValueError(f"{folder.path}: no record of this data has a picture, and --stage {cfg.stage} learns to see; conversations alone are for --stage sft")
    made = [PackedTokens(split, folder.tokenizer, cfg.seq_len, cfg.batch_size, cfg.seed, stage.chat, 2 if stage.kind == "pairs" else 1, name,
                         Features(split, folder.path, name, encoder, machine, cfg.feature_budget * 1e9) if encoder else None)
            if len(split.tokens) > 1 else None for name, split in (("train", folder.train), ("val", folder.val))]
    train, val = made
    if train is None:
        raise ValueError("the data folder has no training documents")
    if not train.rows:
        raise ValueError(f"train: nothing to train on: {train.summary()}" + "; raise --seq-len" * any("longer" in reason for reason in train.left_out))
    if val and not val.rows:
        print(f"val: nothing to validate on: {val.summary()}")
    return train, val if val and val.rows else None
