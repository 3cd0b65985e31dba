"""The knobs: what a model is made of (ModelConfig) and how a run is done (TrainConfig).
In: a preset name, a config.json, command-line flags. Out: two frozen dataclasses; a field is a flag, a default and a help line.
Next: nanomind/records.py
"""

import argparse
import json
import math
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

from nanomind.cli import Parser


@dataclass(frozen=True)
class ModelConfig:
    """The shape of the decoder, under Hugging Face's names (a Llama; with `qk_norm` a Qwen3)."""
    vocab_size: int = 6400
    hidden_size: int = 512
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    intermediate_size: int = 1408
    head_dim: int = 64
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    qk_norm: bool = False

    def __post_init__(self):
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                     "intermediate_size", "head_dim", "max_position_embeddings"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"model config: {name} is {value!r}, expected a whole number of at least 1")
        for name in ("rope_theta", "rms_norm_eps"):
            if not isinstance(getattr(self, name), (int, float)) or not getattr(self, name) > 0:
                raise ValueError(f"model config: {name} is {getattr(self, name)!r}, expected a number above 0")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"model config: {self.num_attention_heads} query heads cannot share "
                             f"{self.num_key_value_heads} key/value heads evenly")
        if self.head_dim % 2:
            raise ValueError(f"model config: head_dim is {self.head_dim}, rotary positions need an even one")

    def parameters(self):
        """Number of parameters of the decoder (a tied head counts once)."""
        C, D, H, K, F = self.hidden_size, self.head_dim, self.num_attention_heads, self.num_key_value_heads, self.intermediate_size
        layer = C * D * (2 * H + 2 * K) + 3 * C * F + 2 * C + 2 * D * self.qk_norm
        return self.vocab_size * C * (1 if self.tie_word_embeddings else 2) + self.num_hidden_layers * layer + C

    def to_hf(self, eos_token_id=0):
        """The config.json that transformers, llama.cpp and vLLM read: LlamaForCausalLM, or Qwen3ForCausalLM with QK-norm."""
        values = asdict(self)
        qk_norm = values.pop("qk_norm")
        return {"architectures": ["Qwen3ForCausalLM" if qk_norm else "LlamaForCausalLM"],
                "model_type": "qwen3" if qk_norm else "llama", **values, "hidden_act": "silu", "attention_bias": False,
                "mlp_bias": False, "attention_dropout": 0.0, "use_cache": True, "torch_dtype": "float32",
                "bos_token_id": 0, "eos_token_id": eos_token_id}

    @classmethod
    def from_hf(cls, values, where="config.json"):
        """Read a config.json of a Llama or Qwen3; anything this decoder does not compute is refused by name."""
        kind = values.get("model_type")
        if kind not in ("llama", "qwen3"):
            raise ValueError(f'{where}: model_type is {kind!r}, expected "llama" or "qwen3"')
        rope = values.get("rope_parameters") or values.get("rope_scaling") or {}  # transformers 5 writes the first, 4 the second
        rope = rope if isinstance(rope, dict) else {"rope_type": rope}
        unsupported = {name: value for name, value, plain in (
            ("hidden_act", values.get("hidden_act", "silu"), "silu"),
            ("attention_bias", values.get("attention_bias", False), False),
            ("mlp_bias", values.get("mlp_bias", False), False),
            ("use_sliding_window", values.get("use_sliding_window", False), False),
            ("rope type", rope.get("rope_type", rope.get("type", "default")), "default")) if value not in (plain, None)}
        if unsupported:
            raise ValueError(f"{where}: not supported here: " + ", ".join(f"{k} = {v!r}" for k, v in unsupported.items()))
        defaults = {"num_key_value_heads": values.get("num_attention_heads"), "rope_theta": rope.get("rope_theta", 10000.0),
                    "tie_word_embeddings": False, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048}
        found = {f.name: values.get(f.name, defaults.get(f.name)) for f in fields(cls) if f.name != "qk_norm"}
        if found["head_dim"] is None and kind == "qwen3":
            found["head_dim"] = 128  # Qwen3's own default, whatever the hidden size
        elif found["head_dim"] is None and found["hidden_size"] and found["num_attention_heads"]:
            found["head_dim"] = found["hidden_size"] // found["num_attention_heads"]
        missing = [name for name, value in found.items() if value is None]
        if missing:
            raise ValueError(f"{where}: missing {', '.join(missing)}")
        return cls(**found, qk_norm=kind == "qwen3")


FEW_MINUTES = {"seq_len": 256, "batch_size": 8, "lr": 0.02, "adam_lr": 0.008}  # short rows, high rates: docs/recipe.md, "One change at a time"
PRESETS = {  # name: (model, run defaults that go with the size)
    "pico": (ModelConfig(hidden_size=96, num_hidden_layers=3, num_attention_heads=3, num_key_value_heads=1, head_dim=32, intermediate_size=256,
                         qk_norm=True), FEW_MINUTES),  # 0.91M: a student for demo and nano
    "demo": (ModelConfig(hidden_size=192, num_hidden_layers=4, num_attention_heads=3, num_key_value_heads=1, intermediate_size=512,
                         qk_norm=True), FEW_MINUTES),  # 2.80M, 2.44M with the built-in world's vocabulary of 4,480
    "nano": (ModelConfig(hidden_size=192, num_hidden_layers=6, num_attention_heads=3, num_key_value_heads=1, intermediate_size=512,
                         qk_norm=True), FEW_MINUTES),  # 3.59M
    "small": (ModelConfig(), {"clip": "ViT-B-16"}),  # 25.83M
    "base": (ModelConfig(hidden_size=768, num_hidden_layers=16, intermediate_size=2048, head_dim=96), {"clip": "ViT-B-16"}),  # 104.03M
}


def load_preset(name):
    """A preset's name, or the path of a config.json, -> (ModelConfig, dict of run defaults)."""
    if name in PRESETS:
        return PRESETS[name]
    path = Path(name)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"--preset {name}: expected {', '.join(PRESETS)} or the path of a config.json")
    return ModelConfig.from_hf(read_json(path), str(path)), {}


def read_json(path):
    """The object in a JSON file, or a ValueError that names the file and the line."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as problem:
        raise ValueError(f"{path}:{problem.lineno}: broken JSON: {problem.msg}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: is not UTF-8 text, expected JSON") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


def knob(default, text, choices=None):
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class TrainConfig:
    """Every knob of a run. Defaults here < defaults of the preset < defaults of the stage < flags."""
    # what
    stage: str = knob("pretrain", "which row of the table in nanomind/stages.py to run; vlm: both its phases; all: every one, measured after each")
    phase: str = knob("both", "of a stage that has two: 1, 2 or both", ("1", "2", "both"))
    run: str = knob("demo", "name of the run: results go to out/RUN/STAGE/")
    preset: str = knob("", "model size: pico, demo, nano, small, base, or the path of a config.json of your own (default: nano, on the built-in world demo, or that of the checkpoint)")
    data: str = knob("", "a data folder, or raw files and folders separated by commas; default: the built-in corpus")
    val: str = knob("", "raw files to validate on (with raw --data); default: 1 %% of the documents")
    tokenizer: str = knob("", "tokenizer folder for raw --data; default: one is trained on that data")
    vocab_size: int = knob(6400, "size of a tokenizer trained on the way")
    init: str = knob("", "checkpoint folder to start from; default: what the stage starts from in the same run")
    resume: bool = knob(False, "go on from the last save of this run and stage; starts afresh when there is none")
    overwrite: bool = knob(False, "replace a finished run of the same name")
    # how long: the first that is reached ends the run
    time_limit: float = knob(0.0, "minutes, with the last evaluation and save inside them; the schedule follows the clock")
    minutes: float = knob(0.0, "of several stages together (all, vlm): each gets its share")
    steps: int = knob(0, "optimiser steps")
    tokens: float = knob(0.0, "tokens to train on, 5e6 works")
    epochs: float = knob(0.0, "passes over the data; 1 when no length is given (on the built-in world: some minutes)")
    # batch
    seq_len: int = knob(512, "tokens in a row; pico, demo and nano in pretraining, and the built-in world: 256, dpo: 1024")
    batch_size: int = knob(8, "rows in a forward pass")
    accumulate: int = knob(1, "forward passes in an optimiser step; 1 x 8 equals 8 x 1 exactly")
    # optimiser
    optimizer: str = knob("muon", "muon (matrices by Muon, the rest by AdamW) or adamw", ("muon", "adamw"))
    lr: float = knob(0.01, "peak learning rate of the matrices (muon) or of everything (adamw: by default 0.003); pico, demo and nano in pretraining: 0.02, other stages and the built-in world have their own")
    adam_lr: float = knob(0.004, "with muon: peak learning rate of embeddings and norms; pico, demo and nano in pretraining: 0.008, other stages and the built-in world have their own")
    weight_decay: float = knob(0.1, "on matrices only, decoupled")
    beta1: float = knob(0.9, "AdamW's first-moment decay")
    beta2: float = knob(0.95, "AdamW's second-moment decay")
    momentum: float = knob(0.95, "Muon's momentum")
    warmup: float = knob(0.03, "share of the run spent raising the learning rate from 0")
    decay: float = knob(1.0, "share of the run, at its end, spent lowering it to 0 in a straight line")
    grad_clip: float = knob(1.0, "largest norm of the gradient")
    # distillation
    teacher: str = knob("", "checkpoint folder of the teacher; default: the run's sft")
    alpha: float = knob(0.1, "weight of the cross-entropy with the data; the rest goes to the teacher's distribution")
    distill_temperature: float = knob(1.0, "temperature of both distributions in the divergence")
    # preferences
    beta: float = knob(0.1, "strength of the tie to the reference model")
    label_smoothing: float = knob(0.0, "share of pairs believed to be labelled the wrong way round (conservative DPO)")
    dpo_loss: str = knob("sigmoid", "sigmoid (DPO) or ipo", ("sigmoid", "ipo"))
    # pictures
    clip: str = knob("demo", "the frozen encoder: demo (comes with nanomind, knows its drawn scenes), a folder with an open_clip config and "
                             "safetensors, or a model name of open_clip such as ViT-B-16")
    clip_weights: str = knob("openai", "weights of a --clip that is a name: an open_clip tag, a local file, or none (random, to try things out)")
    projector: str = knob("linear", "from features to embeddings: linear, or mlp", ("linear", "mlp"))
    projector_lr: float = knob(0.003, "peak learning rate of the projector")
    feature_budget: float = knob(4.0, "GB: pictures whose features fit are encoded once and kept in the data folder, else in every batch")
    # machine
    device: str = knob("auto", "auto, cpu, cuda, cuda:1, mps")
    precision: str = knob("auto", "auto, fp32 or bf16 (autocast; weights stay fp32)", ("auto", "fp32", "bf16"))
    threads: int = knob(0, "CPU threads; 0: all cores this process may use")
    compile: bool = knob(False, "torch.compile the model: slow first step, faster later ones")
    shard: bool = knob(False, "under torchrun: each process keeps its part of the weights, gradients and optimiser (FSDP2) instead of all of them")
    checkpointing: bool = knob(False, "gradient checkpointing: recompute activations in the backward pass to save memory")
    seed: int = knob(0, "fixes initial weights, order of the data and samples")
    # what is seen on the way
    eval_every: int = knob(0, "steps between two validations; 0: ten in a run")
    eval_tokens: float = knob(16384.0, "tokens in a validation; the one at the end uses four times as many")
    save_every: int = knob(0, "steps between two saves; 0: with every validation")
    dry_run: bool = knob(False, "print the plan and stop")
    show_batch: bool = knob(False, "print a table of tokens, labels, documents and mask of the first row and stop")


def parse_flags(kind, argv, description):
    """Command line -> dict of the flags that were given, by field name. Unknown flags are refused, all at once."""
    parser = Parser(description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(kind):
        flag, text = "--" + f.name.replace("_", "-"), f.metadata["help"]
        if f.type is bool or f.type == "bool":
            parser.add_argument(flag, dest=f.name, action="store_true", default=argparse.SUPPRESS, help=text)
        else:
            shown = f" (default: {f.default:g})" if f.type in (float, "float") and f.default else f" (default: {f.default})" if f.default else ""
            parser.add_argument(flag, dest=f.name, type=type(f.default), default=argparse.SUPPRESS, choices=f.metadata["choices"],
                                metavar=f.name.upper(), help=text + shown)
    return vars(parser.parse_args(argv))


KEPT_ON_RESUME = ("resume", "time_limit", "steps", "tokens", "epochs", "threads", "eval_every", "save_every", "dry_run", "show_batch", "shard",
                  "clip", "clip_weights")  # of the last two only the place: the encoder itself must be the same


def check_unchanged(given, was, folder):
    """Refuse flags, all at once, that would change what a run with the settings `was` has already done."""
    changed = [f"--{name.replace('_', '-')} {value} (the run has {was[name]})" for name, value in given.items()
               if name not in KEPT_ON_RESUME and value != was[name]]
    if changed:
        raise ValueError(f"{folder}: cannot be resumed with another {', '.join(changed)}")


def settle(given, stage_defaults=None):
    """Flags that were given -> (TrainConfig, ModelConfig); all conflicts are listed at once."""
    base = TrainConfig(**{**(stage_defaults or {}), **given})
    model, preset_defaults = load_preset(base.preset or "nano")
    cfg = replace(base, **{**preset_defaults, **(stage_defaults or {}), **given})
    if cfg.optimizer == "adamw" and "lr" not in {**(stage_defaults or {}), **given}:
        cfg = replace(cfg, lr=0.003)  # what is right for Muon is too high here
    problems = [f"--{name.replace('_', '-')} {getattr(cfg, name)}: expected {what}" for name, what, fine in (
        ("steps", "0 or more", cfg.steps >= 0), ("tokens", "0 or more", cfg.tokens >= 0), ("epochs", "0 or more", cfg.epochs >= 0),
        ("time_limit", "0 or more minutes", cfg.time_limit >= 0), ("seq_len", "at least 2", cfg.seq_len >= 2),
        ("batch_size", "at least 1", cfg.batch_size >= 1), ("accumulate", "at least 1", cfg.accumulate >= 1),
        ("lr", "more than 0", cfg.lr > 0), ("adam_lr", "more than 0", cfg.adam_lr > 0), ("grad_clip", "more than 0", cfg.grad_clip > 0),
        ("weight_decay", "0 or more", cfg.weight_decay >= 0), ("warmup", "a share between 0 and 1", 0 <= cfg.warmup <= 1),
        ("decay", "a share between 0 and 1", 0 <= cfg.decay <= 1), ("threads", "0 or more", cfg.threads >= 0),
        ("projector_lr", "more than 0", cfg.projector_lr > 0), ("feature_budget", "0 or more", cfg.feature_budget >= 0),
        ("alpha", "a share between 0 and 1", 0 <= cfg.alpha <= 1), ("distill_temperature", "more than 0", cfg.distill_temperature > 0),
        ("beta", "more than 0", cfg.beta > 0), ("label_smoothing", "at least 0 and below 0.5", 0 <= cfg.label_smoothing < 0.5),
        ("seed", "a whole number from 0", 0 <= cfg.seed < 2**63), ("eval_every", "0 or more", cfg.eval_every >= 0),
        ("save_every", "0 or more", cfg.save_every >= 0), ("eval_tokens", "0 or more", cfg.eval_tokens >= 0),
        ("vocab_size", "at least 260", cfg.vocab_size >= 260),
        ("run", "a plain name", cfg.run not in ("", ".", "..") and not set(cfg.run) & set('/\\:*?"<>|'))) if not fine]
    problems += [f"--{f.name.replace('_', '-')} {getattr(cfg, f.name)}: expected a finite number" for f in fields(cfg)
                 if isinstance(getattr(cfg, f.name), float) and not math.isfinite(getattr(cfg, f.name))]
    if sum(bool(x) for x in (cfg.steps, cfg.tokens, cfg.epochs)) > 1:
        problems.append("--steps, --tokens and --epochs exclude each other: give one (a --time-limit may stand beside it)")
    if cfg.resume and cfg.overwrite:
        problems.append("--resume and --overwrite exclude each other: go on, or begin again")
    if cfg.resume and cfg.init:
        problems.append("--resume and --init exclude each other: a resumed run has its weights already")
    if cfg.shard and cfg.compile:
        problems.append("--shard and --compile exclude each other: the compiler does not see through the gathering of weights")
    if cfg.seq_len > model.max_position_embeddings:
        problems.append(f"--seq-len {cfg.seq_len}: the {cfg.preset or 'nano'} model is made for at most {model.max_position_embeddings} tokens")
    if cfg.warmup + cfg.decay > 1 and cfg.decay < 1:
        problems.append(f"--warmup {cfg.warmup} and --decay {cfg.decay} together exceed the run")
    if cfg.dpo_loss == "ipo" and cfg.label_smoothing:
        problems.append(f"--label-smoothing {cfg.label_smoothing} goes with --dpo-loss sigmoid: ipo has nothing to smooth")
    if problems:
        raise ValueError("; ".join(problems))
    return cfg, model
