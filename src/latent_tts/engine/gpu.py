"""What is particular to GPUs, as `cpu.py` says for CPUs: exact arithmetic, free memory, clocks that wait; versions."""

from __future__ import annotations

import time

import torch


def is_gpu(device: torch.device | str) -> bool:
    """Whether a device is one."""
    return torch.device(device).type == "cuda"


def free_bytes(device: str) -> int:
    """What can still be allocated; torch gives blocks that it keeps for itself anew."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def now(device: torch.device) -> float:
    """Seconds of a clock, after all that was queued on a GPU."""
    if is_gpu(device):
        torch.cuda.synchronize(device)
    return time.perf_counter()
