"""Writing text: read the prompt once (prefill), then one token at a time from the cache (decode).
In: a model, prompts as ids, how to choose. Out: the new ids, step by step, for one prompt or many at once.
Next: nanomind/judge.py
"""

from dataclasses import dataclass

import torch

from nanomind.device import choose_device
from nanomind.fast import Step, to_int8
from nanomind.model import KVCache

MANY = 64  # rows that it pays to measure products for
PREFILL = 512  # tokens of a prompt read in one go: bounds the memory of long prompts


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. temperature 0 is greedy; top_k 0, top_p 1, min_p 0, repetition_penalty 1 switch a rule off."""
    temperature: float = 0.7
    top_k: int = 50
    top_p: float = 0.95
    min_p: float = 0.0
    repetition_penalty: float = 1.1
    seed: int = 0

    def __post_init__(self):
        problems = [f"{name} {getattr(self, name)}: expected {what}" for name, what, fine in (
            ("temperature", "0 or more", self.temperature >= 0), ("top_k", "0 (off) or more", self.top_k >= 0),
            ("top_p", "between 0 and 1", 0 <= self.top_p <= 1), ("min_p", "between 0 and 1", 0 <= self.min_p <= 1),
            ("repetition_penalty", "more than 0", self.repetition_penalty > 0)) if not fine]
        if problems:
            raise ValueError("; ".join(problems))


def candidates(logits, seen, sampling):
    """Apply the penalty, the temperature and the cuts. logits: (B, V) fp32, seen: (B, V) bool -> logits, -inf where cut, and ids of the n tokens
    that are left at most, (B, n) each, likeliest first."""
    if sampling.repetition_penalty != 1.0:
        # CTRL's rule (arXiv:1909.05858): divide what is positive and multiply what is negative, else a seen token would become likelier
        punished = torch.where(logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty)
        logits = torch.where(seen, punished, logits)
    if sampling.temperature == 0:
        return logits.max(dim=-1, keepdim=True)
    some = 0 < sampling.top_k < logits.size(-1)
    logits, ids = logits.topk(sampling.top_k) if some else logits.sort(descending=True)  # first: what is cut need not be looked at again
    logits = logits / sampling.temperature
    p = logits.softmax(dim=-1)
    cut = (p.cumsum(dim=-1) - p >= sampling.top_p) & (sampling.top_p < 1.0) | (p < sampling.min_p * p[:, :1])
    cut[:, 0] = False  # the likeliest token is never cut, not even at top_p 0
    return logits.masked_fill(cut, float("-inf")), ids


def choose(logits, seen, sampling, generators):
    """Next ids, (B,). Each row draws from a generator of its own, so a row's text does not depend on its neighbours."""
    V, (logits, ids) = logits.size(-1), candidates(logits, seen, sampling)
    if sampling.temperature == 0:
        return ids[:, 0]
    # the Gumbel-max trick: argmax of log p + Gumbel noise is a draw from p. The noise belongs to ids, not to places: two that are all but equally
    # likely may change places by rounding
    noise = torch.stack([torch.empty(V).exponential_(generator=g) for g in generators]).to(ids.device).gather(1, ids).log().neg()
    return ids.gather(1, (logits + noise).argmax(dim=-1, keepdim=True))[:, 0]


def prepare(model, device="auto", precision="auto", threads=0, int8=False, rows=1):
    """Put a model where and how it writes fastest, `rows` texts at a time. -> a line that says so. Reading the weights is what one token costs, so half as
    many bytes pay on every machine whose products accept bf16, even where they do not multiply it faster, and int8 halves them again; a tiny model's are
    read in no time: it stays in fp32, or for many rows in what this machine multiplies faster."""
    machine = choose_device(device, "fp32" if precision == "auto" and rows < MANY else precision, threads)
    small = model.config.parameters() < 30e6 and machine.device.type == "cpu" and not int8
    dtype = machine.dtype if small else torch.float32 if precision == "fp32" or precision == "auto" and machine.device.type == "mps" else torch.bfloat16
    if int8:
        to_int8(model)
    model.to(machine.device, dtype).eval()
    model.step = Step(model)
    return f"{machine.device}, {torch.get_num_threads()} threads, {str(dtype).removeprefix('torch.')}{' with int8 weights' * int8}"


def prefill(model, tokens, doc_ids, cache, embeddings=None):
    """Read (B, T) prompt tokens (or their embeddings, when there are pictures among them) into the cache, PREFILL at a time. -> logits after the
    last, (B, V)."""
    for start in range(0, tokens.size(1), PREFILL):
        part = slice(start, start + PREFILL)
        hidden = model(tokens[:, part], None if doc_ids is None else doc_ids[:, part], cache, None if embeddings is None else embeddings[:, part])
    return model.logits(hidden[:, -1])


def decode(model, ids, cache):
    """One step: the ids just chosen, (B,), -> logits of the next, (B, V)."""
    return model.step(ids, cache) if model.step is not None else model.logits(model(ids[:, None], None, cache)[:, -1])


@torch.inference_mode()
def generate(model, prompts, max_new_tokens, stop=(), sampling=Sampling(), features=None):
    """Continue `prompts`, lists of ids of any lengths, by at most `max_new_tokens` new ids each.

    Yields after every step a list with each row's new id, or None for a row that has ended (by an id of `stop`, which is not yielded).
    features: for a VisionLanguageModel the pictures of each prompt, (m, P, E) or None. Shorter prompts are padded on the left with tokens of document -1, which the mask keeps apart from the text: batching changes nothing.
    """
    if not all(prompts):
        raise ValueError("a prompt without any token: give at least one")
    slots = None
    if features is not None and any(own is not None for own in features):
        prompts, slots = model.places(prompts, features)
    longest, B, device = max(map(len, prompts)), len(prompts), model.lm_head.weight.device
    room = model.config.max_position_embeddings - longest
    if room < 1:
        raise ValueError(f"the prompt has {longest} tokens, the model sees {model.config.max_position_embeddings}: shorten the prompt")
    max_new_tokens = min(max_new_tokens, room)
    tokens = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)
    doc_ids = None
    if any(len(p) < longest for p in prompts):
        doc_ids = torch.tensor([[-1] * (longest - len(p)) + [0] * len(p) for p in prompts], device=device)
    embeddings = None
    if slots is not None:
        slots = torch.tensor([[-1] * (longest - len(row)) + row for row in slots], device=device)
        embeddings = model.see(tokens, torch.cat([own for own in features if own is not None]).to(device), slots)
    seen = torch.zeros(B, model.config.vocab_size, dtype=torch.bool, device=device)
    if sampling.repetition_penalty != 1.0:
        for row, prompt in enumerate(prompts):
            seen[row, torch.tensor(prompt, device=device)] = True
    generators = [torch.Generator().manual_seed(sampling.seed) for _ in prompts]
    cache = KVCache(model.config, B, longest + max_new_tokens, model.model.embed_tokens.weight.dtype, device)
    running, rows = [True] * B, list(range(B))  # rows: which are still computed
    logits = prefill(model, tokens, doc_ids, cache, embeddings)
    for step in range(max_new_tokens):
        ids = choose(logits, seen, sampling, generators)
        if sampling.repetition_penalty != 1.0:
            seen.scatter_(1, ids[:, None], True)
        new = dict(zip(rows, ids.tolist()))
        running = [alive and new[row] not in stop for row, alive in enumerate(running)]
        if not any(running):
            return
        yield [new[row] if alive else None for row, alive in enumerate(running)]
        if step + 1 < max_new_tokens:
            if sum(running) <= len(rows) / 2:  # the others have ended: go on without them
                places = [place for place, row in enumerate(rows) if running[row]]
                rows, ids, seen, generators = [rows[i] for i in places], ids[places], seen[places], [generators[i] for i in places]
                cache.keep(places)
            logits = decode(model, ids, cache)


def complete(model, tokenizer, prompt, max_new_tokens, sampling=Sampling(), stop=(), features=None):
    """The text of one continuation. prompt: ids; features of its pictures: (m, P, E)."""
    ids = [step[0] for step in generate(model, [prompt], max_new_tokens, stop, sampling, [features])]
    return tokenizer.decode(ids, specials=False)
