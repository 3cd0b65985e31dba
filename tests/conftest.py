"""What several tests need: a tiny bilingual corpus, its tokenizer and data folder, a tiny model shape, all made here, nothing downloaded."""

import json
import os
import random
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ[name] = "1"

ZH = "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏闰余成岁律吕调阳云腾致雨露结为霜"
EN = "the quick brown fox jumps over a lazy dog while seven small boats sail home before dark".split()
TINY = {"model_type": "qwen3", "vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": 16, "intermediate_size": 48, "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
        "tie_word_embeddings": True}


def sentences(count, seed=0):
    draw = random.Random(seed)
    for i in range(count):
        words = draw.randint(3, 30)
        if i % 3:
            yield "".join(draw.choice(ZH) for _ in range(words)) + "。"
        else:
            yield " ".join(draw.choice(EN) for _ in range(words)) + "."


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A .jsonl file of 600 short documents, two thirds Chinese."""
    path = tmp_path_factory.mktemp("corpus") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in sentences(600)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tokenizer_folder(corpus, tmp_path_factory):
    import bpe
    folder = tmp_path_factory.mktemp("tokenizer")
    bpe.train([corpus], vocab_size=400).save(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder):
    from nanomind.tokenizer import Tokenizer
    return Tokenizer.load(tokenizer_folder)


@pytest.fixture(scope="session")
def data_folder(corpus, tokenizer_folder, tmp_path_factory):
    """A data folder of that corpus, a tenth of it for validation."""
    from data_prep.common import prepare
    folder = tmp_path_factory.mktemp("data") / "text"
    prepare("text", [corpus], tokenizer_folder, folder, val_share=0.1, workers=1)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Path of the config.json of a model so small that a step takes milliseconds."""
    path = tmp_path_factory.mktemp("tiny") / "config.json"
    path.write_text(json.dumps(TINY))
    return path
