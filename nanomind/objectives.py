"""What is minimised: the only place where the stages differ in mathematics.
In: the model and a batch. Out: a SUM over the batch's targets, and metrics that are sums too; the loop divides, once.
Next: nanomind/optim.py
"""

import math
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from nanomind.by_hand import product_dtype
from nanomind.data import IGNORE

CHUNK = 2048  # rows of the vocabulary head whose products are computed at a time
BLOCK = 128  # ... and of these, on a CPU, whose softmax is: they stay in its cache meanwhile
ROUND = 128  # ... filled up with zeros to a multiple of this: the number of targets changes from step to step, and the library behind bf16 products
# on a CPU makes and keeps (3 MB) a program for every shape it meets


def filled(x):
    """(n, C) -> (n rounded up, C), zeros behind."""
    return F.pad(x, (0, 0, 0, -len(x) % ROUND))


def log_z(logits, p):
    """log of the sum of exp(logits), (n, 1). The softmax p of the largest logit is exp(largest) / z: no further exponentials are needed."""
    return logits.amax(-1, keepdim=True).sub_(p.amax(-1, keepdim=True).log_())


def cross_entropy(labels, weights=None):
    """The rule of next-token prediction for HeadLoss: sum of -log p(label), times `weights` when given. labels, weights: (N,)."""
    def rule(logits, rows):
        label, p = labels[rows, None], logits.softmax(-1)
        nll = log_z(logits, p).sub_(logits.gather(1, label))
        grad = p.scatter_add_(1, label, torch.full_like(nll, -1.0))  # d nll / d logits = p - onehot
        if weights is None:
            return nll.sum(), grad
        return (nll * weights[rows, None]).sum(), grad.mul_(weights[rows, None])
    return rule


def distillation(labels, teacher_logits, alpha, temperature, sums):
    """The rule of knowledge distillation (arXiv:1503.02531): sum of alpha CE + (1 - alpha) t^2 KL(teacher || student), both distributions at
    temperature t; t^2 keeps the size of its gradient, t (p_student - p_teacher), independent of t. teacher_logits(rows): (n, V) fp32. The two
    parts are added to `sums`."""
    plain = cross_entropy(labels)

    def rule(logits, rows):
        student, teacher = (x if temperature == 1 else x / temperature for x in (logits, teacher_logits(rows)))
        q, p = student.softmax(-1), teacher.softmax(-1)
        kl = (teacher - student).mul_(p).sum() + (log_z(student, q) - log_z(teacher, p)).sum()  # sum of p (log p - log q)
        grad = q.sub_(p).mul_((1 - alpha) * temperature)
        ce, ce_grad = plain(logits, rows)
        sums["ce"] += ce
        sums["kl"] += kl
        return alpha * ce + (1 - alpha) * temperature**2 * kl, grad.add_(ce_grad, alpha=alpha)
    return rule


class HeadLoss(torch.autograd.Function):
    """A loss of logits = hidden @ weight.T that never holds all N x V of them.

    The head of a small model is most of its memory and a good part of its time. Going through the rows in chunks, `rule(logits, rows)` gives
    each chunk's summed loss and its gradient by the logits (n, V), which is used at once for d hidden = grad @ weight and
    d weight = grad^T @ hidden. hidden: (N, C), weight: (V, C). Products in `dtype`, everything else in fp32.
    """

    @staticmethod
    def forward(ctx, hidden, weight, rule, dtype):
        h, w, size = hidden.to(dtype), weight.to(dtype), BLOCK if hidden.device.type == "cpu" else CHUNK
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        total = torch.zeros((), device=hidden.device)
        for start in range(0, len(h), CHUNK):
            rows = slice(start, start + CHUNK)
            part, n = filled(h[rows]), len(h[rows])
            grad = part @ w.T  # logits, which their gradient takes the place of; rows that fill up have none
            for at in range(0, n, size):
                block = slice(at, min(at + size, n))
                loss, grad[block] = rule(grad[block].float(), slice(start + at, start + block.stop))
                total += loss
            grad[n:] = 0
            grad_hidden[rows] = (grad @ w)[:n]
            if grad_weight is not None:
                grad_weight += grad.T @ part
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    def backward(ctx, grad):
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad, None if grad_weight is None else grad_weight * grad, None, None


@torch.no_grad()
def token_nll(hidden, weight, labels, dtype):
    """-log p(label) of each row, (N,) fp32; no gradient."""
    h, w = hidden.to(dtype), weight.to(dtype)
    return torch.cat([F.cross_entropy((filled(part) @ w.T)[:len(part)].float(), label, reduction="none")
                      for part, label in zip(h.split(CHUNK), labels.split(CHUNK))])


def targets(model, batch):
    """Run the model -> hidden states (N, C) and labels (N,) of the batch's targets, and their places in the flattened batch."""
    chosen = (batch.labels != IGNORE).flatten().nonzero()[:, 0]  # (N,)
    return hidden_at(model, batch, chosen), batch.labels.flatten()[chosen], chosen


def hidden_at(model, batch, chosen):
    """Run the model -> hidden states at `chosen` places of the flattened batch, (N, C). Other tokens reach neither the head nor all of the last layer."""
    sight = {} if batch.features is None else {"features": batch.features, "slots": batch.slots}
    if len(chosen) == batch.tokens.numel():
        return model(batch.tokens, batch.doc_ids, **sight).flatten(0, 1)
    return model(batch.tokens, batch.doc_ids, places=F.pad(chosen, (0, -len(chosen) % ROUND)), **sight)[:len(chosen)]


class NextToken:
    """Predict the next token: pretraining, SFT and both phases of the VLM."""

    def __init__(self, run=None):
        pass

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


class Describe(NextToken):
    """Predict the next token of what is said about pictures. Validation asks again with the pictures exchanged: a model that does not look
    does as well with another one's."""

    @torch.no_grad()
    def validate(self, model, batch):
        if batch.features is None or len(batch.features) < 2:
            return super().validate(model, batch)
        hidden, labels, _ = targets(model, replace(batch, features=batch.features.roll(len(batch.features) // 2, 0)))
        nll = token_nll(hidden, model.lm_head.weight, labels, product_dtype(hidden))
        sums = super().validate(model, batch)
        return {**sums, "seen": sums["loss"], "shuffled": nll.sum(), "shuffled_targets": torch.tensor(float(len(labels)))}

    def summary(self, sums):
        """Adds shuffled_loss and image_gain, the share of it that the right pictures save (both over the batches with pictures to exchange)."""
        figures = super().summary(sums)
        if "shuffled" in sums:
            figures["shuffled_loss"] = sums["shuffled"] / sums["shuffled_targets"]
            figures["image_gain"] = 1 - sums["seen"] / sums["shuffled"]
        return figures


class Distill(NextToken):
    """Learn a teacher's whole distribution at the target positions, beside the data's own next token. What the teacher thinks of the training
    data does not change: where its hidden states at the targets fit, they are computed once (`TeacherStates`)."""

    def __init__(self, run):
        self.teacher, self.alpha, self.temperature = run.teacher.eval().requires_grad_(False), run.cfg.alpha, run.cfg.distill_temperature
        self.states = run.states

    def _loss(self, model, batch, kept=None):
        hidden, labels, chosen = targets(model, batch)
        dtype = product_dtype(hidden)
        with torch.no_grad():
            theirs = kept.of(batch, chosen) if kept else hidden_at(self.teacher, batch, chosen).to(dtype)
            weight = self.teacher.lm_head.weight.to(dtype)
        sums = {"ce": 0.0, "kl": 0.0}
        rule = distillation(labels, lambda rows: (filled(theirs[rows]) @ weight.T)[:len(theirs[rows])].float(), self.alpha, self.temperature, sums)
        return HeadLoss.apply(hidden, model.lm_head.weight, rule, dtype), sums

    def __call__(self, model, batch):
        """-> (sum of the mixed loss over the targets, {"ce", "kl"} sums)."""
        return self._loss(model, batch, self.states)

    @torch.no_grad()
    def validate(self, model, batch):
        return {**super().validate(model, batch), "kl": self._loss(model, batch)[1]["kl"]}

    def summary(self, sums):
        return {**super().summary(sums), "kl": sums["kl"] / max(1, sums["targets"])}


class TeacherStates:
    """The teacher's last hidden states at all targets of packed documents, in the order of the documents: (targets, C), in the dtype of the
    head's products."""

    LARGEST = 1e9  # bytes in fp32, half of that where products are bf16: more are computed in every step, as they would be for data that is seen once

    def __init__(self, teacher, rows, machine):
        self.first = torch.from_numpy(np.concatenate(([0], np.cumsum(rows.targets)[:-1])))  # of each document
        self.kept = None
        for batch in rows.every_row("the teacher reads"):
            batch = batch.to(machine.device)
            with machine.autocast(), torch.no_grad():
                found, _, chosen = targets(teacher, batch)
                found = found.to(product_dtype(found))
            if self.kept is None:
                self.kept = torch.zeros(int(rows.targets.sum()), found.size(-1), dtype=found.dtype, device=found.device)
            self.kept[self._index(batch, chosen)] = found

    @classmethod
    def fit(cls, teacher, rows):
        return int(rows.targets.sum()) * teacher.config.hidden_size * 4 <= cls.LARGEST

    def _index(self, batch, chosen):
        """Rows of `kept` of a batch's targets: the targets of a document are all in one row of the batch, in their order."""
        places = batch.places().flatten()[chosen]
        _, counts = places.unique_consecutive(return_counts=True)
        begins = counts.cumsum(0) - counts
        nth = torch.arange(len(places), device=places.device) - begins.repeat_interleave(counts)
        return self.first.to(places.device)[places & 0xFFFFFFFF] + nth

    def of(self, batch, chosen):
        return self.kept[self._index(batch, chosen)]


class DPO:
    """Prefer the chosen answer to the rejected one (arXiv:2305.18290, eq. 7), or IPO (arXiv:2310.12036, eq. 17).

        margin = beta ((log p(chosen) - log ref(chosen)) - (log p(rejected) - log ref(rejected)))        log p: SUM over an answer's tokens
        DPO    -(1 - s) log sigmoid(margin) - s log sigmoid(-margin)           s: label smoothing (conservative DPO)
        IPO    (margin / beta - 1 / (2 beta))^2

    The reference's log-probabilities are numbers, computed once with the weights the run starts from; no second model runs beside the first.
    """

    def __init__(self, run):
        self.beta, self.smoothing, self.kind = run.cfg.beta, run.cfg.label_smoothing, run.cfg.dpo_loss
        self.reference = run.reference  # {"train": (documents,), "val": (documents,)} log-probabilities of the answers

    def loss(self, policy, reference):
        """policy, reference: (pairs, 2) log-probabilities of chosen and rejected -> sum over pairs, and metrics as sums."""
        rewards = self.beta * (policy - reference)
        margin = rewards[:, 0] - rewards[:, 1]
        if self.kind == "ipo":
            loss = (margin / self.beta - 1 / (2 * self.beta)).square()
        else:
            loss = -(1 - self.smoothing) * F.logsigmoid(margin) - self.smoothing * F.logsigmoid(-margin)
        won = (margin > 0).float() + 0.5 * (margin == 0).float()  # a tie, as everywhere before the first step, is half
        metrics = {"accuracy": won.sum(), "preferred": (policy[:, 0] > policy[:, 1]).float().sum(), "margin": margin.sum(),
                   "chosen_reward": rewards[:, 0].sum(), "rejected_reward": rewards[:, 1].sum(), "chosen_logp": policy[:, 0].sum(),
                   "rejected_logp": policy[:, 1].sum(), "kl": (reference - policy).mean(1).sum()}
        return loss.sum(), {name: value.detach() for name, value in metrics.items()}

    @staticmethod
    def answers(batch, nll, chosen):
        """-log p of the N targets -> document numbers and log-probabilities of the answers, (pairs, 2) each (document 2i is chosen, 2i + 1
        rejected), and for each target the place of its answer among them, (N,)."""
        places, index = batch.places().flatten()[chosen].unique(return_inverse=True)
        log_p = torch.zeros(len(places), device=nll.device).index_add_(0, index, -nll)
        return (places & 0xFFFFFFFF).view(-1, 2), log_p.view(-1, 2), index

    def __call__(self, model, batch):
        """-> (sum of the loss over pairs, metrics). The head is walked twice: for the log-probabilities, then, when the loss has said how much
        each answer weighs, for the gradients."""
        hidden, labels, chosen = targets(model, batch)
        dtype, weight = product_dtype(hidden), model.lm_head.weight
        numbers, log_p, place = self.answers(batch, token_nll(hidden, weight, labels, dtype), chosen)
        with torch.enable_grad():
            loss, metrics = self.loss(log_p.requires_grad_(), self.reference["train"].to(log_p.device)[numbers])
            slope, = torch.autograd.grad(loss, log_p)  # d loss / d log p of each answer, (pairs, 2)
        surrogate = HeadLoss.apply(hidden, weight, cross_entropy(labels, -slope.flatten()[place]), dtype)
        return loss.detach() + (surrogate - surrogate.detach()), metrics

    @torch.no_grad()
    def validate(self, model, batch):
        hidden, labels, chosen = targets(model, batch)
        numbers, log_p, _ = self.answers(batch, token_nll(hidden, model.lm_head.weight, labels, product_dtype(hidden)), chosen)
        loss, metrics = self.loss(log_p, self.reference["val"].to(log_p.device)[numbers])
        return {"loss": loss, "targets": torch.tensor(float(len(numbers))), **metrics}

    def summary(self, sums):
        return {"val_loss" if name == "loss" else name: value / max(1, sums["targets"]) for name, value in sums.items() if name != "targets"}


@torch.no_grad()
def reference_log_probs(model, rows, machine):
    """Log-probability of every answer under `model`, (documents,) fp32; nan for documents that are left out. rows: PackedTokens of pairs."""
    found = torch.full((len(rows.starts),), float("nan"))
    for batch in rows.every_row("the reference reads"):
        batch = batch.to(machine.device)
        with machine.autocast():
            hidden, labels, chosen = targets(model, batch)
            numbers, log_p, _ = DPO.answers(batch, token_nll(hidden, model.lm_head.weight, labels, product_dtype(hidden)), chosen)
        found[numbers.cpu()] = log_p.cpu()
    return found
