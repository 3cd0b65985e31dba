"""A training step's passes through a layer, written out by hand for a CPU: norm, several products as one, attention, SwiGLU.
In: activations and weights. Out: what the plain lines of nanomind/model.py give, values and gradients, in fewer passes over memory.
Next: nanomind/model.py

Left to autograd, each of these is a chain of operations that all go through memory, keep what they were given for the backward pass and, under
autocast, convert it once for every product. Here a Function knows its own derivative (in its docstring; g is the gradient of what it gave).
"""

import torch
import torch.nn.functional as F


def by_hand(x, projection=None):
    """Are these passes the right ones for x, (B, T, ...)? On a GPU the fused kernels are, for the one token of a decoding step the plain lines.
    With or without gradients: what a model is compared with (a teacher, a DPO reference) must have been rounded in the same places. The weights of int8 products (fast.py) are none of theirs."""
    return x.device.type == "cpu" and x.size(1) > 1 and (projection is None or projection.weight.is_floating_point())


def product_dtype(x):
    """The dtype in which matrix products are done here: autocast's when it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def inverse_rms(h, eps):
    """1 / rms over the last dimension, which stays with size 1. h: fp32."""
    return torch.linalg.vector_norm(h, dim=-1, keepdim=True).square_().div_(h.size(-1)).add_(eps).rsqrt_()


class NormFunction(torch.autograd.Function):
    """x s w with s = 1 / rms(x), computed in fp32, given in `dtype`: d x = s g w - x s^3 (x . g w) / C, d w = sum over rows of g x s."""

    @staticmethod
    def forward(ctx, x, weight, eps, dtype):
        h = x.float()
        scale = inverse_rms(h, eps)  # (..., 1)
        ctx.save_for_backward(x, weight, scale)
        return (h * scale).mul_(weight).to(dtype)

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        h, g = x.float(), grad.float()
        rows = (g * h).flatten(0, -2)  # (n, C)
        inner = (rows @ weight).view_as(scale) * scale.pow(3) / h.size(-1)
        grad_weight = scale.flatten() @ rows if ctx.needs_input_grad[1] else None
        return (g * weight).mul_(scale).addcmul_(h, inner, value=-1).to(x.dtype), grad_weight, None, None


class Products(torch.autograd.Function):
    """x @ w.T for several weights w, the results side by side, (..., sum of rows): one product instead of three thin ones, and x is kept and
    its gradient added up once. d x = g [w ...], d [w ...] = g^T x."""

    @staticmethod
    def forward(ctx, x, *weights):
        joined = torch.cat(weights).to(x.dtype)
        ctx.save_for_backward(x, joined)
        ctx.sizes, ctx.kinds = [len(weight) for weight in weights], [weight.dtype for weight in weights]
        return x @ joined.T

    @staticmethod
    def backward(ctx, grad):
        x, joined = ctx.saved_tensors
        grad_x, parts = grad @ joined if ctx.needs_input_grad[0] else None, [None] * len(ctx.sizes)
        if any(ctx.needs_input_grad[1:]):
            parts = [part.to(kind) for part, kind in zip((grad.flatten(0, -2).T @ x.flatten(0, -2)).split(ctx.sizes), ctx.kinds)]
        return grad_x, *(part if needed else None for part, needed in zip(parts, ctx.needs_input_grad[1:]))


class AttentionFunction(torch.autograd.Function):
    """All between the product that gives q | k | v and the one that takes the heads' output: QK-norm, rotary positions, softmax(q k^T / sqrt(D)
    + mask) v. The fused kernel's backward pass takes two to four times as long on a CPU as plain products around a softmax.

    QUERIES places at a time look at the keys up to the last of them: most of what the causal mask hides is not computed. The H / K = G queries
    that share a key are rows of one product, so keys and values are never repeated. With p the softmax: d v = p^T g, d s = p (g v^T -
    rowsum(p g v^T)), d q = d s k, d k = d s^T q; then the rotation backwards, and the norm as above.
    """

    QUERIES = 128

    @staticmethod
    def blocks(T):
        """(first query, end of the queries and of the keys they may see) of each block, the last one first: it sees all keys."""
        starts = range(0, T, AttentionFunction.QUERIES)
        return [(first, min(first + AttentionFunction.QUERIES, T)) for first in reversed(starts)]

    @staticmethod
    def factors(q_weight, k_weight, H, K, D, device):
        """What each head of q | k is multiplied by: 1 / sqrt(D) in q, and the weights of the norms. -> (H + K, D or 1)"""
        factor = torch.ones(H + K, 1, device=device)
        factor[:H] = D**-0.5
        return factor if q_weight is None else torch.cat((q_weight.expand(H, D), k_weight.expand(K, D))) * factor

    @staticmethod
    def forward(ctx, joined, q_weight, k_weight, eps, cos, sin, mask, H, K):
        """joined: (B, T, (H + 2 K) D), the product's result; weights of the norms (D) or None; cos, sin: (T, 1, D/2); mask: (B, 1, T, T)."""
        B, T, width = joined.shape
        D, G = width // (H + 2 * K), H // K
        h = joined[..., :(H + K) * D].unflatten(-1, (H + K, D)).to(torch.float32, copy=True)  # (B, T, H + K, D)
        scale = None
        if q_weight is not None:
            scale = inverse_rms(h, eps)
            h.mul_(scale)
        h.mul_(AttentionFunction.factors(q_weight, k_weight, H, K, D, h.device))
        h = turn(h, cos, sin)
        q = torch.empty(B, K, T, G, D, dtype=joined.dtype, device=joined.device)
        q.copy_(h[:, :, :H].unflatten(2, (K, G)).transpose(1, 2))
        q = q.view(B * K, T * G, D)
        k = h[:, :, H:].transpose(1, 2).to(joined.dtype).reshape(B * K, T, D)
        v = joined[..., (H + K) * D:].unflatten(-1, (K, D)).transpose(1, 2).reshape(B * K, T, D)
        out, kept = torch.empty(B, T, K, G, D, dtype=joined.dtype, device=joined.device), []
        for first, end in AttentionFunction.blocks(T):
            scores = torch.bmm(q[:, first * G:end * G], k[:, :end].mT).view(B, K, end - first, G, end)
            p = scores.add_(mask[:, :, first:end, None, :end]).softmax(-1).view(B * K, -1, end)  # computed in fp32 inside, whatever the dtype
            out[:, first:end] = torch.bmm(p, v[:, :end]).view(B, K, -1, G, D).transpose(1, 2)
            kept.append(p)
        ctx.save_for_backward(None if scale is None else joined, q_weight, k_weight, cos, sin, scale, q, k, v, *kept)
        ctx.heads = H, K
        return out.view(B, T, H * D)

    @staticmethod
    def backward(ctx, grad):
        joined, q_weight, k_weight, cos, sin, scale, q, k, v, *kept = ctx.saved_tensors
        (B, T, _), (H, K), D = grad.shape, ctx.heads, q.size(2)
        G = H // K
        g = grad.view(B, T, K, G, D).transpose(1, 2).reshape(B * K, T * G, D)
        grad_h, grad_k, grad_v = torch.empty(B, T, H + K, D, device=grad.device), None, None
        for (first, end), p in zip(AttentionFunction.blocks(T), kept):
            rows = slice(first * G, end * G)
            grad_scores = torch._softmax_backward_data(torch.bmm(g[:, rows], v[:, :end].mT), p, -1, p.dtype)
            grad_h[:, first:end, :H].unflatten(2, (K, G)).copy_(torch.bmm(grad_scores, k[:, :end]).view(B, K, -1, G, D).transpose(1, 2))
            parts = torch.bmm(grad_scores.mT, q[:, rows]), torch.bmm(p.mT, g[:, rows])
            if end == T:
                grad_k, grad_v = parts
            else:
                grad_k[:, :end] += parts[0]
                grad_v[:, :end] += parts[1]
        grad_h[:, :, H:] = grad_k.view(B, K, T, D).transpose(1, 2)
        grad_h = turn(grad_h, cos, -sin)
        grad_q_weight = grad_k_weight = None
        factor = AttentionFunction.factors(q_weight, k_weight, H, K, D, grad.device)
        if scale is None:
            grad_h.mul_(factor)
        else:
            h = joined[..., :(H + K) * D].unflatten(-1, (H + K, D)).float()
            product = grad_h.mul_(scale) * h
            of_heads = product.sum((0, 1))  # (H + K, D)
            grad_q_weight, grad_k_weight = of_heads[:H].sum(0) * D**-0.5, of_heads[H:].sum(0)
            inner = product.mul_(factor).sum(-1, keepdim=True).mul_(scale.square()).div_(D)
            grad_h.mul_(factor).addcmul_(h, inner, value=-1)
        result = torch.empty(B, T, (H + 2 * K) * D, dtype=grad.dtype, device=grad.device)
        result[..., :(H + K) * D] = grad_h.flatten(2)
        result[..., (H + K) * D:].unflatten(-1, (K, D)).copy_(grad_v.view(B, K, T, D).transpose(1, 2))
        return result, grad_q_weight, grad_k_weight, None, None, None, None, None, None


def turn(h, cos, sin):
    """The rotation of `rotate` in model.py for fp32 h, (B, T, heads, D), with one pass and two half ones."""
    half = h.size(-1) // 2
    turned = h * torch.cat((cos, cos), dim=-1)
    turned[..., :half].addcmul_(h[..., half:], sin, value=-1)
    turned[..., half:].addcmul_(h[..., :half], sin)
    return turned


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up of gate | up side by side, (..., 2 F). Only those are kept, and silu is computed again in the backward pass."""

    @staticmethod
    def forward(ctx, joined):
        ctx.save_for_backward(joined)
        gate, up = joined.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad):
        joined, = ctx.saved_tensors
        (gate, up), result = joined.chunk(2, dim=-1), torch.empty_like(joined)
        grad_gate, grad_up = result.chunk(2, dim=-1)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        torch.mul(F.silu(gate), grad, out=grad_up)
        return result
