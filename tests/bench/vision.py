"""Samples per second of phase 1 with features kept on disk, and with the encoder running in every batch; random weights, one process each, in turns.
In: an encoder's name, a preset. Out: a table. Target: kept at least 5 times live. `python tests/bench/vision.py --clip ViT-B-16 --preset nano`
Next: packing.py
"""

import argparse
import io
import json
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

from tests.bench.train import loop_step
from tests.bench.turns import Contestant, alternate, table

CONTESTANTS = (Contestant("kept", "features kept on disk"), Contestant("live", "the encoder in every batch"))


def turn(args):
    """One contestant, in this process: --warm-up steps, then --steps timed ones. -> figures."""
    import numpy as np
    import torch
    from PIL import Image

    from nanomind import device
    from nanomind.config import settle
    from nanomind.data import PackedTokens
    from nanomind.model import LanguageModel
    from nanomind.objectives import Describe
    from nanomind.stages import STAGES, freeze
    from nanomind.vision import Features, add_eyes, load_encoder

    cfg, shape = settle(dict(stage="vlm-1", preset=args.preset, seq_len=512, batch_size=2, threads=args.threads, steps=1000))
    machine = device.choose_device("cpu", cfg.precision, cfg.threads)
    encoder, random = load_encoder(args.clip, "none"), np.random.default_rng(0)
    files = []
    for _ in range(args.pictures):
        file = io.BytesIO()
        Image.fromarray(random.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(file, "PNG")
        files.append(file.getvalue())
    document = np.array([0, 1, 5, 0, *random.integers(3, 6400, 20)], dtype=np.uint16)  # its second 0 is the picture's place
    count = 4 * args.pictures
    split = SimpleNamespace(tokens=np.tile(document, count), starts=np.arange(count) * len(document), mask=np.tile(np.arange(len(document)) > 8, count),
                            refs=np.arange(count) % args.pictures, image_starts=np.arange(args.pictures), image=files.__getitem__)
    tokenizer = SimpleNamespace(end_of_text=0, token_bytes=[b"x"] * 6400)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "train").mkdir()
        features = Features(split, Path(folder), "train", encoder, machine, 4e9 if args.turn == "kept" else 0)
        rows = PackedTokens(split, tokenizer, cfg.seq_len, cfg.batch_size, whole=True, features=features)
        vision = {"encoder": encoder.identity, "patches": encoder.patches, "width": encoder.width, "projector": "linear", "mark": 0}
        model = freeze(add_eyes(LanguageModel(shape).init_weights(), vision), STAGES["vlm-1"]).train()
        step = loop_step(cfg, "vlm-1", Describe(), machine, model, model, rows)
        rates = []
        for number in range(args.warm_up + args.steps):
            samples, began = len(rows.batch(number).features) if args.turn == "kept" else None, time.perf_counter()
            step(number)
            rates.append((samples or cfg.batch_size * (cfg.seq_len // (len(document) + encoder.patches - 1))) / (time.perf_counter() - began))
        return {"rate": sorted(rates[args.warm_up:])[args.steps // 2], "memory": device.peak_memory(torch.device("cpu"))}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clip", default="ViT-B-16")
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--pictures", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--turn", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.turn:
        return print(json.dumps(turn(args)))
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in vars(args).items() if name not in ("rounds", "turn")]
    table(CONTESTANTS, alternate(__file__, CONTESTANTS, args.rounds, flags), "kept", {"rate": ("samples/s", "{:,.1f}"), "memory": ("peak memory, MB", "{:,.0f}")})


if __name__ == "__main__":
    main()
