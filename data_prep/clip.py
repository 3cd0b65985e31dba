"""Trains a compact image-text CLIP, the eyes of a small model: python -m data_prep.clip --data FILES --out DIR (--data demo: drawn scenes).
In: pictures with captions. Out: DIR with open_clip_config.json and open_clip_model.safetensors, which open_clip loads as local-dir:DIR, the
captions' tokenizer, log.jsonl, and card.json: how it was made, how well it finds the caption of a new picture, what can be read from its patches.
Next: nanomind/fast.py

The contrastive loss (InfoNCE, arXiv:2103.00020) is taken on the average of a random quarter of the patches, not of all: so every patch
learns to know about the whole picture, and a language model need not find the one that does. Used as ever, it is an open_clip model.
"""

import hashlib
import json
import shlex
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

from nanomind.cli import Parser, keep_memory, run

DATA_NAMES = "pictures as .jsonl or .json records with image and caption, text or conversations; or demo: drawn scenes without end"
SAVE_EVERY = 100  # steps
SIGNATURE = 500  # pictures of the data that its hash is made of


def parse_flags():
    parser = Parser(prog="python -m data_prep.clip", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--data", nargs="+", required=True, metavar="FILE", help=DATA_NAMES)
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to make")
    parser.add_argument("--val", nargs="+", default=[], metavar="FILE", help="records to report on; without them 5 %% of the pictures are kept out")
    parser.add_argument("--config", metavar="FILE", help="an open_clip model config (JSON) instead of the built-in one of 1.5M parameters")
    parser.add_argument("--steps", type=int, default=6000, help="optimiser steps (default: 6000)")
    parser.add_argument("--minutes", type=float, default=0, help="end earlier, by the clock; the learning rate follows")
    parser.add_argument("--batch-size", type=int, default=128, help="pictures in a step, told apart from one another (default: 128)")
    parser.add_argument("--lr", type=float, default=0.015, help="peak learning rate of the layers' matrices, by Muon (default: 0.015)")
    parser.add_argument("--adam-lr", type=float, default=0.003, help="of everything else, by AdamW (default: 0.003)")
    parser.add_argument("--groups", type=int, default=1, help="with --data demo: 2 shows two groups of things in every other batch (default: 1)")
    parser.add_argument("--vocab-size", type=int, default=512, help="of the captions' own tokenizer (default: 512)")
    parser.add_argument("--seed", type=int, default=0, help="fixes weights, pictures and order (default: 0)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: all cores (default: 0)")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto",
                        help="auto: what is measured to be faster; a resumed run keeps its own (default: auto)")
    parser.add_argument("--resume", action="store_true", help="go on from the last save in DIR; starts afresh when there is none")
    return parser.parse_args()


if __name__ == "__main__":  # before torch is imported, which takes seconds
    FLAGS = parse_flags()
    keep_memory(["-m", "data_prep.clip"])

import numpy as np
import torch
import torch.nn.functional as F

import bpe
from data_prep.captions import Folder, Scenes
from nanomind.checkpoint import Log, read_tensors, write_tensors
from nanomind.config import read_json
from nanomind.device import choose_device
from nanomind.optim import Optimizer, schedule
from nanomind.tokenizer import Tokenizer, write_whole

CONFIG = {  # an open_clip architecture: 9 patches of 32 pixels, 1.5M parameters
    "embed_dim": 128,
    "vision_cfg": {"image_size": 96, "patch_size": 32, "width": 128, "layers": 4, "head_width": 32, "pool_type": "avg", "final_ln_after_pool": True},
    "text_cfg": {"width": 96, "heads": 3, "layers": 2, "pool_type": "eos", "eos_id": 0},
}
MEAN, STD = 0.5, 0.25
PREPROCESS = {"mean": [MEAN] * 3, "std": [STD] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
PART = 0.25  # of the patches that a training step looks at


# ---- the model and its loss

def pixels(pictures, device):
    """(B, S, S, 3) uint8 -> (B, 3, S, S) normalised."""
    return (torch.tensor(pictures, device=device).permute(0, 3, 1, 2).float() / 255 - MEAN) / STD


def text_ids(tokenizer, texts, length):
    """Captions -> (n, length) ids; <|endoftext|> ends each and fills the rest."""
    ids = torch.full((len(texts), length), tokenizer.end_of_text)
    for row, text in zip(ids, texts):
        found = tokenizer.encode(text)[:length - 1]
        row[:len(found)] = torch.tensor(found)
    return ids


def patches(model, x, layer=-1):
    """(B, 3, S, S) -> (B, P, E): the patch tokens behind a layer, without class token and before the last norm."""
    return model.visual.forward_intermediates(x, output_fmt="NLC", intermediates_only=True)["image_intermediates"][layer]


def glance(model, x, generator):
    """What training takes for the picture: (B, embed_dim), from the average of a random PART of its patches, one at least."""
    tokens = patches(model, x)
    kept = torch.rand(tokens.shape[:2], generator=generator)
    kept = ((kept < PART) | (kept == kept.amin(1, keepdim=True))).to(tokens.device, torch.float32)
    average = (tokens.float() * (kept / kept.sum(1, keepdim=True))[..., None]).sum(1)
    return F.normalize((model.visual.ln_post(average) @ model.visual.proj).float(), dim=-1)


def contrastive(images, texts, which, scale):
    """InfoNCE, both ways. images: (B, D); texts: (U, D), the different captions of the batch; which: (B), the caption of each picture."""
    logits = scale * images @ texts.T  # (B, U)
    return (F.cross_entropy(logits, which) - logits.log_softmax(0).gather(1, which[:, None]).mean()) / 2


def loss_of(model, tokenizer, batch, generator, device, length):
    """The summed losses of one batch, one per kind of caption, and the first alone."""
    pictures, captions = batch
    different = [sorted(set(texts)) for texts in captions]
    images = glance(model, pixels(pictures, device), generator)
    texts = model.encode_text(text_ids(tokenizer, sum(different, []), length).to(device), normalize=True).float()
    losses = []
    for own, known, texts in zip(captions, different, texts.split([len(known) for known in different])):
        number = {text: i for i, text in enumerate(known)}
        losses.append(contrastive(images, texts, torch.tensor([number[text] for text in own], device=device), model.logit_scale.exp()))
    return sum(losses), losses[0]


# ---- what it has learnt

def ridge(features, targets, new, strength=1e-3):
    """Linear regression of one-hot targets (n, k) on features (n, E), in closed form -> the largest of its outputs for `new` (m, E)."""
    mean, std = features.mean(0), features.std(0) + 1e-6
    a, b = (torch.cat([(x - mean) / std, torch.ones(len(x), 1)], dim=1).double() for x in (features, new))
    weights = torch.linalg.solve(a.T @ a + strength * len(a) * torch.eye(a.size(1)).double(), a.T @ targets.double())
    return (b @ weights).argmax(1)


def probe(model, source, machine, layer, known=3000, new=1000):
    """{attribute: (% right from the mean of the patches, % right from one patch taken at random)} of new pictures, by a linear probe."""
    (train, _, given), (test, _, wanted) = source.examples(known), source.examples(new, held_out=True)
    if not given[0] or not wanted[0]:
        return {}
    a, b = (torch.cat([watch(model, part, machine, layer) for part in np.array_split(x, -(-len(x) // 250))]) for x in (train, test))  # (n, P, E)
    draw, found = np.random.default_rng(0), {}
    places = torch.from_numpy(draw.integers(0, a.size(1), (len(a), 3)))
    place = torch.from_numpy(draw.integers(0, a.size(1), len(b)))
    for name in given[0]:
        values = sorted({one[name] for one in given + wanted})
        y, z = (torch.tensor([values.index(one[name]) for one in ones]) for ones in (given, wanted))
        y = F.one_hot(y, len(values)).float()
        whole = ridge(a.mean(1), y, b.mean(1))
        single = ridge(a[torch.arange(len(a))[:, None], places].flatten(0, 1), y.repeat_interleave(3, 0), b[torch.arange(len(b)), place])
        found[name] = [round(100 * (x == z).float().mean().item(), 1) for x in (whole, single)]
    return found


@torch.no_grad()
def watch(model, pictures, machine, layer):
    with machine.autocast():
        return patches(model, pixels(pictures, machine.device), layer).float().cpu()


@torch.no_grad()
def retrieval(model, tokenizer, source, machine, count=300):
    """R@1 in %: how often the nearest of `count` held-out captions says what the picture's own says; and by chance."""
    pictures, captions, attributes = source.examples(count, held_out=True)
    length = model.context_length
    with machine.autocast():
        images = model.encode_image(pixels(pictures, machine.device), normalize=True).float()
        texts = model.encode_text(text_ids(tokenizer, captions, length).to(machine.device), normalize=True).float()
    meant = [tuple(a.items()) if a else c for a, c in zip(attributes, captions)]
    found = (images @ texts.T).argmax(1).tolist()
    chance = sum(n * n for n in Counter(meant).values()) / len(meant)**2
    right = sum(meant[i] == meant[j] for i, j in enumerate(found)) / len(meant)
    return {"R@1": round(100 * right, 1), "chance": round(100 * chance, 1), "of": len(meant)}


@torch.no_grad()
def level(model, source, machine):
    """Bring the patch features to size 1, which is what a projector expects, and change nothing of what they say: every reader of a pre-norm
    transformer's residual stream norms it first, so all that writes to it may be divided by one number."""
    size = watch(model, source.examples(250)[0], machine, -1).std().item()
    for name, p in model.visual.named_parameters():
        if name.startswith("ln_pre.") or ".attn.out_proj." in name or ".mlp.c_proj." in name:
            p.div_(size)


# ---- the run

def learn_tokenizer(source, vocab_size):
    """A byte-level BPE of the captions themselves, and the ids of the longest."""
    texts = {text for step in range(40) for kind in source.batch(step, 128)[1] for text in kind}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "captions.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in sorted(texts)), encoding="utf-8")
        tokenizer = bpe.train([path], vocab_size)
    return tokenizer, max(len(tokenizer.encode(text)) for text in texts)


def signature(source):
    """Hash of the first pictures of the data and their captions."""
    pictures, captions = source.batch(0, SIGNATURE)
    return hashlib.sha256(pictures.tobytes() + "\n".join(sum(captions, [])).encode()).hexdigest()


def build(config, seed):
    """A random CLIP. Its places start as loud as what is seen in them (open_clip: a tenth of that), for else left and right are learnt late or never."""
    from open_clip.model import CLIP
    torch.manual_seed(seed)
    try:
        model = CLIP(config["embed_dim"], dict(config["vision_cfg"]), dict(config["text_cfg"]), output_dict=True)
    except (TypeError, KeyError, AssertionError, RuntimeError) as problem:
        raise ValueError(f"--config: open_clip cannot build this ({type(problem).__name__}: {problem})") from None
    torch.nn.init.normal_(model.visual.positional_embedding)
    return model


def main(flags):
    out, state_file, begun = Path(flags.out), Path(flags.out) / "state.safetensors", time.monotonic()
    if min(flags.steps, flags.batch_size - 1) < 1 or flags.minutes < 0 or flags.groups not in (1, 2):
        raise ValueError(f"--steps {flags.steps} --batch-size {flags.batch_size} --minutes {flags.minutes:g} --groups {flags.groups}: "
                         "expected at least 1 step, 2 pictures, 0 or more minutes, 1 or 2 groups")
    config = read_json(flags.config) if flags.config else CONFIG
    eyes = config.get("vision_cfg", {})
    if eyes.get("pool_type") != "avg" or not eyes.get("final_ln_after_pool") or not isinstance(eyes.get("image_size"), int):
        raise ValueError(f'{flags.config}: vision_cfg needs "image_size", "pool_type": "avg" and "final_ln_after_pool": true')
    saved = read_tensors(state_file) if flags.resume and state_file.is_file() else None
    if not saved and (out / "open_clip_model.safetensors").is_file():
        raise ValueError(f"{out}: holds a CLIP already; choose another --out" + " (it cannot be resumed: its state is gone)" * flags.resume)
    progress = json.loads(saved[1]["progress"]) if saved else {"step": 0, "seconds": 0.0}
    machine = choose_device("auto", progress.get("precision", flags.precision), flags.threads)
    print(f"machine    {machine.reasons}")
    demo, size = flags.data == ["demo"], eyes["image_size"]
    source = Scenes(flags.seed, size, flags.groups) if demo else Folder(flags.data, flags.val, flags.seed, size)
    identity = {"data": signature(source), **{name: getattr(flags, name) for name in ("seed", "batch_size", "lr", "adam_lr", "steps", "minutes")}}
    if saved:
        if progress["identity"] != identity:
            raise ValueError(f"{out}: cannot be resumed with other data or flags; it has {json.dumps(progress['identity'])}")
        tokenizer, config = Tokenizer.load(out), read_json(out / "open_clip_config.json")["model_cfg"]
    else:
        progress |= {"identity": identity, "precision": "bf16" if machine.dtype == torch.bfloat16 else "fp32"}
        tokenizer, longest = learn_tokenizer(source, flags.vocab_size)
        text = {"context_length": min(longest + 1, 77), **config.get("text_cfg", {}), "vocab_size": tokenizer.vocab_size}
        config = {**config, "text_cfg": text}
        tokenizer.save(out)
    model = build(config, flags.seed).to(machine.device)
    sizes = [sum(p.numel() for p in part.parameters()) for part in (model, model.visual)]
    print(f"model      {sizes[0] / 1e6:.2f}M parameters, {sizes[1] / 1e6:.2f}M of them the eyes; {tokenizer.vocab_size} tokens for captions")
    if not saved:
        progress["untrained"] = probe(model.eval(), source, machine, -1)
    optimizer = Optimizer(model.train(), SimpleNamespace(optimizer="muon", lr=flags.lr, adam_lr=flags.adam_lr, weight_decay=0.05, momentum=0.95,
                                                        beta1=0.9, beta2=0.98), machine.dtype, within=".resblocks.")
    if saved:
        model.load_state_dict({name[6:]: tensor for name, tensor in saved[0].items() if name.startswith("model/")})
        optimizer.load({name: tensor for name, tensor in saved[0].items() if not name.startswith("model/")})
    write_config(out, config, -1)
    log = Log(out / "log.jsonl", progress["step"], fresh=not saved)
    train(flags, model, tokenizer, source, machine, optimizer, progress, log, state_file, begun - progress["seconds"])
    finish(flags, model, tokenizer, source, machine, config, progress, sizes)


def write_config(out, config, layer):
    whole = {"model_cfg": config, "preprocess_cfg": PREPROCESS, "nanomind": {"layer": layer}}
    write_whole(out / "open_clip_config.json", json.dumps(whole, indent=2) + "\n")


def train(flags, model, tokenizer, source, machine, optimizer, progress, log, state_file, begun):
    from tqdm import tqdm

    def share():
        by_clock = (time.monotonic() - begun) / (60 * flags.minutes) if flags.minutes else 0.0
        return min(1.0, max(progress["step"] / flags.steps, by_clock))

    def save():
        progress["seconds"] = time.monotonic() - begun
        tensors = {**{f"model/{name}": tensor for name, tensor in model.state_dict().items()}, **optimizer.tensors()}
        write_tensors(state_file, tensors, {"progress": json.dumps(progress)})

    losses = []
    with tqdm(total=flags.steps, initial=progress["step"], unit="step", disable=None, dynamic_ncols=True) as bar:
        while (now := share()) < 1:
            step = progress["step"]
            generator = torch.Generator().manual_seed(flags.seed * 2**32 + step)
            with machine.autocast():
                loss, whole = loss_of(model, tokenizer, source.batch(step, flags.batch_size), generator, machine.device, model.context_length)
            if not loss.isfinite():
                raise ValueError(f"step {step + 1}: the loss is {loss.item()}: begin again with a lower --lr (now {flags.lr:g})")
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step(schedule(now, now + 1 / flags.steps, 0.02, 1.0))
            with torch.no_grad():
                model.logit_scale.clamp_(0, np.log(100))
            progress["step"] += 1
            losses.append(whole.item())
            bar.set_postfix_str(f"loss {losses[-1]:.3f}", refresh=False)
            bar.update()
            if progress["step"] % SAVE_EVERY == 0 or share() >= 1:
                log.write({"step": progress["step"], "loss": round(float(np.mean(losses)), 4), "seconds": round(time.monotonic() - begun, 1)})
                if bar.disable:
                    print(f"step {progress['step']:>6}  loss {np.mean(losses):.3f}  {time.monotonic() - begun:.0f} s", flush=True)
                losses = []
                save()


def finish(flags, model, tokenizer, source, machine, config, progress, sizes):
    """Level the features, round the weights to fp16, measure, write model and card."""
    out = Path(flags.out)
    level(model.eval(), source, machine)
    model.load_state_dict({name: tensor.half().float() for name, tensor in model.state_dict().items()})
    probes = {layer: probe(model, source, machine, layer) for layer in (-1, -2)}
    layer = max(probes, key=lambda layer: sum(single for _, single in probes[layer].values()))
    scores = {"retrieval": retrieval(model, tokenizer, source, machine), "layer": layer, "probe": probes[layer], "untrained": progress["untrained"]}
    write_config(out, config, layer)
    write_tensors(out / "open_clip_model.safetensors", {name: tensor.half() for name, tensor in model.state_dict().items()}, {"format": "pt"})
    words = [word for word in sys.argv[1:] if word != "--resume"]  # a resumed run gives the same weights
    card = {"command": "python -m data_prep.clip " + shlex.join(words), "seed": flags.seed, "data_sha256": progress["identity"]["data"],
            "weights_sha256": hashlib.sha256((out / "open_clip_model.safetensors").read_bytes()).hexdigest(), "parameters": sizes[0],
            "vision_parameters": sizes[1], "steps": progress["step"], "pictures": progress["step"] * flags.batch_size,
            "minutes": round(progress["seconds"] / 60, 1), "machine": machine.reasons, "torch": torch.__version__, "scores": scores}
    write_whole(out / "card.json", json.dumps(card, indent=2) + "\n")
    (out / "state.safetensors").unlink()
    print(f"held-out captions found: {scores['retrieval']}")
    if probes[layer]:
        print("read from the mean of the patches and from one patch, % right (untrained encoder):")
    for name, (mean, one) in probes[layer].items():
        print(f"  {name:10} {mean:5.1f} {one:5.1f}   ({progress['untrained'][name][0]:.1f} {progress['untrained'][name][1]:.1f})")
    print(f"CLIP: {out} (layer {layer})")


if __name__ == "__main__":
    run(lambda: main(FLAGS))
