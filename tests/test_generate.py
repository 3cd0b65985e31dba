"""Writing text: the cache, the batch and the chunks change nothing; every rule of sampling does what its name says; sample.py runs."""

import subprocess
import sys
from itertools import product

import pytest
import torch

import train
from conftest import ROOT
from nanomind.config import ModelConfig
from nanomind.generate import Sampling, candidates, choose, complete, generate
from nanomind.model import LanguageModel

GREEDY = Sampling(temperature=0, repetition_penalty=1.0)


@pytest.fixture(scope="module")
def model():
    config = ModelConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
                         head_dim=8, max_position_embeddings=64, qk_norm=True)
    model = LanguageModel(config).init_weights(0).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4 if p.dim() == 2 else 1)  # confident, so that greedy text is not a matter of rounding
    return model


def text(model, prompts, n, sampling=GREEDY, stop=()):
    rows = [[] for _ in prompts]
    for step in generate(model, prompts, n, stop, sampling):
        for row, token in zip(rows, step):
            rows and token is not None and row.append(token)
    return rows


def without_cache(model, prompt, n):
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(n):
            ids.append(int(model.logits(model(torch.tensor([ids])))[0, -1].argmax()))
    return ids[len(prompt):]


@pytest.mark.parametrize("chunk", (512, 3, 1))
def test_cache_and_batch_change_nothing(model, chunk, monkeypatch):
    """A cache that is off by one, or padding that is seen, still writes fluent text, only another one. Greedy ids must be those of the plain forward,
    alone and in a batch of prompts of different lengths."""
    monkeypatch.setattr("nanomind.generate.PREFILL", chunk)  # tokens of a prompt that are read in one go
    prompts = [[5, 7, 11], [3], [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]]
    expected = [without_cache(model, prompt, 20) for prompt in prompts]
    assert [text(model, [prompt], 20)[0] for prompt in prompts] == expected
    assert text(model, prompts, 20) == expected


@pytest.mark.parametrize("sampling", (Sampling(temperature=0, repetition_penalty=3.0), Sampling(temperature=0.4, repetition_penalty=3.0, seed=4)))
def test_rows_that_have_ended_are_left_out(model, sampling, monkeypatch):
    """One long answer of 128 must not cost 128 long answers: when half of the rows have ended the rest goes on alone, and writes what it would have."""
    from nanomind import generate as module
    prompts, stop = [[n % 50, 3 * n % 50, 7][:1 + n % 3] for n in range(12)], set(range(0, 50, 7))
    sizes, real = [], module.decode
    monkeypatch.setattr(module, "decode", lambda model, ids, cache: sizes.append(len(ids)) or real(model, ids, cache))
    alone = [text(model, [prompt], 30, sampling, stop)[0] for prompt in prompts]
    sizes.clear()
    assert text(model, prompts, 30, sampling, stop) == alone and len(set(map(len, alone))) > 2
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) > 1 and sum(sizes) < 0.7 * len(prompts) * len(sizes)


def test_greedy_equals_transformers(model, tmp_path):
    """The same folder, the same prompt, their generate and ours."""
    from transformers import AutoModelForCausalLM
    from test_model import folder_of
    theirs = AutoModelForCausalLM.from_pretrained(folder_of(model, tmp_path / "m"), dtype=torch.float32)
    theirs.generation_config.eos_token_id = None
    found = theirs.generate(torch.tensor([[5, 7, 11]]), max_new_tokens=25, do_sample=False, pad_token_id=0)[0, 3:].tolist()
    assert text(model, [[5, 7, 11]], 25)[0] == found


def test_every_setting_writes_a_token(model):
    """Temperature 0, top_k above the vocabulary, top_p 0 and 1 crash or divide by zero in peers."""
    for values in product((0, 0.01, 1.0, 3.0), (0, 1, 50, 999), (0.0, 0.5, 1.0), (0.0, 1.0), (1.0, 1.5)):
        row, = text(model, [[1, 2]], 3, Sampling(*values))
        assert len(row) == 3 and all(0 <= token < 50 for token in row), values


def test_impossible_settings_are_refused_all_at_once():
    with pytest.raises(ValueError, match="temperature -1.*top_p 2"):
        Sampling(temperature=-1, top_p=2)


def left_over(logits, seen, sampling):
    """The candidates in the order of their ids, (B, V), -inf where cut."""
    return torch.full_like(logits, float("-inf")).scatter(1, *reversed(candidates(logits, seen, sampling)))


def test_repetition_penalty_never_raises_a_seen_token():
    """Dividing a negative logit by the penalty makes the token likelier (MiniMind, early nanochat)."""
    logits = torch.tensor([[2.0, -1.0, 0.5, -3.0]])
    sampling = Sampling(temperature=1, top_k=0, top_p=1, repetition_penalty=1.3)
    for token in range(4):
        seen = torch.zeros(1, 4, dtype=torch.bool)
        seen[0, token] = True
        before, after = logits.softmax(-1)[0], left_over(logits, seen, sampling).softmax(-1)[0]
        assert after[token] < before[token] and all(after[i] > before[i] for i in range(4) if i != token)


def test_cuts_keep_what_they_name():
    """top-k, top-p and min-p against their definitions in words."""
    p = torch.tensor([[0.5, 0.25, 0.15, 0.07, 0.03]])
    def left(**values):
        sampling = Sampling(**{**dict(temperature=1, top_k=0, top_p=1, repetition_penalty=1), **values})
        kept = left_over(p.log(), torch.zeros_like(p, dtype=torch.bool), sampling)[0].isfinite()
        assert kept.tolist() == sorted(kept.tolist(), reverse=True)  # the likeliest are kept, under their own ids
        return kept.sum().item()
    assert [left(top_k=k) for k in (0, 1, 3, 9)] == [5, 1, 3, 5]
    assert [left(top_p=x) for x in (0, 0.4, 0.6, 0.8, 1)] == [1, 1, 2, 3, 5]
    assert [left(min_p=x) for x in (0, 0.2, 0.4, 1)] == [5, 3, 2, 1]


def test_draws_follow_the_distribution():
    """Gumbel-max must draw from softmax, each row from its own generator."""
    p = torch.tensor([0.6, 0.3, 0.1])
    generator = torch.Generator().manual_seed(0)
    seen = torch.zeros(1, 3, dtype=torch.bool)
    draws = [choose(p.log()[None], seen, Sampling(1, 0, 1, 0, 1), [generator]).item() for _ in range(4000)]
    for token in range(3):
        assert abs(draws.count(token) / 4000 - p[token]) < 0.03


def test_seed_fixes_the_text_and_nothing_else_does(model):
    """The global generator must neither be used nor moved, and a neighbour in the batch must not change a row."""
    sampling = Sampling(1.0, 0, 1, 0, 1, seed=7)
    torch.manual_seed(1)
    first = text(model, [[1, 2, 3]], 15, sampling)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert text(model, [[1, 2, 3]], 15, sampling) == first and torch.equal(state, torch.get_rng_state())
    assert text(model, [[1, 2, 3], [4, 5]], 15, sampling)[0] == first[0]
    assert text(model, [[1, 2, 3]], 15, Sampling(1.0, 0, 1, 0, 1, seed=8)) != first


def test_new_tokens_are_counted_and_stops_are_not_shown(model):
    """max_new_tokens once meant prompt plus answer; an end token belongs to neither."""
    expected = without_cache(model, [5, 7, 11], 12)
    assert len(text(model, [[5, 7, 11]], 12)[0]) == 12
    end = expected[6]
    assert text(model, [[5, 7, 11]], 12, stop={end})[0] == expected[:expected.index(end)]
    assert len(text(model, [[1] * 60], 100)[0]) == 4  # the model sees 64
    with pytest.raises(ValueError, match="the prompt has 64 tokens"):
        text(model, [[1] * 64], 5)


@pytest.fixture(scope="module")
def trained(data_folder, tiny, tmp_path_factory):
    """A run folder with a trained tiny model."""
    import os
    here, was = tmp_path_factory.mktemp("run"), os.getcwd()
    os.chdir(here)
    try:
        train.main(dict(data=str(data_folder), preset=str(tiny), seq_len=32, batch_size=8, steps=60, eval_tokens=64.0, threads=1, precision="fp32"))
    finally:
        os.chdir(was)
    return here


def sample(arguments, cwd, **more):
    return subprocess.run([sys.executable, str(ROOT / "sample.py"), *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=120, **more)


def test_sample_finds_the_newest_run_and_streams_whole_characters(trained):
    """Characters of three bytes come in pieces of tokens; printing each piece shows U+FFFD."""
    from nanomind import checkpoint
    result = sample(["--prompt", "天地玄黄", "--max-new-tokens", 30, "--seed", 1], trained)
    assert result.returncode == 0 and result.stdout.startswith("天地玄黄") and "parameters" in result.stderr
    model, tokenizer = checkpoint.load(trained / "out/demo/pretrain")
    ids = [tokenizer.end_of_text] + tokenizer.encode("天地玄黄")
    expected = complete(model.eval(), tokenizer, ids, 30, Sampling(seed=1), {tokenizer.end_of_text, tokenizer.im_end})
    assert result.stdout.rstrip("\n") == ("天地玄黄" + expected).rstrip("\n")


def test_sample_automatic_and_bad_input(trained, tmp_path):
    result = sample(["--auto", "--max-new-tokens", 3], trained)
    assert result.returncode == 0 and all(prompt in result.stdout for prompt in ("马克思主义基本原理", "杭州市的美食有", "The largest ocean on Earth is"))
    for arguments, cwd, expected in (([], tmp_path, "no checkpoint"), (["--ckpt", "nowhere", "--auto"], trained, "nowhere"),
                                     (["--auto", "--prompt", "x", "--run", "a", "--ckpt", "b"], trained, "exclude each other"),
                                     (["--temperature", -1], trained, "temperature -1")):
        bad = sample(arguments, cwd)
        assert bad.returncode == 2 and "Traceback" not in bad.stderr and expected in bad.stderr, bad.stderr


def test_sample_with_int8_weights(trained):
    """All but the same text, from half the bytes; the reader is told."""
    result = sample(["--prompt", "天地玄黄", "--int8", "--max-new-tokens", 10], trained)
    assert result.returncode == 0 and result.stdout.startswith("天地玄黄") and "bfloat16 with int8 weights" in result.stderr
    exact = sample(["--prompt", "天地玄黄", "--int8", "--precision", "fp32", "--max-new-tokens", 10], trained)
    assert exact.returncode == 0 and "float32 with int8 weights" in exact.stderr


def test_a_typed_control_token_is_text(trained):
    """`<|endoftext|>` in a prompt is ordinary text: no character a user types becomes a control token."""
    result = sample(["--prompt", "天<|endoftext|>地", "--max-new-tokens", 2], trained)
    assert result.returncode == 0 and result.stdout.startswith("天<|endoftext|>地")


def test_prompt_longer_than_the_context(trained):
    """The oldest tokens are dropped, and that is said."""
    result = sample(["--prompt", "天地玄黄宇宙洪荒" * 60, "--max-new-tokens", 5], trained)
    assert result.returncode == 0 and "only its last" in result.stderr


def imported(arguments, cwd):
    """Names of the packages that a run of sample.py imports, torch's parts with theirs."""
    result = subprocess.run([sys.executable, "-X", "importtime", str(ROOT / "sample.py"), *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-500:]
    names = [line.rsplit("|", 1)[1].strip() for line in result.stderr.splitlines() if line.startswith("import time:")]
    return {".".join(name.split(".")[:2]) if name.startswith("torch.") else name.split(".")[0] for name in names}


def test_nothing_is_imported_before_it_is_needed(trained):
    """torch takes seconds to import: --help must not wait for it. Text must not wait for the eyes (open_clip, torchvision, timm), nor a checkpoint
    for torch's compiler, which filling an embedding on the meta device with random numbers brings in."""
    assert not imported(["--help"], trained) & {"torch", "numpy", "regex", "safetensors"}
    found = imported(["--prompt", "天", "--max-new-tokens", 3], trained)
    assert {"torch", "numpy", "safetensors"} <= found
    assert not found & {"open_clip", "torchvision", "timm", "PIL", "transformers", "huggingface_hub", "torch._dynamo", "torch._inductor", "sympy"}


def test_help_is_quick():
    """torch takes seconds to import; --help must not wait for it."""
    import time
    for script in ("train.py", "sample.py"):
        began = time.monotonic()
        assert subprocess.run([sys.executable, str(ROOT / script), "--help"], capture_output=True).returncode == 0
        assert time.monotonic() - began < 1.0


@pytest.mark.parametrize("kind", ("llama", "qwen3"))
def test_folders_of_other_projects(kind, tmp_path):
    """A folder saved by transformers, with a tokenizer trained by `tokenizers` (GPT-2 style, other special tokens, no start token), must write the
    greedy text that transformers writes."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from conftest import sentences
    words = Tokenizer(models.BPE())
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    words.train_from_iterator(sentences(200), trainers.BpeTrainer(vocab_size=350, special_tokens=["</s>"], show_progress=False,
                                                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
    fast.save_pretrained(tmp_path)
    shape = dict(vocab_size=350, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
                 max_position_embeddings=64, tie_word_embeddings=kind == "qwen3", initializer_range=0.3)
    torch.manual_seed(0)
    config, model = ((transformers.LlamaConfig, transformers.LlamaForCausalLM) if kind == "llama" else (transformers.Qwen3Config, transformers.Qwen3ForCausalLM))
    theirs = model(config(**shape)).eval()
    theirs.save_pretrained(tmp_path)
    prompt = "天地玄黄"
    ids = fast(prompt, return_tensors="pt")["input_ids"]
    found = theirs.generate(ids, max_new_tokens=12, do_sample=False, repetition_penalty=1.0, eos_token_id=None, pad_token_id=0)[0, ids.size(1):].tolist()
    found = found[:found.index(0)] if 0 in found else found
    result = sample(["--ckpt", tmp_path, "--prompt", prompt, "--temperature", 0, "--repetition-penalty", 1, "--max-new-tokens", 12], tmp_path)
    assert result.returncode == 0, result.stderr
    from nanomind.tokenizer import Tokenizer as Ours
    assert result.stdout == prompt + Ours.load(tmp_path).decode(found) + "\n"
