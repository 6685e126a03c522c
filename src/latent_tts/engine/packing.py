"""Which rollouts share a batch: like counts and like prompt lengths together, at most `rows` rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import psutil
import torch

from latent_tts.cost import Rates, Shape

CPU_ROW_VALUES, CUDA_ROW_VALUES = 1 << 19, 1 << 22  # rows * width of a batch: see benchmarks/engine.py
PROMPTS_SHARE = 8  # rows that run whole prompts are an eighth of the others: see docs/tuning.md
MEMORY_SHARE = 0.5
COPIED = 1 << 25  # bytes


@dataclass(frozen=True)
class Job:
    """A question that still needs rollouts.

    Attributes:
        row_key: what the cache calls the question.
        question_id: keys its random numbers.
        prompt: token ids.
        rollouts: numbers of the rollouts to draw, ascending.
        donor: prompt of the question whose latents it reads, for the sampler that needs one.
        shift: added to the position ids, for scores as the official script makes them.
    """

    row_key: str
    question_id: str
    prompt: list[int]
    rollouts: list[int]
    donor: list[int] | None = None
    shift: int = 0


def default_rows(width: int, device: str, own_prompt: bool = False) -> int:
    """Rows of a batch, from the model's width, the kind of device and whether each row runs a prompt of its own."""
    values = CUDA_ROW_VALUES if device.startswith("cuda") else CPU_ROW_VALUES
    rows = max(64, 1 << ((values // width).bit_length() - 1))
    return rows // PROMPTS_SHARE if own_prompt else rows


def most_prompts(width: int, device: str) -> int:
    """Most prompts that run at once."""
    return default_rows(width, device, own_prompt=True)


def row_bytes(shape: Shape, prompt: int, suffix: int, item: int, own_prompt: bool) -> int:
    """Upper estimate of one row's bytes: keys and values, activations, logits."""
    tokens = suffix + prompt  # a batch of many questions with one rollout each has a prefix a row
    activations = 16 * shape.width * (prompt if own_prompt else 1) * 4
    return shape.cache_bytes(tokens, item) + activations + 3 * 4 * shape.vocabulary


def rows_that_fit(rows: int, bytes_a_row: int, device: str) -> int:
    """`rows`, halved until a batch fits half of the free memory."""
    # what the system keeps of files in memory makes way, so it counts as free
    on_gpu = device.startswith("cuda")
    free = torch.cuda.mem_get_info(device)[0] if on_gpu else psutil.virtual_memory().available
    while rows > 1 and rows * bytes_a_row > MEMORY_SHARE * free:
        rows //= 2
    return rows


def batches(jobs: Sequence[Job], rows: int, prompts: int | None = None) -> Iterator[list[Job]]:
    """Batches of jobs with equally many rollouts each, longest prompts first (what does not fit fails at once).

    Args:
        jobs: in any order.
        rows: most rollouts of a batch.
        prompts: most jobs of a batch; None for as many as there are rows.
    """
    most = rows if prompts is None else prompts
    pieces = [
        replace(job, rollouts=job.rollouts[start : start + rows])
        for job in jobs
        for start in range(0, len(job.rollouts), rows)
    ]
    pieces.sort(key=lambda job: (-len(job.rollouts), -len(job.prompt), job.row_key))
    batch: list[Job] = []
    for piece in pieces:
        count = len(piece.rollouts)
        if batch and (count != len(batch[0].rollouts) or (len(batch) + 1) * count > rows or len(batch) == most):
            yield batch
            batch = []
        batch.append(piece)
    if batch:
        yield batch


@lru_cache(maxsize=8)
def measured_rates(width: int, dtype: str, device: str) -> Rates:
    """What the device does at best: a matrix product of a model's width, and a copy too large for small caches."""
    kind = getattr(torch, dtype)
    a = torch.ones(512, width, dtype=kind, device=device)
    b = torch.ones(width, 4 * width, dtype=kind, device=device)
    source = torch.ones(COPIED // 4, device=device)
    target = torch.empty_like(source)

    def best(call: Callable[[], torch.Tensor]) -> float:
        seconds = []
        for _ in range(5):
            started = time.perf_counter()
            float(call().flatten()[0])  # reading a value waits for the device
            seconds.append(time.perf_counter() - started)
        return min(seconds)

    product, copy = best(lambda: a @ b), best(lambda: target.copy_(source))
    return Rates(flops=8.0 * 512 * width * width / product, bytes=2.0 * COPIED / copy)
