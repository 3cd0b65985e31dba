"""The decoder computes what transformers' Llama and Qwen3 compute, with and without cache, and nobody sees what they must not."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

from nanomind import checkpoint
from nanomind.config import PRESETS, ModelConfig
from nanomind.model import KVCache, LanguageModel, RMSNorm, attend, attention_mask
from nanomind.objectives import NextToken
from nanomind.data import Batch

SHAPES = {
    "llama, grouped, tied": dict(),
    "qwen3, head_dim not hidden / heads": dict(qk_norm=True, head_dim=24),
    "llama, untied, one group": dict(tie_word_embeddings=False, num_key_value_heads=4, rope_theta=5e5, rms_norm_eps=1e-6),
}


def config(**changes):
    values = dict(vocab_size=97, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=56,
                  head_dim=8, max_position_embeddings=64)
    return ModelConfig(**{**values, **changes})


def random_model(cfg, seed=0):
    model = LanguageModel(cfg).init_weights(seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():  # larger than at the start of a run, norms included, so that every part shows in the logits
            p.add_(torch.randn(p.shape, generator=generator) * 0.2)
    return model


def folder_of(model, path):
    path.mkdir()
    weights = model.state_dict()
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    (path / "config.json").write_text(json.dumps(model.config.to_hf()))
    checkpoint.write_tensors(path / "model.safetensors", weights, {"format": "pt"})
    return path


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_transformers_in_both_directions(shape, tmp_path):
    """Rotary pairing, head sharing, norm placement and weight names are conventions; one wrong one still trains, and no other program can
    read the weights (MiniMind had to break all its checkpoints over it). The same folder must give the same logits in both programs."""
    from transformers import AutoModelForCausalLM
    cfg = config(**SHAPES[shape])
    ours = random_model(cfg)
    tokens = torch.randint(0, 97, (2, 33), generator=torch.Generator().manual_seed(1))
    theirs = AutoModelForCausalLM.from_pretrained(folder_of(ours, tmp_path / "ours"), dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(ours(tokens)), theirs(tokens).logits, atol=1e-4, rtol=0)
        for p in theirs.parameters():
            p.mul_(0.9)
        theirs.save_pretrained(tmp_path / "theirs")
        back = checkpoint.load_model(tmp_path / "theirs").eval()
        assert back.config == cfg
        torch.testing.assert_close(back.logits(back(tokens)), theirs(tokens).logits, atol=1e-4, rtol=0)


def test_preset_sizes():
    """The sizes that the README names, counted on the real modules."""
    for name, expected in (("small", 25_829_888), ("base", 104_030_976)):
        with torch.device("meta"):
            model = LanguageModel(PRESETS[name][0])
        assert sum(p.numel() for p in model.parameters()) == expected == PRESETS[name][0].parameters()


def test_no_token_sees_the_future():
    """A causal leak gives wonderful losses and a model that cannot write."""
    model = random_model(config())
    tokens = torch.randint(0, 97, (1, 20))
    changed = tokens.clone()
    changed[0, 11:] = (changed[0, 11:] + 1) % 97
    with torch.no_grad():
        a, b = model(tokens), model(changed)
    assert torch.equal(a[:, :11], b[:, :11]) and not torch.allclose(a[:, 11:], b[:, 11:])


def test_packed_documents_never_see_each_other():
    """nanoGPT, nanochat and nanoVLM let a document read its neighbour in the row. B after A must give the hidden states of B alone."""
    model = random_model(config())
    a, b = torch.randint(0, 97, (1, 9)), torch.randint(0, 97, (1, 14))
    doc_ids = torch.tensor([[0] * 9 + [1] * 14 + [-1] * 3])
    with torch.no_grad():
        packed = model(torch.cat((a, b, torch.zeros(1, 3, dtype=torch.long)), 1), doc_ids)
        torch.testing.assert_close(packed[:, :9], model(a), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(packed[:, 9:23], model(b), atol=1e-5, rtol=1e-5)  # rotary positions are relative: no reset needed
    assert packed.isfinite().all()  # padding sees itself, so its softmax is not empty


@pytest.mark.parametrize("split", range(1, 12))
def test_prefill_in_chunks_equals_one_forward(split):
    """is_causal with a cache aligns the triangle at the wrong corner: text after a chunked prompt is subtly wrong, never an error."""
    model = random_model(config(qk_norm=True))
    tokens = torch.randint(0, 97, (2, 12))
    cache = KVCache(model.config, 2, 12, torch.float32, "cpu")
    with torch.no_grad():
        whole = model(tokens)
        parts = torch.cat((model(tokens[:, :split], cache=cache), model(tokens[:, split:], cache=cache)), 1)
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)


def test_attention_equals_naive():
    """One naive softmax attention, head by head, against the fused call with every kind of mask."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    doc_ids = torch.tensor([[0] * 6 + [1] * 3, [-1] * 3 + [0] * 6])
    for docs in (None, doc_ids):
        mask = attention_mask(5, docs, 9, torch.float32, "cpu")
        out = attend(q, k, v, mask)
        for b in range(2):
            for h in range(4):
                for t in range(5):
                    seen = [s for s in range(9) if s <= t + 4 and (docs is None or docs[b, s] == docs[b, t + 4])]
                    scores = (k[b, h // 2, seen] @ q[b, h, t]) / math.sqrt(8)
                    torch.testing.assert_close(out[b, h, t], scores.softmax(0) @ v[b, h // 2, seen], atol=1e-5, rtol=1e-5)


def test_first_loss_is_ln_vocabulary():
    """A bad start costs hundreds of steps: an untrained model must be as unsure as it can be."""
    model = LanguageModel(PRESETS["nano"][0]).init_weights(0)
    tokens = torch.randint(0, 6400, (2, 65))
    batch = Batch(tokens[:, :-1], tokens[:, 1:], torch.zeros(2, 64, dtype=torch.long))
    loss, _ = NextToken()(model, batch)
    assert abs(loss.item() / 128 - math.log(6400)) < 0.1


def test_small_init_where_the_residual_stream_is_written():
    """llama2.c scales `w3`, the up projection, because w1, w2, w3 do not say what they are; only o_proj and down_proj write to the stream."""
    model = LanguageModel(config(hidden_size=256, head_dim=64, intermediate_size=512)).init_weights(0)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            expected = 0.02 / math.sqrt(6) if "o_proj" in name or "down_proj" in name else 0.02
            assert abs(p.std().item() / expected - 1) < 0.05, name


def test_no_buffers():
    """Peers keep a T x T mask or a table of positions in every layer; here the weights are all there is."""
    model = LanguageModel(PRESETS["nano"][0])
    assert sum(b.numel() for b in model.buffers()) == 0
    assert not [name for module in model.modules() for name, value in vars(module).items() if torch.is_tensor(value)]


def test_gradient_checkpointing_changes_nothing():
    """Same loss, same gradients, less memory."""
    tokens, grads = torch.randint(0, 97, (2, 17)), []
    batch = Batch(tokens[:, :-1], tokens[:, 1:], torch.zeros(2, 16, dtype=torch.long))
    for checkpointing in (False, True):
        model = LanguageModel(config(), checkpointing).init_weights(0).train()
        NextToken()(model, batch)[0].backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


def test_norms_and_losses_stay_fp32_under_autocast():
    """bf16 has 8 bits: a norm or a log-softmax in it is wrong in the second digit."""
    model, kinds, norm, x = LanguageModel(config()).init_weights(0), {}, RMSNorm(32, 1e-5), torch.randn(4, 32, requires_grad=True)
    for name, module in model.named_modules():
        if name.endswith(("o_proj", "layers.0")):
            module.register_forward_hook(lambda m, x, y, name=name: kinds.update({name.split(".")[-1]: y.dtype}))
    tokens = torch.randint(0, 97, (2, 17))
    batch = Batch(tokens[:, :-1], tokens[:, 1:], torch.zeros(2, 16, dtype=torch.long))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = NextToken()(model, batch)
        torch.testing.assert_close(norm(x).float(), F.rms_norm(x, (32,), norm.weight, 1e-5), atol=0, rtol=2**-8)  # rounded once, at its end
    assert kinds == {"o_proj": torch.bfloat16, "0": torch.float32} and loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


class Plain(LanguageModel):
    """The same model through the plain lines: gradients are wanted, but nothing is done by hand."""

    def forward(self, tokens, doc_ids=None, **more):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("nanomind.model.by_hand", lambda *x: False)
            return super().forward(tokens, doc_ids, **more)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("B, H, K, T, D, qk_norm, frozen", ((2, 3, 1, 300, 16, True, ""), (1, 4, 2, 129, 6, False, ""), (3, 4, 4, 5, 8, True, "q_norm"),
                                                           (1, 6, 2, 128, 4, True, "proj"), (1, 1, 1, 1, 4, True, "k_proj"), (2, 2, 1, 40, 8, False, ".")))
def test_layers_by_hand_equal_the_plain_ones(dtype, B, H, K, T, D, qk_norm, frozen):
    """On a CPU a layer's training passes are written by hand: values and gradients must be those of the plain lines, for several documents in a
    row, padding, blocks that do not divide, heads that share keys, weights that are frozen; under autocast they may be off by bf16's own error."""
    shape = config(num_attention_heads=H, num_key_value_heads=K, head_dim=D, qk_norm=qk_norm)
    random = torch.Generator().manual_seed(0)
    doc_ids = torch.randint(0, 2, (B, T), generator=random).cumsum(1) // 7
    doc_ids[:, T - T // 5:] = -1
    x, g = (torch.randn(B, T, shape.hidden_size, generator=random) for _ in range(2))
    results = []
    for kind, autocast in ((LanguageModel, dtype), (Plain, dtype), (Plain, torch.float32)):
        model = kind(shape).init_weights(0)
        for name, p in model.named_parameters():
            with torch.no_grad():
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)), alpha=0.2)  # so that every part shows
            p.requires_grad_(not frozen or frozen not in name)
        inputs = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast == torch.bfloat16):
            out = model(torch.zeros(B, T, dtype=torch.long), doc_ids, embeddings=inputs)
        out.float().backward(g)
        results.append([out.detach().float(), inputs.grad, *(p.grad for p in model.model.layers.parameters())])
    for ours, plain, exact in zip(*results):
        assert (ours is None) == (plain is None)
        if ours is not None:
            allowed = 1e-5 * exact.norm() if dtype == torch.float32 else 2 * (plain - exact).norm() + 5e-3 * exact.norm()  # or autocast's own error
            assert ours.dtype == exact.dtype and (ours - exact).norm() <= allowed + 1e-5
