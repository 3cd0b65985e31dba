"""Optimisers and the learning-rate curve.
In: a model with gradients, a position in the run. Out: changed weights, and state that can be saved and restored by parameter name.
Next: nanomind/checkpoint.py
"""

import torch


def whole(tensor):
    """A tensor of which each process holds a part (--shard) -> all of it; the processes ask together. Any other: itself."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def part_of(p, tensor):
    """All of a tensor, on every process -> the part of it that belongs to this one's part of `p`."""
    if not hasattr(p, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(tensor, p.device_mesh, p.placements, src_data_rank=None)  # None: nothing is sent


def newton_schulz(G, steps=5):
    """Nearly orthogonalise each matrix of G (n, rows, columns): its singular values go to about 1 (0.7 to 1.2), its directions stay.

    Quintic iteration X <- a X + (b A + c A A) X with A = X X^T, coefficients of Keller Jordan's Muon (kellerjordan.github.io/posts/muon).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    X = G.mT if G.size(1) > G.size(2) else G  # the small side first: cheaper products
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(steps):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)  # a X + (b A + c A A) X in two calls, no other pass
    return X.mT if G.size(1) > G.size(2) else X


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, for the matrices inside the layers (Nesterov; decoupled weight decay).

    The update is scaled by 0.2 sqrt(max(rows, columns)) so that its RMS is that of AdamW's and one learning rate fits every shape
    ("Muon is scalable for LLM training", arXiv:2502.16982, eq. 4). Matrices of one shape are stacked and orthogonalised in one batched product.
    """

    def __init__(self, params, lr, momentum, weight_decay, dtype=torch.float32):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.dtype = dtype  # of the orthogonalisation; bf16 is enough where it is faster

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for shape, params in shapes.items():
                updates = torch.empty(len(params), *shape, dtype=self.dtype, device=params[0].device)
                for p, update in zip(params, updates):
                    state = self.state[p]
                    if "momentum" not in state:
                        state["momentum"] = torch.zeros_like(p)
                    state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                    update.copy_(whole(p.grad.lerp(state["momentum"], group["momentum"])))
                updates = newton_schulz(updates).float()
                scale = 0.2 * max(shape) ** 0.5
                for p, update in zip(params, updates):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(part_of(p, update), alpha=-group["lr"] * scale)


class Optimizer:
    """Muon and AdamW, or AdamW alone, over the trainable parameters of a model, addressed by parameter name. `within`: the mark of the names
    of the layers' matrices, which are Muon's."""

    def __init__(self, model, cfg, muon_dtype=torch.float32, within=".layers."):
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.names = {p: name for name, p in named}
        in_layers = [p for name, p in named if p.dim() == 2 and within in name]
        projector = [p for name, p in named if name.startswith("projector.")]
        others = [p for name, p in named if not (p.dim() == 2 and within in name or name.startswith("projector."))]
        muon = cfg.optimizer == "muon"
        groups = [dict(params=[p for p in others if p.dim() >= 2], weight_decay=0.0 if muon else cfg.weight_decay),
                  dict(params=[p for p in others if p.dim() < 2], weight_decay=0.0)]
        if projector:
            groups.append(dict(params=projector, weight_decay=0.0, lr=cfg.projector_lr))
        if not muon:
            groups.append(dict(params=in_layers, weight_decay=cfg.weight_decay))
        groups = [group for group in groups if group["params"]]
        self.parts = [torch.optim.AdamW(groups, lr=cfg.adam_lr if muon else cfg.lr, betas=(cfg.beta1, cfg.beta2), fused=True)] if groups else []
        if muon and in_layers:
            self.parts.append(Muon(in_layers, cfg.lr, cfg.momentum, cfg.weight_decay, muon_dtype))
        self.peaks = [[group["lr"] for group in part.param_groups] for part in self.parts]

    def step(self, scale):
        """One update with every learning rate at `scale` times its peak."""
        for part, peaks in zip(self.parts, self.peaks):
            for group, peak in zip(part.param_groups, peaks):
                group["lr"] = peak * scale
            part.step()
            part.zero_grad(set_to_none=True)

    def tensors(self):
        """The whole state as {"parameter name/slot": tensor}."""
        return {f"{self.names[p]}/{slot}": value for part in self.parts for p, state in part.state.items()
                for slot, value in state.items() if torch.is_tensor(value)}

    def load(self, tensors):
        """Take back what `tensors` returned; the parameters must be the same."""
        by_name = {name: p for p, name in self.names.items()}
        foreign = [key for key in tensors if key.split("/")[0] not in by_name]
        if foreign:
            raise ValueError(f"optimiser state of another model: no parameter {', '.join(foreign[:3])}")
        owner = {p: part for part in self.parts for group in part.param_groups for p in group["params"]}
        for key, value in tensors.items():
            name, slot = key.rsplit("/", 1)
            p = by_name[name]
            value = value.to("cpu" if slot == "step" and p.device.type == "cpu" else p.device)
            owner[p].state[p][slot] = value if slot == "step" else part_of(p, value)


def schedule(begin, end, warmup, decay):
    """Learning rate, as a share of its peak, for a step that spans `begin` to `end` of the run (both in [0, 1]).

    Up in a straight line over the first `warmup` of the run (the step that ends the warm-up is the first at the peak), flat, then down in
    a straight line over the last `decay` of it, never before the warm-up is over; it would be 0 at the step after the last.
    """
    if end < warmup:
        return end / warmup
    turn = max(warmup, 1.0 - decay)
    return 1.0 if begin <= turn else max(0.0, (1.0 - begin) / (1.0 - turn))
