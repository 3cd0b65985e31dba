"""Several processes that train one model, each on its share of every step's rows: torchrun --nproc_per_node 2 -- train.py ...
In: the environment torchrun sets. Out: a Group: which process this is, sums over all of them, gradients summed during the backward pass.
Next: nanomind/device.py

Every process holds the whole model and takes every world-th micro-batch. What the loop adds up (losses, targets, gradients) is added up over
the processes too and divided once, so N processes and one process with the same rows per step take the same step.
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
            raise ValueError(f"process {self.rank} of {self.world}: another process of this run has ended ({str(problem).splitlines()[0][:80]}); "
                             "the last save is whole, go on from it with --resume") from None

    def summing(self, params, last):
        """A context for the backward pass of a micro-batch. In that of the `last` one of a step gradients are summed over all processes, each
        as soon as it is finished, while earlier layers are still computed."""
        return Summing(list(params), self) if last and self.world > 1 else nullcontext()


class Summing:
    """Sums go out in one fixed order, last layer first, whatever order a process finishes its gradients in: all must send the same one at a
    time. A parameter that got no gradient here (its rows had no image, say) takes part with zeros."""

    def __init__(self, params, group):
        self.waiting, self.ready, self.under_way, self.group = params, set(), [], group

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
        with self.group.together():
            self.under_way.append(dist.all_reduce(p.grad, async_op=True))

    def __exit__(self, kind, problem, trace):
        for hook in self.hooks:
            hook.remove()
        if kind is None:
            while self.waiting:
                self.send()
            with self.group.together():
                for work in self.under_way:
                    work.wait()


def join():
    """-> the Group of this process: that of torchrun's environment, or a group of one."""
    if "LOCAL_RANK" not in os.environ:
        return Group()
    group = Group(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")))
    if group.world > 1 and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(group.local)
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=LONGEST_WAIT)
    return group


def leave():
    """Say goodbye to the others."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
