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
    if q.device.type == "cpu" and mask is not None and torch.is_grad_enabled() and q.requires_grad:
        return AttentionFunction.apply(q, k, v, mask)
    causal = mask is None and q.size(2) > 1  # never a mask and is_causal together; a single query may see everything
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=q.size(1) != k.size(1))


class AttentionFunction(torch.autograd.Function):
    """softmax(q k^T / sqrt(D) + mask) v for training on a CPU, where the fused kernel's backward pass takes two to four times as long as plain
    products around a softmax. QUERIES of them at a time, against the keys up to the last of them: what the causal mask hides is not computed.
    The H / K queries that share a key lie under one another, so keys and values are never repeated. With p the softmax and g the gradient of
    the output: d v = p^T g, d s = p (g v^T - rowsum(p g v^T)), d q = d s k, d k = d s^T q."""

    QUERIES = 128

    @classmethod
    def blocks(cls, T, S):
        """(first query, end of the queries, end of the keys they may see) of each block."""
        return [(at, min(at + cls.QUERIES, T), S - T + min(at + cls.QUERIES, T)) for at in range(0, T, cls.QUERIES)]

    @staticmethod
    def rows(x, K):
        """(B, H, T, D) -> (B K, H/K T, D)"""
        return x.reshape(x.size(0) * K, -1, x.size(3))

    @staticmethod
    def forward(ctx, q, k, v, mask):
        (B, H, T, D), (K, S) = q.shape, k.shape[1:3]
        keys, values, out, kept = k.reshape(B * K, S, D), v.reshape(B * K, S, D), torch.empty_like(q), []
        mask = mask.expand(B, 1, T, S)
        for first, end, seen in AttentionFunction.blocks(T, S):
            queries = AttentionFunction.rows(q[:, :, first:end] * D**-0.5, K)
            scores = torch.bmm(queries, keys[:, :seen].mT).view(B, H, end - first, seen).add_(mask[:, :, first:end, :seen])
            p = scores.softmax(-1).view(B * K, -1, seen)  # computed in fp32 inside, whatever the dtype
            out[:, :, first:end] = torch.bmm(p, values[:, :seen]).view(B, H, end - first, D)
            kept += [queries, p]
        ctx.save_for_backward(keys, values, *kept)
        ctx.shape = q.shape
        return out

    @staticmethod
    def backward(ctx, grad):
        (keys, values, *kept), (B, H, T, D) = ctx.saved_tensors, ctx.shape
        S = keys.size(1)
        K = keys.size(0) // B
        grad_q, grad_k, grad_v = torch.empty_like(grad), torch.zeros_like(keys), torch.zeros_like(values)
        for (first, end, seen), queries, p in zip(AttentionFunction.blocks(T, S), kept[::2], kept[1::2]):
            g = AttentionFunction.rows(grad[:, :, first:end], K)
            grad_v[:, :seen] += torch.bmm(p.mT, g)
            grad_scores = torch._softmax_backward_data(torch.bmm(g, values[:, :seen].mT), p, -1, p.dtype)
            grad_q[:, :, first:end] = torch.bmm(grad_scores, keys[:, :seen]).view(B, H, end - first, D).mul_(D**-0.5)
            grad_k[:, :seen] += torch.bmm(grad_scores.mT, queries)
        return grad_q, grad_k.view(B, K, S, D), grad_v.view(B, K, S, D), None


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


class NormFunction(torch.autograd.Function):
    """x s w with s = 1 / rms(x), in fp32. Written out because autograd's own way through it takes twice the passes over memory and keeps
    more for the backward pass: d x = s g w - x s^3 (x . g w) / C, d w = sum over rows of g x s."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        h = x.float()
        scale = torch.linalg.vector_norm(h, dim=-1, keepdim=True).square_().div_(h.size(-1)).add_(eps).rsqrt_()  # (..., 1)
        ctx.save_for_backward(x, weight, scale)
        return (h * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        h, g = x.float(), grad.float()
        rows = (g * h).flatten(0, -2)  # (n, C)
        inner = (rows @ weight).view_as(scale) * scale.pow(3) / h.size(-1)
        return (g * weight).mul_(scale).addcmul_(h, inner, value=-1).to(x.dtype), scale.flatten() @ rows, None


class RMSNorm(nn.Module):
    """x / rms(x) * weight, in fp32 whatever the precision of the run (arXiv:1910.07467, eq. 4)."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        if torch.is_grad_enabled():
            return NormFunction.apply(x, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)  # computes in fp32 inside; one call, when one token is all there is


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
        self.qk_norm = config.qk_norm

    def forward(self, x, rope, mask, cache, layer):
        B, T, _ = x.shape
        q, k, v = (projection(x).view(B, T, -1, self.head_dim) for projection in (self.q_proj, self.k_proj, self.v_proj))  # (B, T, H, D), (B, T, K, D), (B, T, K, D)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, *rope), rotate(k, *rope)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, T, D)
        if cache is not None:
            k, v = cache.append(layer, k, v)  # (B, K, S, D)
        return self.o_proj(attend(q, k, v, mask).transpose(1, 2).reshape(B, T, -1))


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up. Written out so that only gate and up are kept for the backward pass, and silu is computed again there."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


class MLP(nn.Module):
    """SwiGLU (arXiv:2002.05202)."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(SwiGLU.apply(self.gate_proj(x), self.up_proj(x)))


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, rope, mask, cache, layer):
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cache, layer)
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

    def forward(self, tokens, doc_ids=None, cache=None, embeddings=None):
        """tokens: (B, T) ids; doc_ids: (B, T), which document a token belongs to, or None for one; embeddings: (B, T, C) instead of the
        tokens' own (this is how images come in). With a cache the tokens follow those it holds. Returns hidden states (B, T, C)."""
        B, T = tokens.shape
        x = self.model.embed_tokens(tokens) if embeddings is None else embeddings
        start = cache.length if cache is not None else 0
        S = start + T
        assert cache is None or S <= cache.size, f"{S} tokens do not fit a cache of {cache.size}"
        if cache is not None:
            doc_ids = cache.remember_docs(doc_ids, T)
        device_type = x.device.type
        dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype
        mask = attention_mask(T, doc_ids, S, dtype, x.device)
        rope = rope_table(self.config, start, T, x.device)
        for i, layer in enumerate(self.model.layers):
            if self.checkpointing and self.training:
                x = checkpoint(layer, x, rope, mask, cache, i, use_reentrant=False)
            else:
                x = layer(x, rope, mask, cache, i)
        if cache is not None:
            cache.length = S
        return self.model.norm(x)

    def logits(self, hidden):
        """hidden: (..., C) -> (..., V) fp32."""
        return self.lm_head(hidden).float()
