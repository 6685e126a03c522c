"""What differs between devices, on a CPU."""

import mmap
import subprocess
import sys

import pytest
import torch

from latent_tts.engine.device import free_bytes, is_gpu, peak_bytes, reset_peak_bytes

CPU = torch.device("cpu")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forgets a peak")
def test_a_peak_of_memory_can_be_reset():
    block = mmap.mmap(-1, 1 << 27)  # never kept by the allocator
    block.write(bytes([1]) * len(block))
    high = peak_bytes(CPU)
    assert high >= len(block)
    del block
    reset_peak_bytes(CPU)
    assert peak_bytes(CPU) <= high - (1 << 26)


def test_a_cpu_has_the_free_memory_of_the_system(monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 12345})())
    assert free_bytes("cpu") == 12345


KEPT = """
import numpy as np, psutil
from latent_tts.engine.device import keep_freed_memory
from latent_tts.results.parts import release_memory

def own_bytes():
    memory = psutil.Process().memory_info()
    return memory.rss - memory.shared  # pages of files come and go

def held_bytes():
    return own_bytes() - before

keep_freed_memory()
before = own_bytes()
pieces = [np.ones(1 << 23, dtype=np.uint8) for _ in range(16)]
del pieces
assert held_bytes() > 15 << 23, held_bytes()
release_memory()
assert held_bytes() < 2 << 23, held_bytes()
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_freed_memory_is_kept_until_it_is_released():
    done = subprocess.run([sys.executable, "-c", KEPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("device", "gpu"), [("cpu", False), ("cuda", True), ("cuda:3", True)])
def test_which_devices_are_gpus(device, gpu):
    assert is_gpu(device) == gpu
    assert is_gpu(torch.device(device)) == gpu
