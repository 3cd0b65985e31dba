"""The machine: device, threads, precision, memory, each chosen automatically with a reason that is printed.
In: flags of a run. Out: a Device that the loop computes on.
Next: data_prep/captions.py
"""

import os
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from nanomind.parallel import Group


@dataclass(frozen=True)
class Device:
    device: torch.device
    dtype: torch.dtype  # of matrix products
    reasons: str
    rate: float = 0.0  # measured floating-point operations a second of matrix products in `dtype`; 0: not measured

    def autocast(self):
        """A context in which matrix products are done in `dtype`; weights, norms and losses stay fp32."""
        return torch.autocast(self.device.type, dtype=self.dtype) if self.dtype != torch.float32 else nullcontext()


def choose_device(name="auto", precision="auto", threads=0, group=Group()):
    """-> Device, one of those on this computer for each process of `group`. bf16 is used where it is measured (CPU) or known (CUDA) to be fast: a CPU may list AVX512-BF16 and still be slower with it."""
    if name == "auto":
        name = f"cuda:{group.local}" if group.world > 1 and torch.cuda.is_available() else "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() and group.world == 1 else "cpu"
        why = f"{name} (the best there is)"
    else:
        why = f"{name} (as asked)"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as problem:
        raise ValueError(f"--device {name}: {str(problem).splitlines()[0]}; try --device cpu") from None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(threads or max(1, cores // group.local_world))
    why += (f", process {group.rank} of {group.world}" if group.world > 1 else "") + f", {torch.get_num_threads()} threads"
    if device.type == "cuda":
        torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")  # TF32 for what stays in fp32, unless fp32 is asked for
    if precision != "auto":
        return Device(device, torch.bfloat16 if precision == "bf16" else torch.float32, f"{why}, {precision} (as asked)")
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return Device(device, torch.bfloat16 if fast else torch.float32, f"{why}, {'bf16' if fast else 'fp32 (no bf16 in this GPU)'}")
    if device.type != "cpu":
        return Device(device, torch.float32, f"{why}, fp32 (the safe choice on {device.type})")
    rates = product_rates()
    gain = group.total(rates[torch.bfloat16] / rates[torch.float32])[0] / group.world  # all processes must come to the same choice
    dtype = torch.bfloat16 if gain > 1.3 else torch.float32
    return Device(device, dtype, f"{why}, {'bf16' if dtype == torch.bfloat16 else 'fp32'} (bf16 products measured {gain:.1f} times as fast)", rates[dtype])


def product_rates(size=1024, repeats=5):
    """Operations a second of this CPU's fp32 and bf16 matrix products, {dtype: rate}; the best of a few tries of each, about 0.1 s in all."""
    best = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(size, size, dtype=dtype)
        x @ x  # the first product also makes buffers
        times = []
        for _ in range(repeats):
            began = time.perf_counter()
            x @ x
            times.append(time.perf_counter() - began)
        best[dtype] = min(times)
    return {dtype: 2 * size**3 / seconds for dtype, seconds in best.items()}


def reset_peak_memory():
    """Let peak_memory speak of what comes from here on. -> could it? (On Linux; elsewhere a process only knows its largest so far.)"""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # man 5 proc: the largest resident size becomes the present one
    except OSError:
        return False
    return True


def peak_memory(device):
    """Largest memory this process has used, in MB: of the GPU when there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
