"""What a run is going to do, before it does it: length, parameters, memory; and one batch, token by token, to look at.
In: a TrainConfig, a ModelConfig, the rows. Out: lines on the screen.
Next: nanomind/report.py
"""

import math
import sys

from nanomind.vision import projector_parameters, width


def total_steps(cfg, rows):
    """Steps that --steps, --tokens or --epochs ask for, over data of so many rows; None when only the clock ends the run."""
    per_step = cfg.batch_size * cfg.accumulate
    if cfg.steps:
        return cfg.steps
    if cfg.tokens:
        return max(1, math.ceil(cfg.tokens / (per_step * cfg.seq_len)))
    if cfg.epochs or not cfg.time_limit:
        return max(1, math.ceil((cfg.epochs or 1) * rows / per_step))
    return None


def show(cfg, name, model_config, available, rate, stage, model=None):
    """Print parameters, length and memory: the first lines of a run, and all of --dry-run. name: of the preset or checkpoint; available: tokens in the data (without a model: about);
    rate: measured operations a second of matrix products, or 0."""
    eyes = projector_parameters(cfg.projector, width(cfg.clip), model_config.hidden_size) if "clip" in stage.flags and not model else 0
    total = sum(p.numel() for p in model.parameters()) if model else model_config.parameters() + eyes
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad) if model else eyes if stage.trains else total
    print(f"model      {name}: {total / 1e6:.2f}M parameters ({total:,}), {trainable / 1e6:.3f}M trainable; {model_config.num_hidden_layers} "
          f"layers of {model_config.hidden_size}, vocabulary {model_config.vocab_size}")
    tokens = cfg.batch_size * cfg.accumulate * cfg.seq_len
    steps = total_steps(cfg, available / cfg.seq_len)
    length = [f"{steps:,} steps, {steps * tokens / 1e6:.1f}M tokens, {steps * tokens / available:.2f} epochs"] if steps else []
    length += [f"{cfg.time_limit:g} minutes"] if cfg.time_limit else []
    print(f"length     {' or '.join(length)}; {tokens:,} tokens a step ({cfg.accumulate} x {cfg.batch_size} rows of {cfg.seq_len}), "
          f"{'' if model else 'about '}{available / 1e6:.1f}M tokens in the data")
    if rate and steps:
        work = 6 * model_config.parameters() + 6 * model_config.num_hidden_layers * cfg.seq_len * model_config.num_attention_heads * model_config.head_dim
        print(f"time       about {clock(steps * tokens * work / (0.5 * rate))} (half of the measured {rate / 1e9:,.0f} GFLOP/s; the first steps say more)")
    print(f"memory     about {memory_estimate(cfg, model_config) / 2**20:,.0f} MB for weights, gradients, optimiser and activations")


def memory_estimate(cfg, m):
    """Bytes. Weights, gradients and optimiser in fp32; activations by what one token keeps in one layer for the backward pass."""
    moments = 1 if cfg.optimizer == "muon" else 2
    attention = (m.num_attention_heads + m.num_key_value_heads) * m.head_dim
    per_layer = 6 * m.hidden_size + 5 * attention + 4 * m.intermediate_size
    layers = 1 + m.hidden_size * m.num_hidden_layers / per_layer if cfg.checkpointing else m.num_hidden_layers
    head = 3 * min(cfg.batch_size * cfg.seq_len, 2048) * m.vocab_size
    return 4 * (m.parameters() * (2 + moments) + cfg.batch_size * cfg.seq_len * per_layer * layers + head)


def show_batch(batch, tokenizer):
    """Print the first row of a batch, a line a token: what is read, what is to be predicted, which document, whether it counts."""
    colours = ("\033[36m", "\033[33m", "\033[2m", "\033[0m") if sys.stdout.isatty() else ("",) * 4
    names = {number: text for text, number in tokenizer.special.items()}
    def text(number):
        return names.get(number) or repr(tokenizer.token_bytes[number].decode("utf-8", "backslashreplace"))[1:-1]
    print(f"{'place':>5} {'id':>6} {'document':>8} target  token -> label")
    for place, (token, label, document) in enumerate(zip(batch.tokens[0].tolist(), batch.labels[0].tolist(), batch.doc_ids[0].tolist())):
        is_target = label >= 0
        colour = colours[2] if not is_target else colours[document % 2]
        print(f"{colour}{place:>5} {token:>6} {document:>8} {'yes' if is_target else '-':>6}  {text(token)} -> {text(label) if is_target else '-'}{colours[3]}")


def clock(seconds):
    """h:mm:ss, or m:ss."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
