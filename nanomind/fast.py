"""Writing fast: the weights of a model laid out for one new token at a time, and the step that reads them.
In: a LanguageModel that will no longer be trained. Out: one whose products may be int8, and a function from the ids just chosen to the next scores.
Next: nanomind/generate.py

One token costs reading every weight once, and starting some hundreds of small operations. So the step does the mathematics of model.py, for T = 1
and without a gradient, in a third of the operations, and int8 weights are half as many bytes as bf16 ones.
"""

import functools

import torch
import torch.nn.functional as F
from torch import nn

from nanomind.model import attention_mask, rope_table


def quantise(weight, dtype):
    """(N, K) -> int8 (N, K) and a scale for each row, (N,) in `dtype`: weight = int8 * scale up to half a scale. Symmetric, so that 0 stays 0."""
    scale = (weight.float().abs().amax(dim=1) / 127).clamp_min(1e-12).to(dtype)  # rounded first: the entries make up for it
    return (weight.float() / scale.float()[:, None]).round_().clamp_(-127, 127).to(torch.int8), scale


def dequantise(values, scale):
    """What the int8 weights stand for, (N, K) in the dtype of the scale."""
    return values.to(scale.dtype) * scale[:, None]


class Int8Linear(nn.Module):
    """A linear layer without bias whose weights are kept as int8."""

    def __init__(self, weight, dtype):
        super().__init__()
        values, scale = quantise(weight, dtype)
        self.register_buffer("weight", values)
        self.register_buffer("scale", scale)

    def forward(self, x):
        rows = x.reshape(-1, x.size(-1))
        return int8_product(rows, self.weight, self.scale).view(*x.shape[:-1], -1)


FEW = 4  # rows for which int8 weights are made floats in registers; for more it pays to write them out as floats once


def int8_product(x, values, scale):
    """x (n, K) times the transpose of int8 weights (N, K) with their scales -> (n, N)."""
    x = x.contiguous()
    # torch's kernel takes 16 entries at a time from aligned addresses, and does not check that it may; only its bf16 form is fast
    aligned = x.size(1) % 16 == 0 and x.data_ptr() % 32 == 0 and values.data_ptr() % 16 == 0
    if aligned and len(x) <= FEW and x.device.type == "cpu" and x.dtype == torch.bfloat16:
        return torch._weight_int8pack_mm(x, values, scale)
    return F.linear(x, values.to(x.dtype)) * scale


def to_int8(model, dtype):
    """Make every product of the layers and of the head int8. The embeddings stay: a token reads one row of them."""
    for parent in [*model.model.layers.modules(), model]:
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, Int8Linear(child.weight.detach(), dtype))


def join(projections):
    """Several projections of the same input as one: a weight (N, K), or int8 values and their scales. Theirs become views of it, so that nothing
    is held twice."""
    parts = [projection.weight.detach() for projection in projections]
    weight = torch.cat(parts)
    views = weight.split([len(part) for part in parts])
    if isinstance(projections[0], Int8Linear):
        for projection, view in zip(projections, views):
            projection.weight = view
        return weight, torch.cat([projection.scale for projection in projections])
    for projection, view in zip(projections, views):
        projection.weight = nn.Parameter(view, requires_grad=False)
    return weight


def alone(projection):
    return (projection.weight, projection.scale) if isinstance(projection, Int8Linear) else projection.weight.detach()


def packs(dtype):
    """Has this CPU products of `dtype` that read weights in an order of their own?"""
    known = torch.backends.cpu.get_cpu_capability().startswith("AVX") and torch.backends.mkldnn.is_available()
    return known and (dtype == torch.float32 or dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack(weight):
    """What `join` or `alone` gave; floats on a CPU with oneDNN in the order in which that reads them. It would put them in that order for every
    product: with the copy a token takes a third to two thirds of the time. The plain ones stay, for prompts: that is the price."""
    if torch.is_tensor(weight) and weight.device.type == "cpu" and packs(weight.dtype):
        return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
    return weight


def past_onednn(dtype):
    """Is one row's product with plain weights faster without oneDNN, even where that could have them in its order? In bf16 it is (by a third on an EPYC),
    but not with AMX."""
    return dtype == torch.bfloat16 and packs(dtype) and not torch.cpu._is_amx_tile_supported()


def product(x, weight):
    """x (B, K) times what `pack` gave -> (B, N)."""
    if isinstance(weight, tuple):
        return int8_product(x, *weight)
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "") if weight.is_mkldnn else F.linear(x, weight)


class Step:
    """One new token for each row: what `model.logits(model(ids[:, None], cache=cache))` computes, from weights that are final."""

    def __init__(self, model):
        config = self.config = model.config
        self.embed, self.eps = model.model.embed_tokens, config.rms_norm_eps
        self.past = past_onednn(self.embed.weight.dtype)
        self.signs = torch.tensor([[1.0], [-1.0]]).to(self.embed.weight)
        H, K, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.norms, self.plain, stretch = [], [], []
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            self.norms.append((self.both(layer.input_layernorm), self.both(layer.post_attention_layernorm)))
            self.plain.append((join([attention.q_proj, attention.k_proj, attention.v_proj]), alone(attention.o_proj),
                               join([mlp.gate_proj, mlp.up_proj]), alone(mlp.down_proj)))
            if config.qk_norm:
                stretch.append(torch.cat((attention.q_norm.weight.expand(H, D), attention.k_norm.weight.expand(K, D))).float())
        self.norms.append((self.both(model.model.norm),))
        self.plain.append((alone(model.lm_head),))
        # QK-norm's weights are multiplied into the cosines and sines, once a step for all layers: (L or 1, H + K, 2, D/2)
        self.stretch = (torch.stack(stretch).detach() if stretch else torch.ones(1, H + K, D, device=self.signs.device)).unflatten(-1, (2, -1))

    @functools.cached_property
    def packed(self):
        """The weights in oneDNN's order, made when they are first wanted."""
        return [tuple(map(pack, weights)) for weights in self.plain]

    def both(self, norm):
        """The weight of an RMSNorm for rms_norm, (2, C)."""
        return torch.stack((norm.weight.detach(), norm.weight.detach()))

    def rms_norm(self, x, weight):
        """x / rms(x) * weight as a layer norm of (x, -x), whose mean is 0 and whose variance is the mean square of x: two operations instead of
        nine. x: (n, C), weight: (2, C) or None."""
        twice = x.unsqueeze(1) * self.signs  # (n, 2, C)
        return torch.layer_norm(twice, twice.shape[1:], weight, None, self.eps).select(1, 0)

    def turns(self, position, dtype):
        """For each layer what to multiply queries and keys by, and what their swapped halves, to turn them to `position`: two lists of
        (H + K, 2, D/2)."""
        cos, sin = (x[0] for x in rope_table(self.config, position, 1, self.signs.device))  # (1, D/2)
        straight = self.stretch * torch.stack((cos, cos), dim=1)
        across = self.stretch.flip(-2) * torch.stack((-sin, sin), dim=1)
        return [x.to(dtype).expand(len(self.plain) - 1, -1, -1, -1).unbind() for x in (straight, across)]

    def __call__(self, ids, cache):
        """ids: (B,) -> logits (B, V) fp32; the tokens are now in the cache."""
        was = torch.backends.mkldnn.enabled
        past = self.past and len(ids) == 1
        torch.backends.mkldnn.enabled = was and not past
        try:
            return self.run(ids, cache, self.plain if past else self.packed)
        finally:
            torch.backends.mkldnn.enabled = was

    def run(self, ids, cache, weights):
        """The step, with the weights in one order or the other."""
        config, B, S = self.config, len(ids), cache.length + 1
        H, K, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        assert S <= cache.size, f"{S} tokens do not fit a cache of {cache.size}"
        x = self.embed(ids)  # (B, C)
        mask = attention_mask(1, cache.remember_docs(None, 1), S, x.dtype, x.device)
        straight, across = self.turns(cache.length, x.dtype)
        keys, values = (kept[:, :, :, :S].unbind() for kept in (cache.keys, cache.values))  # of each layer: (B, K, S, D)
        new_keys, new_values = (kept[:, :, :, S - 1].unbind() for kept in (cache.keys, cache.values))  # (B, K, D)
        *layers, (norm, head) = [(*norms, *own) for norms, own in zip(self.norms, weights)]
        for i, (attention_norm, mlp_norm, qkv, o, gate_up, down) in enumerate(layers):
            turned, v = product(self.rms_norm(x, attention_norm), qkv).view(B, -1, D).split_with_sizes((H + K, K), 1)
            if config.qk_norm:
                turned = self.rms_norm(turned.reshape(-1, D), None)
            turned = turned.view(B, -1, 2, D // 2)
            turned = (turned * straight[i]).addcmul_(turned.flip(2), across[i]).view(B, -1, D)
            q, k = turned.split_with_sizes((H, K), 1)
            new_keys[i].copy_(k)
            new_values[i].copy_(v)
            q = q.view(B, K, -1, D)  # (B, K, H/K, D): the queries that share a key, as if they followed one another
            found = F.scaled_dot_product_attention(q, keys[i], values[i], attn_mask=mask)
            x = x + product(found.reshape(B, -1), o)
            gate, up = product(self.rms_norm(x, mlp_norm), gate_up).split(config.intermediate_size, 1)
            x = x + product(F.silu(gate).mul_(up), down)
        cache.length = S
        return product(self.rms_norm(x, norm), head).float()
