"""Which rollouts share a batch: questions with equally many, prompts of similar length, at most `rows` rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from latent_tts.engine.cost import Shape
from latent_tts.engine.device import free_bytes, is_gpu
from latent_tts.errors import RunError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CPU_ROW_VALUES, CUDA_ROW_VALUES = 1 << 19, 1 << 22  # rows * width of a batch: see benchmarks/engine.py
PROMPTS_SHARE = 8  # rows that run whole prompts are an eighth of the others: see docs/tuning.md
MEMORY_SHARE = 0.5


@dataclass(frozen=True)
class RolloutJob:
    """A question that still needs rollouts.

    Attributes:
        row_key: the question's name in the cache.
        question_id: keys its random numbers.
        prompt: token ids.
        rollouts: numbers of the rollouts to draw, ascending.
        donor: prompt of the question whose latents it uses, for the sampler that needs one.
        position_offset: added to the position ids, for scores as the official script makes them.
    """

    row_key: str
    question_id: str
    prompt: list[int]
    rollouts: Sequence[int]
    donor: list[int] | None = None
    position_offset: int = 0


def question_ids(batch: Sequence[RolloutJob]) -> Iterator[str]:
    """The question of each row of a batch."""
    return (job.question_id for job in batch for _ in job.rollouts)


def require_finite(what: str, finite_R: Tensor, ids: Iterable[str], dtype: torch.dtype, doing: str) -> None:
    """Raise RunError unless all rows of a batch are finite; `ids` are those of the rows' questions."""
    if finite_R.all():
        return
    first = list(ids)[int(finite_R.int().argmin())]
    raise RunError(
        f"{doing} failed: {what} of question {first} are not finite in {str(dtype).removeprefix('torch.')}\n"
        "the weights, a very large sampler.sigma, or float16, whose range is small (engine.dtype=bfloat16 has that of "
        "float32)"
    )


def default_rows(width: int, device: str, own_prompt: bool = False) -> int:
    """Rows of a batch, from the model's width, the kind of device and whether each row runs a prompt of its own."""
    values = CUDA_ROW_VALUES if is_gpu(device) else CPU_ROW_VALUES
    rows = max(64, 1 << ((values // width).bit_length() - 1))
    return rows // PROMPTS_SHARE if own_prompt else rows


def max_prompts(width: int, device: str) -> int:
    """How many prompts run at once at most."""
    return default_rows(width, device, own_prompt=True)


def row_bytes(shape: Shape, prompt: int, suffix: int, item: int, own_prompt: bool) -> int:
    """Upper estimate of one row's bytes: keys and values, activations, logits."""
    tokens = suffix + prompt  # in a batch of many questions with one rollout each, every row has its own prefix
    activations = 16 * shape.width * (prompt if own_prompt else 1) * 4
    return shape.cache_bytes(tokens, item) + activations + 3 * 4 * shape.vocabulary


def rows_that_fit(rows: int, bytes_per_row: int, device: str) -> int:
    """`rows`, halved until a batch fits half of the free memory."""
    free = free_bytes(device)
    while rows > 1 and rows * bytes_per_row > MEMORY_SHARE * free:
        rows //= 2
    return rows


def batches(jobs: Sequence[RolloutJob], rows: int, prompts: int | None = None) -> Iterator[list[RolloutJob]]:
    """Batches of jobs with equally many rollouts each, longest prompts first, so that what does not fit fails at once.

    Args:
        jobs: in any order.
        rows: maximum rollouts per batch.
        prompts: maximum jobs per batch; None for `rows`.
    """
    max_jobs = rows if prompts is None else prompts
    pieces = [
        replace(job, rollouts=job.rollouts[start : start + rows])
        for job in jobs
        for start in range(0, len(job.rollouts), rows)
    ]
    pieces.sort(key=lambda job: (-len(job.rollouts), -len(job.prompt), job.row_key))
    batch: list[RolloutJob] = []
    for piece in pieces:
        count = len(piece.rollouts)
        if batch and (count != len(batch[0].rollouts) or (len(batch) + 1) * count > rows or len(batch) == max_jobs):
            yield batch
            batch = []
        batch.append(piece)
    if batch:
        yield batch
