"""What differs between CPUs and GPUs: free memory, clocks that wait for the device, peak memory, rates, versions."""

from __future__ import annotations

import ctypes
import gc
import logging
import resource
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import psutil
import torch

from latent_tts.engine.cost import Rates
from latent_tts.errors import require

log = logging.getLogger(__name__)
Job = TypeVar("Job")
Result = TypeVar("Result")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
KEPT_BYTES = 1 << 30
MAPPED_BYTES = 1 << 25  # larger tensors come from the system and go back: others could not use what they leave
NO_MEMORY = ("DefaultCPUAllocator: can't allocate memory", "std::bad_alloc", "could not create a memory")
CPU_PRODUCT_ROWS, GPU_PRODUCT_ROWS = 512, 1 << 19  # of the timed products
GPU_PRODUCT = 1 << 33  # maximum rows * width * width of a GPU's product, so that it has fewer rows from width 128 on
CPU_COPIED, GPU_COPIED = 1 << 25, 1 << 30  # bytes
GPU_CALLS = 20  # timed together, so that launching and waiting hardly count


def is_gpu(device: torch.device | str) -> bool:
    """Whether a device is a GPU."""
    return torch.device(device).type == "cuda"


def resolve_device(key: str, wanted: str) -> str:
    """The torch device that a config key names; `auto` is the first GPU, if there is one, else the CPU.

    Raises:
        UsageError: this machine does not have it.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cpu" or (wanted == "auto" and not count):
        return "cpu"
    index = int(wanted.partition(":")[2] or 0)
    require(key, wanted, index < count, f"this machine has {count} CUDA devices; {key}=cpu works anywhere")
    return f"cuda:{index}"


def free_bytes(device: torch.device | str) -> int:
    """How many bytes can still be allocated."""
    if not is_gpu(device):
        return psutil.virtual_memory().available  # counts the file cache, which the system gives up on demand
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def keep_freed_memory() -> None:
    """Have this process keep what a batch frees for the next one: clean pages cost 8 % of a run's time on a CPU.

    `results.parts.release_memory` gives it back.
    """
    with suppress(OSError, AttributeError):  # not every C library has it
        set_option = ctypes.CDLL(None).mallopt
        set_option(M_TRIM_THRESHOLD, KEPT_BYTES)
        set_option(M_MMAP_THRESHOLD, MAPPED_BYTES)


def device_name(device: torch.device | str) -> str:
    """The kind of a device, as in `NVIDIA H100`, or `cpu`."""
    return torch.cuda.get_device_name(device) if is_gpu(device) else "cpu"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory could not be had: torch's on a GPU, torch's on a CPU, Python's."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in NO_MEMORY)


def compute_in_batches(
    jobs: Sequence[Job],
    compute: Callable[[list[Job]], Result],
    divide: Callable[[Sequence[Job]], Iterable[list[Job]]],
    halve: Callable[[list[Job]], bool],
    device: torch.device | str,
) -> Iterator[Result]:
    """The result of each batch of some jobs; a batch that does not fit memory is computed as smaller ones.

    Args:
        jobs: what to compute.
        compute: computes a batch.
        divide: makes batches of the present size.
        halve: makes the size half that of a batch; returns whether it could.
        device: whose unused memory is given back before the smaller batches.
    """
    left = list(divide(jobs))
    while left:
        try:
            result = compute(left[0])
        except (RuntimeError, MemoryError) as error:
            if not (is_out_of_memory(error) and halve(left[0])):
                raise
            traceback.clear_frames(error.__traceback__)  # they hold the tensors that are to be freed
        else:
            yield result
            del left[0]
            continue
        gc.collect()
        if is_gpu(device):
            torch.cuda.empty_cache()
        left = [piece for batch in left for piece in divide(batch)]


def warn_of_halving(rows: int, device: torch.device | str) -> None:
    """Say that so many rows were too many."""
    log.warning("engine.rows: %d rows do not fit the memory of %s, so batches are halved to %d",
                rows, device_name(device), max(1, rows // 2))  # fmt: skip


def unreturnable_bytes(device: torch.device) -> int:
    """Bytes that torch has taken from a GPU and cannot give back, since they are in use; 0 on a CPU."""
    if not is_gpu(device):
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device)


def synchronized_seconds(device: torch.device) -> float:
    """Seconds of a clock, read once everything queued on a GPU is done."""
    if is_gpu(device):
        torch.cuda.synchronize(device)
    return time.perf_counter()


def reset_peak_bytes(device: torch.device) -> None:
    """Let `peak_bytes` count from now on; on a CPU only Linux can do that."""
    if is_gpu(device):
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int:
    """Most bytes held since `reset_peak_bytes`: on a CPU by the process, on a GPU by torch's allocations."""
    if is_gpu(device):
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def gpu_versions() -> dict[str, str]:
    """The kinds of GPU of this machine and the libraries that compute on them; empty without a GPU."""
    if not torch.cuda.is_available():
        return {}
    kinds = {torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
    return {
        "gpu": ", ".join(sorted(kinds)),
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
    }


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
