"""What is minimised: the only place where the stages differ in mathematics.
In: the model and a batch. Out: a SUM over the batch's targets, and metrics that are sums too; the loop divides, once.
Next: optim.py
"""

import math

import torch

from nanomind.data import IGNORE

CHUNK = 2048  # rows of the vocabulary head that are computed at a time


def chunk_nll(hidden, weight, labels):
    """-log p(label) and log of the softmax's sum, both (n,), and the logits (n, V), all fp32. hidden: (n, C), weight: (V, C)."""
    logits = (hidden @ weight.T).float()
    log_z = logits.logsumexp(dim=-1)
    return log_z - logits.gather(1, labels[:, None])[:, 0], log_z, logits


class LinearCrossEntropy(torch.autograd.Function):
    """sum of cross_entropy(hidden @ weight.T, labels) that never holds all N x V logits.

    The head of a small model is most of its memory and a good part of its time. Going through the rows in chunks, each chunk's softmax is
    used for the loss and at once for both gradients: d hidden = (p - onehot) weight, d weight = (p - onehot)^T hidden.
    hidden: (N, C), weight: (V, C), labels: (N,) without IGNORE. Products in `dtype`, everything else in fp32.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels, dtype):
        h, w = hidden.to(dtype), weight.to(dtype)
        needed = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        grad_hidden = torch.empty_like(hidden) if needed else None
        grad_weight = torch.zeros_like(weight) if needed else None
        total = torch.zeros((), device=hidden.device)
        for start in range(0, len(h), CHUNK):
            part, label = h[start:start + CHUNK], labels[start:start + CHUNK]
            nll, log_z, logits = chunk_nll(part, w, label)
            total += nll.sum()
            if needed:
                p = logits.sub_(log_z[:, None]).exp_()  # (n, V), in place of the logits
                p[torch.arange(len(label), device=p.device), label] -= 1.0
                p = p.to(dtype)
                grad_hidden[start:start + CHUNK] = p @ w
                grad_weight += p.T @ part
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    def backward(ctx, grad):
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad, grad_weight * grad, None, None


def product_dtype(x):
    """The dtype in which matrix products are done here: autocast's when it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class NextToken:
    """Predict the next token: pretraining, SFT and both phases of the VLM."""

    def __call__(self, model, batch):
        """-> (sum of -log p over the batch's targets, {})."""
        hidden = model(batch.tokens, batch.doc_ids)  # (B, T, C)
        chosen = (batch.labels != IGNORE).flatten().nonzero()[:, 0]  # (N,): rows without a target never reach the head
        hidden, labels = hidden.flatten(0, 1)[chosen], batch.labels.flatten()[chosen]
        return LinearCrossEntropy.apply(hidden, model.lm_head.weight, labels, product_dtype(hidden)), {}

    @torch.no_grad()
    def validate(self, model, batch):
        """-> sums: loss and targets, and per language nats and UTF-8 bytes of the targets that stand for text (special tokens have no bytes)."""
        hidden = model(batch.tokens, batch.doc_ids).flatten(0, 1)
        chosen = (batch.labels != IGNORE).flatten().nonzero()[:, 0]
        labels, dtype = batch.labels.flatten()[chosen], product_dtype(hidden)
        weight = model.lm_head.weight.to(dtype)
        nll = torch.cat([chunk_nll(hidden[part].to(dtype), weight, batch.labels.flatten()[part])[0] for part in chosen.split(CHUNK)])
        sums = {"loss": nll.sum(), "targets": torch.tensor(float(len(labels)))}
        sizes, language = batch.label_bytes.flatten()[chosen], batch.language.flatten()[chosen]
        for index, name in enumerate(batch.languages):
            counted = (sizes > 0) & (language == index)
            sums[f"nats_{name}"], sums[f"bytes_{name}"] = nll[counted].sum(), sizes[counted].sum().float()
        return sums

    def summary(self, sums):
        """Sums over all validation batches -> the figures that are printed and logged. bpb: bits per UTF-8 byte of text."""
        figures = {"val_loss": sums["loss"] / max(1, sums["targets"])}
        names = [name[5:] for name in sums if name.startswith("nats_") and sums["bytes_" + name[5:]] > 0]
        bits = {name: sums["nats_" + name] / math.log(2) for name in names}
        if names:
            figures["bpb"] = sum(bits.values()) / sum(sums["bytes_" + name] for name in names)
        if len(names) > 1:
            figures.update({f"bpb_{name}": bits[name] / sums["bytes_" + name] for name in names})
        return figures
