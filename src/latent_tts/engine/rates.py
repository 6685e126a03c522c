"""The best rates of a device, measured: matrix products and copies."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch

from latent_tts.engine.cost import Rates
from latent_tts.engine.device import is_gpu, synchronized_seconds

CPU_PRODUCT_ROWS, GPU_PRODUCT_ROWS = 512, 1 << 19  # of the timed products
GPU_PRODUCT = 1 << 33  # maximum rows * width * width of a GPU's product, so that it has fewer rows from width 128 on
CPU_COPIED, GPU_COPIED = 1 << 25, 1 << 30  # bytes
GPU_CALLS = 20  # timed together, so that launching and waiting hardly count


@lru_cache(maxsize=8)
def measured_rates(width: int, dtype: str, device: str) -> Rates:
    """The best rates of a device: of a matrix product of a model's width, and of a copy too large for its caches."""
    on_gpu, kind = is_gpu(device), getattr(torch, dtype)
    rows = min(GPU_PRODUCT_ROWS, GPU_PRODUCT // width**2) if on_gpu else CPU_PRODUCT_ROWS
    a = torch.ones(rows, width, dtype=kind, device=device)
    b = torch.ones(width, 4 * width, dtype=kind, device=device)
    source = torch.ones((GPU_COPIED if on_gpu else CPU_COPIED) // 4, device=device)
    target = torch.empty_like(source)
    calls = GPU_CALLS if on_gpu else 1

    def best(call: Callable[[], torch.Tensor]) -> float:
        seconds = []
        for _ in range(5):
            started = synchronized_seconds(source.device)
            for _ in range(calls):
                call()
            seconds.append(synchronized_seconds(source.device) - started)
        return min(seconds) / calls

    product, copy = best(lambda: a @ b), best(lambda: target.copy_(source))
    return Rates(flops=8.0 * rows * width * width / product, bytes=2.0 * source.nbytes / copy)
