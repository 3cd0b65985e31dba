"""What is minimised: the only place where the stages differ in mathematics.
In: the model and a batch. Out: a SUM over the batch's targets, and metrics that are sums too; the loop divides, once.
Next: nanomind/optim.py
"""

import math

import torch

from nanomind.data import IGNORE

CHUNK = 2048  # rows of the vocabulary head that are computed at a time


def cross_entropy(labels):
    """The rule of next-token prediction for HeadLoss: sum of -log p(label). labels: (N,) without IGNORE."""
    def rule(logits, rows):
        label = labels[rows, None]
        log_z = logits.logsumexp(dim=-1, keepdim=True)
        loss = (log_z - logits.gather(1, label)).sum()
        p = logits.sub_(log_z).exp_()  # in place of the logits
        return loss, p.scatter_add_(1, label, torch.full_like(log_z, -1.0))  # d loss / d logits = p - onehot
    return rule


class HeadLoss(torch.autograd.Function):
    """A loss of logits = hidden @ weight.T that never holds all N x V of them.

    The head of a small model is most of its memory and a good part of its time. Going through the rows in chunks, `rule(logits, rows)` gives
    each chunk's summed loss and its gradient by the logits (n, V), which is used at once for d hidden = grad @ weight and
    d weight = grad^T @ hidden. hidden: (N, C), weight: (V, C). Products in `dtype`, everything else in fp32.
    """

    @staticmethod
    def forward(ctx, hidden, weight, rule, dtype):
        h, w = hidden.to(dtype), weight.to(dtype)
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        total = torch.zeros((), device=hidden.device)
        for start in range(0, len(h), CHUNK):
            rows = slice(start, start + CHUNK)
            loss, grad = rule((h[rows] @ w.T).float(), rows)
            total += loss
            grad = grad.to(dtype)
            grad_hidden[rows] = grad @ w
            grad_weight += grad.T @ h[rows]
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    def backward(ctx, grad):
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad, grad_weight * grad, None, None


@torch.no_grad()
def token_nll(hidden, weight, labels, dtype):
    """-log p(label) of each row, (N,) fp32; no gradient."""
    h, w = hidden.to(dtype), weight.to(dtype)
    return torch.cat([torch.nn.functional.cross_entropy((part @ w.T).float(), label, reduction="none")
                      for part, label in zip(h.split(CHUNK), labels.split(CHUNK))])


def targets(model, batch):
    """Run the model -> hidden states (N, C) and labels (N,) of the batch's targets, and their places in the flattened batch. Rows of tokens
    without a target never reach the head."""
    chosen = (batch.labels != IGNORE).flatten().nonzero()[:, 0]  # (N,)
    return model(batch.tokens, batch.doc_ids).flatten(0, 1)[chosen], batch.labels.flatten()[chosen], chosen


def product_dtype(x):
    """The dtype in which matrix products are done here: autocast's when it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class NextToken:
    """Predict the next token: pretraining, SFT and both phases of the VLM."""

    def __call__(self, model, batch):
        """-> (sum of -log p over the batch's targets, {})."""
        hidden, labels, _ = targets(model, batch)
        return HeadLoss.apply(hidden, model.lm_head.weight, cross_entropy(labels), product_dtype(hidden)), {}

    @torch.no_grad()
    def validate(self, model, batch):
        """-> sums: loss and targets, and per language nats and UTF-8 bytes of the targets that stand for text (special tokens have no bytes)."""
        hidden, labels, chosen = targets(model, batch)
        nll = token_nll(hidden, model.lm_head.weight, labels, product_dtype(hidden))
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
