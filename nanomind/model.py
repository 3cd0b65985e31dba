"""The decoder: a Llama (or, with QK-norm, a Qwen3) under Hugging Face's weight names, and its key/value cache.
In: token ids, optionally document ids and a cache. Out: hidden states, one vector per token; `logits` turns them into scores.
Next: nanomind/vision.py

Shapes, here and everywhere: B rows, T tokens in a row, S tokens in the cache, C hidden size, H query heads, K key/value heads,
D head size, L layers, V vocabulary, N targets, M images, P patches per image, E CLIP width.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from nanomind.by_hand import AttentionFunction, NormFunction, Products, SwiGLU, by_hand, product_dtype


def rope_table(config, start, T, device):
    """Cosines and sines of the rotary positions start .. start+T-1, each (T, 1, D/2) fp32 (RoFormer, arXiv:2104.09864, eq. 34)."""
    D = config.head_dim
    frequencies = config.rope_theta ** (-torch.arange(0, D, 2, device=device, dtype=torch.float32) / D)  # (D/2)
    angles = torch.outer(torch.arange(start, start + T, device=device, dtype=torch.float32), frequencies)  # (T, D/2)
    return angles.cos()[:, None], angles.sin()[:, None]


def rotate(x, cos, sin):
    """Rotate the pairs (x[i], x[i + D/2]), the half-split pairing of Hugging Face. x: (B, T, heads, D)."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)), dim=-1)


def attention_mask(T, doc_ids, S, dtype, device):
    """The one place that decides who sees whom: the T newest of S tokens look back, each inside its own document only.

    doc_ids: (B, S) or None (one document). Returns None for plain causal attention, else an additive mask (B or 1, 1, T, S): 0 where
    a query may look, -inf elsewhere. Every token sees itself, padding (document -1) included, so no row of the softmax is empty.
    """
    if doc_ids is None and T in (1, S):
        return None
    places = torch.arange(S, device=device)
    seen = (places[S - T:, None] >= places)[None]  # (1, T, S)
    if doc_ids is not None:
        seen = seen & (doc_ids[:, S - T:, None] == doc_ids[:, None, :])  # (B, T, S)
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, float("-inf"))[:, None]


def attend(q, k, v, mask):
    """Grouped-query attention. q: (B, H, T, D), k and v: (B, K, S, D), mask as attention_mask returns it -> (B, H, T, D)."""
    if mask is not None and q.device.type != "cpu" and q.size(1) != k.size(1):  # not every GPU kernel that takes a mask shares keys among queries,
        k, v = (x.repeat_interleave(q.size(1) // x.size(1), 1) for x in (k, v))  # and what is left then holds all T x S scores of each head
    causal = mask is None and q.size(2) > 1  # never a mask and is_causal together; a single query may see everything
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=q.size(1) != k.size(1))


class KVCache:
    """Keys and values of the tokens seen so far, in buffers of fixed size that are written in place."""

    def __init__(self, config, B, size, dtype, device):
        shape = (config.num_hidden_layers, B, config.num_key_value_heads, size, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.doc_ids = None  # (B, size) once a batch with padding has been seen
        self.size, self.length = size, 0

    def append(self, layer, k, v):
        """Store k and v, (B, K, T, D), behind what `layer` holds and return all of it, (B, K, S, D). `length` moves after the last layer."""
        end = self.length + k.size(2)
        self.keys[layer, :, :, self.length:end] = k
        self.values[layer, :, :, self.length:end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def remember_docs(self, doc_ids, T):
        """Store the document ids of the T new tokens (None: all 0) and return those of all S, or None while there is only one document."""
        if doc_ids is None and self.doc_ids is None:
            return None
        if self.doc_ids is None:
            self.doc_ids = torch.zeros(self.keys.size(1), self.size, dtype=torch.long, device=self.keys.device)
        self.doc_ids[:, self.length:self.length + T] = 0 if doc_ids is None else doc_ids
        return self.doc_ids[:, :self.length + T]

    def keep(self, rows):
        """Forget all rows but these (their places)."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]
        self.doc_ids = None if self.doc_ids is None else self.doc_ids[rows]


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in fp32 whatever the precision of the run (arXiv:1910.07467, eq. 4)."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        if by_hand(x):
            return NormFunction.apply(x, self.weight, self.eps, product_dtype(x))
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)  # computes in fp32 inside; one call, when one token is all there is


def pick(x, places):
    """x (B, T, C) at `places` of its B T tokens, (N, C); or all of it."""
    return x if places is None else x.flatten(0, 1)[places]


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, H, K, self.head_dim = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q_proj = nn.Linear(C, H * self.head_dim, bias=False)
        self.k_proj = nn.Linear(C, K * self.head_dim, bias=False)
        self.v_proj = nn.Linear(C, K * self.head_dim, bias=False)
        self.o_proj = nn.Linear(H * self.head_dim, C, bias=False)
        if config.qk_norm:
            self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.qk_norm, self.heads = config.qk_norm, (H, K)

    def forward(self, x, rope, mask, cache, layer, places=None):
        B, T, _ = x.shape
        projections = self.q_proj, self.k_proj, self.v_proj
        if mask is not None and cache is None and by_hand(x, self.q_proj):
            joined = Products.apply(x, *(projection.weight for projection in projections))
            norms = (self.q_norm.weight, self.k_norm.weight, self.q_norm.eps) if self.qk_norm else (None, None, 0.0)
            return self.o_proj(pick(AttentionFunction.apply(joined, *norms, *rope, mask, *self.heads), places))
        q, k, v = (projection(x).view(B, T, -1, self.head_dim) for projection in projections)  # (B, T, H, D), (B, T, K, D), (B, T, K, D)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, *rope), rotate(k, *rope)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, T, D)
        if cache is not None:
            k, v = cache.append(layer, k, v)  # (B, K, S, D)
        return self.o_proj(pick(attend(q, k, v, mask).transpose(1, 2).reshape(B, T, -1), places))


class MLP(nn.Module):
    """SwiGLU (arXiv:2002.05202)."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        if by_hand(x, self.gate_proj):
            return self.down_proj(SwiGLU.apply(Products.apply(x, self.gate_proj.weight, self.up_proj.weight)))
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, rope, mask, cache, layer, places=None):
        x = pick(x, places) + self.self_attn(self.input_layernorm(x), rope, mask, cache, layer, places)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """What Hugging Face calls `model`: embeddings, layers, final norm."""

    def __init__(self, config):
        super().__init__()
        # not nn.Embedding(V, C): its random numbers are overwritten by init_weights or a checkpoint, and on the meta device they take torch a second of imports
        self.embed_tokens = nn.Embedding.from_pretrained(torch.zeros(config.vocab_size, config.hidden_size), freeze=False)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class LanguageModel(nn.Module):
    """The decoder with its output head. `checkpointing` recomputes each layer's activations in the backward pass."""

    def __init__(self, config, checkpointing=False):
        super().__init__()
        self.config, self.checkpointing = config, checkpointing
        self.step = None  # a faster way to write one token, once generate.prepare has made it
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @torch.no_grad()
    def init_weights(self, seed=0):
        """Normal with std 0.02; the two projections that write to the residual stream by 1/sqrt(2 L) smaller (GPT-2), so that the first
        loss is ln V and the stream does not grow with depth. The generator is our own: the same weights on every device."""
        generator = torch.Generator().manual_seed(seed)
        residual = 0.02 / (2 * self.config.num_hidden_layers) ** 0.5
        for name, p in self.named_parameters():  # a tied head is listed once
            if p.dim() == 2:
                std = residual if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
                p.copy_(torch.empty(p.shape).normal_(0, std, generator=generator))
            else:
                p.fill_(1.0)
        return self

    def forward(self, tokens, doc_ids=None, cache=None, embeddings=None, places=None):
        """tokens: (B, T) ids; doc_ids: (B, T), which document a token belongs to, or None for one; embeddings: (B, T, C) instead of the
        tokens' own (this is how images come in). With a cache the tokens follow those it holds. Returns hidden states (B, T, C), or with `places`,
        (N,) of the B T tokens, those alone, (N, C): behind the last layer's attention nobody looks at the others any more."""
        B, T = tokens.shape
        x = self.model.embed_tokens(tokens) if embeddings is None else embeddings
        start = cache.length if cache is not None else 0
        S = start + T
        assert cache is None or S <= cache.size, f"{S} tokens do not fit a cache of {cache.size}"
        if cache is not None:
            doc_ids = cache.remember_docs(doc_ids, T)
        mask = attention_mask(T, doc_ids, S, product_dtype(x), x.device)
        rope = rope_table(self.config, start, T, x.device)
        for i, layer in enumerate(self.model.layers):
            wanted = places if i == len(self.model.layers) - 1 else None
            if self.checkpointing and self.training:
                x = checkpoint(layer, x, rope, mask, cache, i, wanted, use_reentrant=False)
            else:
                x = layer(x, rope, mask, cache, i, wanted)
        if cache is not None:
            cache.length = S
        return self.model.norm(x)

    def logits(self, hidden):
        """hidden: (..., C) -> (..., V) fp32."""
        return self.lm_head(hidden).float()
