"""Several processes that train one model, each on its share of every step's rows: torchrun --nproc_per_node 2 -- train.py ...
In: the environment torchrun sets. Out: a Group: which process this is, sums over all of them, gradients summed during the backward pass.
Next: nanomind/device.py

Every process holds the whole model (or, with --shard, its part of every weight) and takes every world-th micro-batch. What the loop adds up
(losses, targets, gradients) is added up over the processes too and divided once, so N processes and one process with the same rows per step take
the same step.
"""

import os
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

LONGEST_WAIT = timedelta(hours=12)  # the first process may prepare data or evaluate while the others wait


@dataclass(frozen=True)
class Group:
    """rank: which process this is, from 0; world: how many there are; local: which one on this computer, of how many."""
    rank: int = 0
    world: int = 1
    local: int = 0
    local_world: int = 1

    def total(self, *values):
        """Each number summed over all processes (fp64, so that counts are exact)."""
        if self.world == 1:
            return values
        numbers = torch.tensor([float(value) for value in values], dtype=torch.float64,
                               device="cuda" if dist.get_backend() == "nccl" else "cpu")
        with self.together():
            dist.all_reduce(numbers)
        return numbers.tolist()

    @contextmanager
    def first(self):
        """The first process does the body while the others wait; then they do it too, and find what it has written."""
        if self.rank:
            self.total(0)
        yield
        if not self.rank:
            self.total(0)

    @contextmanager
    def together(self):
        """What fails when another process is gone, said in one line."""
        try:
            yield
        except RuntimeError as problem:
            if self.world == 1 or not (isinstance(problem, dist.DistError) or "gloo" in str(problem)):  # a full memory, say, is something else
                raise
            raise ValueError(f"process {self.rank} of {self.world}: another process of this run has ended ({str(problem).splitlines()[0].split('] ')[-1][:80]}); "
                             "the last save is whole, go on from it with --resume") from None

    def summing(self, model, last):
        """A context for the backward pass of a micro-batch. In that of the `last` one of a step gradients are summed over all processes, each
        as soon as it is finished, while earlier layers are still computed."""
        if is_sharded(model):
            model.set_requires_gradient_sync(last)
            return nullcontext()
        return Summing([p for p in model.parameters() if p.requires_grad]) if last and self.world > 1 else nullcontext()


class Summing:
    """Sums go out in one fixed order, last layer first, whatever order a process finishes its gradients in: all must send the same one at a
    time. A parameter that got no gradient here (its rows had no image, say) takes part with zeros."""

    def __init__(self, params):
        self.waiting, self.ready, self.under_way = params, set(), []

    def __enter__(self):
        self.hooks = [p.register_post_accumulate_grad_hook(self.finished) for p in self.waiting]

    def finished(self, p):
        self.ready.add(p)
        while self.waiting and self.waiting[-1] in self.ready:
            self.send()

    def send(self):
        p = self.waiting.pop()
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        self.under_way.append(dist.all_reduce(p.grad, async_op=True))

    def __exit__(self, kind, problem, trace):
        for hook in self.hooks:
            hook.remove()
        if kind is None:
            while self.waiting:
                self.send()
            for work in self.under_way:
                work.wait()


def is_sharded(model):
    return hasattr(model, "set_requires_gradient_sync")


def shard(model, device):
    """Leave each process its part of every weight, gradient and moment (FSDP2, torch's version of ZeRO-3, arXiv:1910.02054). A layer's weights are
    gathered when it is computed and let go of behind it; those outside the layers, the head's among them, stay gathered from the forward to the
    backward pass, so the loss reads `lm_head.weight` as always. Gradients arrive as sums (torch would make them means). -> the same model."""
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, fully_shard
        FSDPModule.set_force_sum_reduction_for_comms
    except (ImportError, AttributeError):
        raise ValueError(f"--shard: torch {torch.__version__} cannot do it, 2.9 or later can") from None
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for part in (*model.model.layers, model):
        fully_shard(part, mesh=mesh, reshard_after_forward=part is not model)
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
    return model


@contextmanager
def gathered(model):
    """In the body every process has all weights of a sharded model, and none needs the others to compute."""
    parts = (*model.model.layers, model) if is_sharded(model) else ()
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    yield
    for part in parts:
        part.reshard()
        part.set_reshard_after_forward(part is not model, recurse=False)


def join(device="auto"):
    """-> the Group of this process: that of torchrun's environment, or a group of one. device: as --device says it."""
    if "LOCAL_RANK" not in os.environ:
        return Group()
    group = Group(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")))
    gpus = torch.cuda.device_count() if device in ("auto", "cuda") else 0
    if group.world > 1 and device not in ("auto", "cuda", "cpu"):
        raise ValueError(f"--device {device}: each of {group.world} processes takes a device of its own; leave out --device, or give cuda or cpu")
    if gpus and group.local_world > gpus:
        raise ValueError(f"{group.local_world} processes on this computer, but {gpus} GPUs: --nproc_per_node {gpus}, or --device cpu")
    if group.world > 1 and not dist.is_initialized():
        if gpus:
            torch.cuda.set_device(group.local)
        dist.init_process_group("nccl" if gpus else "gloo", timeout=LONGEST_WAIT)
    return group


def leave():
    """Say goodbye to the others."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
