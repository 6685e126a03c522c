"""What is particular to CPUs: machine code, whether there is a compiler for it, torch's own threads to run it; memory.

After each operator torch's OpenMP threads go on spinning for a while; threads of another pool would have to fight them
for the cores. So functions in machine code (`machine_code.py` says how they are made) are run by those very threads.
"""

from __future__ import annotations

import ctypes
import resource
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor


class MachineCode(Protocol):
    """A function of one pointer, to int64 numbers: how many pieces are taken, how many there are, arguments."""

    address: int
    ctypes: Callable[[int], None]


@cache
def has_compiler() -> bool:
    """Whether numba is installed (the extra `fast`)."""
    return find_spec("numba") is not None


def suits_machine_code(tensor: Tensor) -> bool:
    """Whether attention and the LM head run in machine code on tensors like it; float32 gains too little by it."""
    return tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu" and has_compiler()


def run(function: MachineCode, pieces: int, *arguments: Tensor | int) -> None:
    """Let as many threads as torch uses call a function, which takes pieces of the work until none is left.

    One thread alone does it where torch was not built with an OpenMP that understands GNU's calls.

    Args:
        function: what to run.
        pieces: how many there are.
        *arguments: numbers, and contiguous tensors on the CPU, of which the function gets the addresses.
    """
    numbers = [0, pieces]
    for argument in arguments:
        if isinstance(argument, Tensor):
            assert argument.is_contiguous()
            assert argument.device.type == "cpu"
            argument = argument.data_ptr()
        numbers.append(argument)
    packed = (ctypes.c_int64 * len(numbers))(*numbers)
    threads, in_parallel = min(torch.get_num_threads(), pieces), _in_parallel()
    if in_parallel is None or threads <= 1:
        function.ctypes(ctypes.addressof(packed))
    else:
        in_parallel(function.address, ctypes.addressof(packed), threads, 0)


def give_memory_back() -> None:
    """Return memory that is free to the system, as far as the C library can (GNU's), which else keeps much of it."""
    trim = _trim()
    if trim is not None:
        trim(0)


def forget_peak() -> None:
    """Let `peak_bytes` count from now on, where the system can do that (Linux)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """Most bytes that the process has held."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@cache
def _trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, TypeError, AttributeError):
        return None


@cache
def _in_parallel() -> Callable[[int, int, int, int], None] | None:
    """GNU OpenMP's call behind `#pragma omp parallel`, out of the library that torch itself uses."""
    for library in (Path(torch.__file__).parent / "lib").glob("libtorch_global_deps.*"):
        try:
            call = ctypes.CDLL(str(library)).GOMP_parallel
        except (OSError, AttributeError):
            continue
        call.argtypes, call.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
        return call
    return None
