"""Writing fast: the weights of a model laid out for one new token at a time, and the step that reads them.
In: a LanguageModel that will no longer be trained. Out: one whose products may be int8, and a function from the ids just chosen to the next scores.
Next: nanomind/generate.py

One token costs reading every weight once, and starting some hundreds of small operations. So the step does the mathematics of model.py, for T = 1
and without a gradient, in a third of the operations, and int8 weights are half as many bytes as bf16 ones.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import nn

from nanomind.model import attention_mask, rope_table


WIDTH = 256  # outputs in a row of a table, at most: their sums stay in registers


def quantise(weight, width):
    """(N, K) -> (N / width K, width + 8) uint8, rounded up: a row holds the weights of `width` outputs for one input, a byte each, and two fp32 numbers,
    scale and least, weight = byte * scale + least up to half a scale. It is the form of torch's embedding tables of 8 bits."""
    weight = F.pad(weight.float(), (0, 0, 0, -len(weight) % width))
    bags = weight.unflatten(0, (-1, width)).transpose(1, 2)  # (N / width, K, width)
    least, most = bags.aminmax(dim=-1, keepdim=True)
    scale = ((most - least) / 255).clamp_min(1e-12)
    values = ((bags - least) / scale).round_().to(torch.uint8)
    numbers = torch.cat((scale, least), dim=-1).contiguous().view(torch.uint8)  # (N / width, K, 8)
    return torch.cat((values, numbers), dim=-1).flatten(0, 1)


def unpacked(table):
    """A table (n, width + 8) -> the weights it stands for, (n, width) fp32: what torch's kernel does on a CPU, for every device."""
    values, numbers = table.split((table.size(1) - 8, 8), dim=-1)
    scale, least = numbers.contiguous().view(torch.float32).split(1, dim=-1)
    return values * scale + least


class Int8Linear(nn.Module):
    """A linear layer without bias whose weights are kept as int8."""

    def __init__(self, weight, width):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("weight", quantise(weight, width))

    def forward(self, x):
        return int8_product(x.reshape(-1, x.size(-1)), self.weight, self.out_features).view(*x.shape[:-1], -1)


FEW = 16  # rows of which each reads the bytes for itself; for more it pays to write them out as floats once


def int8_product(x, table, N):
    """x (n, K) times the transpose of the weights in a table -> (n, N).

    A product with one row is a sum of columns of the weights, each times an entry of x: what an embedding bag computes, for which torch has a kernel
    that makes bytes floats in registers and reads its table from one end to the other. The product kernel it has for weights of 8 bits
    (_weight_int8pack_mm) reads as many and takes twice the time.
    """
    n, K = x.shape
    if n <= FEW and x.device.type == "cpu":
        bags = len(table) // K
        weights = torch.empty(n, bags, K).copy_(x.unsqueeze(1)).view(-1)  # of the rows of each bag, made fp32 and repeated in one go
        found = torch.ops.quantized.embedding_bag_byte_rowwise_offsets(table, *rows_of_bags(n, bags, K), False, 0, False, weights).view(n, -1)
    else:
        weights = (torch.ops.quantized.embedding_bag_byte_unpack if table.device.type == "cpu" else unpacked)(table)
        found = torch.matmul(x, weights.to(x.dtype).unflatten(0, (-1, K))).transpose(0, 1).flatten(1)  # (bags, n, width) -> (n, bags width)
    return (found if found.size(1) == N else found[:, :N]).to(x.dtype)


@functools.lru_cache(64)
def rows_of_bags(n, bags, K):
    """For n rows: which rows of a table their bags sum up, one after the other, and where each bag begins."""
    return torch.arange(bags * K, dtype=torch.int32).repeat(n), torch.arange(0, n * bags * K, K, dtype=torch.int32)


def to_int8(model):
    """Make every product of the layers and of the head int8. The embeddings stay: a token reads one row of them."""
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for parent, *names in ((attention, "q_proj", "k_proj", "v_proj"), (attention, "o_proj"), (mlp, "gate_proj", "up_proj"), (mlp, "down_proj")):
            sizes = [getattr(parent, name).out_features for name in names]  # of projections that will be joined: one width
            widths = [width for width in range(WIDTH, 0, -1) if math.gcd(*sizes) % width == 0]
            width = next((width for width in widths if sum(sizes) // width % 2 == 0), widths[0])  # an even number of bags: two threads get as many
            for name in names:
                setattr(parent, name, Int8Linear(getattr(parent, name).weight.detach(), width))
    model.lm_head = Int8Linear(model.lm_head.weight.detach(), min(WIDTH, model.lm_head.out_features))  # alone and large: its last row may be filled up


def join(projections):
    """Several projections of the same input as one: a weight (N, K), or a table of int8 weights and N. Theirs become views of it, so that nothing is
    held twice."""
    pieces = [projection.weight.detach() for projection in projections]
    weight = torch.cat(pieces)
    views = weight.split([len(piece) for piece in pieces])
    if isinstance(projections[0], Int8Linear):
        for projection, view in zip(projections, views):
            projection.weight = view
        return weight, sum(projection.out_features for projection in projections)
    for projection, view in zip(projections, views):
        projection.weight = nn.Parameter(view, requires_grad=False)
    return weight


def alone(projection):
    return (projection.weight, projection.out_features) if isinstance(projection, Int8Linear) else projection.weight.detach()


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
        # few rows times int8 weights on a CPU give fp32, and converting to and fro takes as long as a good part of the rest
        self.in_fp32 = isinstance(model.lm_head, Int8Linear) and self.embed.weight.device.type == "cpu"
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
        weight = norm.weight.detach().to(torch.float32 if self.in_fp32 else norm.weight.dtype)
        return torch.stack((weight, weight))

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
        x = x.float() if self.in_fp32 and B <= FEW else x
        mask = attention_mask(1, cache.remember_docs(None, 1), S, cache.keys.dtype, x.device)
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
            q = q.view(B, K, -1, D).to(cache.keys.dtype)  # (B, K, H/K, D): the queries that share a key, as if they followed one another
            found = F.scaled_dot_product_attention(q, keys[i], values[i], attn_mask=mask)
            x = x + product(found.reshape(B, -1).to(x.dtype), o)
            gate, up = product(self.rms_norm(x, mlp_norm), gate_up).split(config.intermediate_size, 1)
            x = x + product(F.silu(gate).mul_(up), down)
        cache.length = S
        return product(self.rms_norm(x, norm), head).float()
