"""Writing fast writes the same: the step of one token equals the plain forward, int8 weights are what a naive loop makes them."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from nanomind.config import PRESETS, ModelConfig, load_preset
from nanomind.fast import Int8Linear, Step, int8_product, pack, packs, product, quantise, unpacked
from nanomind.generate import Sampling, generate, prepare
from nanomind.model import KVCache, LanguageModel

GREEDY = Sampling(temperature=0, repetition_penalty=1.0)
SHAPES = {"grouped": dict(), "QK-norm": dict(qk_norm=True), "a head of its own": dict(num_attention_heads=3, num_key_value_heads=3, head_dim=6),
          "odd": dict(hidden_size=35, intermediate_size=57, num_attention_heads=5, num_key_value_heads=1, head_dim=14, tie_word_embeddings=False, qk_norm=True)}


def model_of(shape):
    config = ModelConfig(**{**dict(vocab_size=97, hidden_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=12,
                                   intermediate_size=80, max_position_embeddings=64), **shape})
    model = LanguageModel(config).init_weights(3).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():  # confident, so that greedy text is not a matter of rounding; norms that are not all ones
        p.mul_(4 if p.dim() == 2 else torch.rand(p.shape, generator=generator) + 0.5)
    return model


def steps(step, model, prompts, ids, dtype=torch.float32):
    """Logits of the tokens `ids`, (n, B), one after another behind prompts of the same or of different lengths (padded on the left). -> (n, B, V)"""
    longest = max(map(len, prompts))
    tokens = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    doc_ids = torch.tensor([[-1] * (longest - len(p)) + [0] * len(p) for p in prompts]) if len(set(map(len, prompts))) > 1 else None
    cache = KVCache(model.config, len(prompts), longest + len(ids), dtype, "cpu")
    with torch.inference_mode():
        model(tokens, doc_ids, cache)
        return torch.stack([step(row, cache) for row in ids])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("prompts", ([[5, 7, 11]], [[5, 7, 11], [3, 2, 1], [9, 9, 9]], [[5, 7, 11], [3], [9, 8, 7, 6, 5, 4, 3]]), ids=("one", "three", "padded"))
def test_the_step_equals_the_plain_forward(shape, prompts):
    """Fewer and other operations, the same mathematics: norms, rotation, grouped heads, padding, position by position."""
    model, halved = model_of(SHAPES[shape]), model_of(SHAPES[shape]).to(torch.bfloat16)
    ids = torch.randint(0, 97, (9, len(prompts)), generator=torch.Generator().manual_seed(0))
    plain = steps(lambda row, cache: model.logits(model(row[:, None], None, cache)[:, -1]), model, prompts, ids)
    assert plain.std() > 0.3
    torch.testing.assert_close(steps(Step(model), model, prompts, ids), plain, atol=2e-5, rtol=1e-5)
    rough = steps(Step(halved), halved, prompts, ids, torch.bfloat16)
    assert F.cosine_similarity(rough, plain, dim=-1).min() > 0.995


@pytest.mark.parametrize("amx", (True, False))
def test_one_row_goes_past_onednn_where_that_is_faster(amx, monkeypatch):
    """In bf16, on a processor without AMX: the plain weights are read and no copy is made; the flag is put back, also after an error."""
    model = model_of(dict()).to(torch.bfloat16)
    ids, prompts = torch.randint(0, 97, (9, 1), generator=torch.Generator().manual_seed(0)), [[5, 7, 11]]
    plain = steps(lambda row, cache: model.logits(model(row[:, None], None, cache)[:, -1]), model, prompts, ids, torch.bfloat16)
    on, real = [], F.linear
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    step = Step(model)
    monkeypatch.setattr(F, "linear", lambda *given: on.append(torch.backends.mkldnn.enabled) or real(*given))
    before = torch.backends.mkldnn.enabled
    found = steps(step, model, prompts, ids, torch.bfloat16)
    assert F.cosine_similarity(found, plain, dim=-1).min() > 0.999
    past = packs(torch.bfloat16) and not amx
    assert on.count(False) == 9 * (3 * 4 + 1) * past and ("packed" in vars(step)) != past
    steps(step, model, prompts * 2, ids.expand(-1, 2), torch.bfloat16)
    assert "packed" in vars(step) and torch.backends.mkldnn.enabled == before
    with pytest.raises(AssertionError, match="do not fit"):
        step(ids[0], KVCache(model.config, 1, 0, torch.bfloat16, "cpu"))
    assert torch.backends.mkldnn.enabled == before


@pytest.mark.parametrize("packed", (True, False))
@pytest.mark.parametrize("shape", SHAPES)
def test_prepared_model_writes_the_same_and_holds_nothing_twice(shape, packed, monkeypatch):
    """But for weights in oneDNN's order, each once, where the CPU has it: another tensor, which nothing but its own product understands."""
    if not packed:
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    model = model_of(SHAPES[shape])
    fast = copy.deepcopy(model)
    prepare(fast, "cpu", "fp32", 1)
    prompts = [[5, 7, 11], [3], [9, 8, 7, 6, 5, 4, 3]]
    for some in (prompts, prompts[:1]):
        assert list(generate(fast, some, 30, (), GREEDY)) == list(generate(model, some, 30, (), GREEDY))
    tensors = [tensor for own in (*fast.step.norms, *fast.step.plain, *fast.step.packed) for tensor in own]
    copies = [tensor for tensor in tensors if tensor.is_mkldnn]
    wanted = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name] + [model.lm_head.weight] * model.config.tie_word_embeddings
    assert sum(tensor.numel() for tensor in copies) == (sum(p.numel() for p in wanted) if pack(torch.zeros(1, 1)).is_mkldnn else 0)
    held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in [*tensors, *fast.parameters()] if not tensor.is_mkldnn}
    small = sum(2 * p.nbytes for p in model.parameters() if p.dim() == 1)
    assert sum(held.values()) <= sum(p.nbytes for p in model.parameters()) + small


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_weights_are_packed_where_the_processor_can(dtype, monkeypatch):
    """Not every processor that computes in bf16 has oneDNN's products of it: there, and without oneDNN, the plain weights stay."""
    x, weight = (torch.randn(size, 57, generator=torch.Generator().manual_seed(size)).to(dtype) for size in (3, 35))
    can = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX")
    can = can and (dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
    assert pack(weight).is_mkldnn == can
    for rows in (x[:1], x):
        torch.testing.assert_close(product(rows, pack(weight)), F.linear(rows, weight), **(dict(atol=0.1, rtol=0.02) if dtype == torch.bfloat16 else dict(atol=1e-4, rtol=1e-5)))
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert pack(weight).is_mkldnn == (can and dtype == torch.float32)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert pack(weight) is weight


def dequantise(table, K):
    """What a table stands for, (N, K) fp32, N rounded up."""
    return unpacked(table).unflatten(0, (-1, K)).transpose(1, 2).flatten(0, 1)


@pytest.mark.parametrize("N, K, width", ((7, 33, 7), (8, 5, 4), (10, 6, 4), (3, 40, 16)))
def test_quantising_equals_torch_and_a_naive_loop(N, K, width):
    """Entry by entry what torch's own quantiser of embedding tables gives; an input without weights must not divide by zero."""
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-4, 0.02, 0.3, 1, 7, 100, 0]).repeat(6)[:K]
    table, filled = quantise(weight, width), torch.zeros(-(-N // width) * width, K)
    filled[:N] = weight
    for part, group in zip(table.split(K), filled.split(width)):
        rows = group.T.contiguous()  # (K, width)
        theirs = torch.ops.quantized.embedding_bag_byte_prepack(rows)
        assert (part[:, :width].int() - theirs[:, :width].int()).abs().max() <= 1  # what lies in the middle may go up or down
        numbers = part[:, width:].contiguous().view(torch.float32)
        torch.testing.assert_close(numbers[:, 1], rows.min(1).values, atol=0, rtol=0)
        for row, values, (scale, least) in zip(rows.tolist(), part[:, :width].tolist(), numbers.tolist()):
            assert scale == pytest.approx(max((max(row) - min(row)) / 255, 1e-12), rel=1e-6)
            for w, byte in zip(row, values):
                assert abs(byte * scale + least - w) <= 0.501 * scale
    apart = unpacked(table) - torch.ops.quantized.embedding_bag_byte_unpack(table)
    assert (apart.abs() <= 1e-4 * table[:, width:].contiguous().view(torch.float32)[:, :1]).all()  # of a step
    assert dequantise(table, K).shape == filled.shape
    steps = table[:, width:].contiguous().view(torch.float32)[:, 0].view(-1, K).repeat_interleave(width, 0)
    assert ((dequantise(table, K) - filled).abs() <= 0.501 * steps + 1e-12).all()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("rows", (1, 3, 33))
@pytest.mark.parametrize("N, K, width", ((97, 48, 97), (97, 48, 64), (35, 57, 5), (1, 200, 1), (512, 64, 256)))
def test_int8_products_equal_products_with_the_weights_they_stand_for(rows, N, K, width, dtype):
    """Few rows and many go different ways; the last row of a table may have places that no output needs."""
    generator = torch.Generator().manual_seed(N)
    layer, x = Int8Linear(torch.randn(N, K, generator=generator), width), torch.randn(2, rows, K, generator=generator).to(dtype)
    expected = F.linear(x.float(), dequantise(layer.weight, K)[:N])
    assert layer(x).dtype == dtype and layer(x).shape == (2, rows, N)
    torch.testing.assert_close(layer(x).float(), expected, **(dict(atol=1e-4, rtol=1e-5) if dtype == torch.float32 else dict(atol=0.1, rtol=0.02)))


def test_int8_weights_are_read_as_such(monkeypatch):
    """For few rows, wherever in a joined table their weights lie, no float copy of them is made; for many one is."""
    taken, unpack = [], torch.ops.quantized.embedding_bag_byte_unpack
    monkeypatch.setattr(torch.ops.quantized, "embedding_bag_byte_unpack", lambda *given: taken.append(1) or unpack(*given))
    x, table = torch.randn(17, 48), quantise(torch.randn(9, 48), 3)
    for some, made in ((x[:1], False), (x[3:4], False), (x[:16], False), (x, True)):
        expected = some @ dequantise(table[48:], 48).T
        taken.clear()
        torch.testing.assert_close(int8_product(some, table[48:], 6), expected, atol=1e-4, rtol=1e-5)
        assert bool(taken) == made
    assert int8_product(x.to("meta"), table[48:].to("meta"), 6).shape == (17, 6)  # what other devices go through


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_writing(shape):
    """The step and the plain forward read the same int8 weights, and both stay near the weights that were."""
    model = model_of(SHAPES[shape])
    embeddings = model.model.embed_tokens.weight.clone()
    prompts, ids = [[5, 7, 11], [3]], torch.randint(0, 97, (9, 2), generator=torch.Generator().manual_seed(0))
    exact = steps(lambda row, cache: model.logits(model(row[:, None], None, cache)[:, -1]), model, prompts, ids)
    assert "int8" in prepare(model, "cpu", "fp32", 1, int8=True)
    plain = steps(lambda row, cache: model.logits(model(row[:, None], None, cache)[:, -1]), model, prompts, ids)
    torch.testing.assert_close(steps(model.step, model, prompts, ids), plain, atol=2e-5, rtol=1e-5)
    assert F.cosine_similarity(plain, exact, dim=-1).min() > 0.999
    half = model_of(SHAPES[shape])
    prepare(half, "cpu", "bf16", 1, int8=True)  # few rows are computed in fp32 between the products, the cache stays bf16
    for some in (slice(0, 1), slice(0, 2), [0, 1] * 10):
        rows = [prompts[i] for i in (some if isinstance(some, list) else range(2)[some])]
        found = steps(half.step, half, rows, ids[:, some], torch.bfloat16)
        assert F.cosine_similarity(found, plain[:, some], dim=-1).min() > 0.99
    assert torch.equal(model.model.embed_tokens.weight, embeddings)


def test_int8_weights_are_a_byte_each():
    """And the two numbers of a row no more than a tenth of that."""
    model = LanguageModel(replace(load_preset("small")[0], num_hidden_layers=1)).requires_grad_(False)
    products = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2)  # the embeddings once, as the head
    prepare(model, "cpu", "bf16", 1, int8=True)
    assert products < sum(tensor.nbytes for tensor in model.state_dict().values()) - model.model.embed_tokens.weight.nbytes < 1.1 * products


@pytest.mark.parametrize("preset", PRESETS)
def test_two_threads_get_as_many_bags_of_int8_weights(preset):
    """Three bags for two threads take as long as four. The head has so many that one more does not count."""
    model = LanguageModel(replace(load_preset(preset)[0], num_hidden_layers=1))
    prepare(model, "cpu", "bf16", 1, int8=True)
    layer = model.model.layers[0]
    for inputs, projections in ((layer.self_attn, ("q_proj", "k_proj", "v_proj")), (layer.self_attn, ("o_proj",)), (layer.mlp, ("gate_proj", "up_proj")),
                                (layer.mlp, ("down_proj",))):
        tables = [getattr(inputs, name) for name in projections]
        assert sum(len(table.weight) for table in tables) % (2 * tables[0].in_features) == 0, projections
        assert len({table.weight.size(1) for table in tables}) == 1


@pytest.mark.parametrize("gain, rows, precision, dtype", ((3.0, 256, "auto", "bfloat16"), (0.5, 256, "auto", "float32"), (3.0, 1, "auto", "float32"),
                                                          (3.0, 256, "fp32", "float32"), (0.5, 1, "bf16", "bfloat16")))
def test_a_tiny_model_writes_many_texts_in_what_is_multiplied_faster(gain, rows, precision, dtype, monkeypatch):
    monkeypatch.setattr("nanomind.device.product_rates", lambda: {torch.bfloat16: gain, torch.float32: 1.0})
    model = model_of({})
    assert dtype in prepare(model, "cpu", precision, 1, rows=rows) and model.lm_head.weight.dtype == getattr(torch, dtype)
