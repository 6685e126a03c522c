"""Engine settings measured: rollouts per second of each dtype, over rows that double until they no longer help."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from latent_tts.checkpoint.adapter import CheckpointAdapter
from latent_tts.engine.cost import Shape
from latent_tts.engine.packing import RolloutJob, batches, max_prompts, row_bytes, rows_that_fit
from latent_tts.engine.rollout import Engine, Rollouts
from latent_tts.errors import computing
from latent_tts.pipeline.models import find_device, load_reasoner, open_engine, rollout_plan
from latent_tts.pipeline.spec import EngineSettings, reserved_positions
from latent_tts.sampler import Sampler
from latent_tts.search.independent import Independent

log = logging.getLogger(__name__)
MIN_ROWS = 64
MAX_REPEATS = 3
WORSE = 0.9  # a rate below this share of the best ends a dtype


@dataclass(frozen=True)
class Measurement:
    """What was measured of a dtype and a number of rows.

    Attributes:
        dtype, rows: as in `engine`.
        rate: rollouts per second.
        same: share of rollouts with the answer of the first dtype, by the same random numbers; where that had fewer
            rows, the share at its largest.
    """

    dtype: str
    rows: int
    rate: float
    same: float


def measure(
    adapter: CheckpointAdapter,
    sampler: Sampler,
    prompts: Mapping[str, list[int]],
    settings: Sequence[EngineSettings],
    *,
    n: int,
    seed: int,
    max_answer_tokens: int,
    seconds: float,
) -> list[Measurement]:
    """Measure engine settings that differ in their dtype, over rows that double until they no longer help or fit.

    Args:
        adapter: the model.
        sampler: what makes rollouts differ.
        prompts: token ids by question id.
        settings: of each dtype; answers are compared with those of the first.
        n: rollouts of each question.
        seed: of every random number.
        max_answer_tokens: token limit of an answer.
        seconds: most time for measuring, shared by the dtypes; loading is left out.

    Raises:
        UsageError: this machine does not have the device.
        RunError: a failure while drawing.
    """
    device, shape = find_device(settings[0]), Shape.from_config(adapter.sizes)
    suffix = reserved_positions(adapter, max_answer_tokens)
    longest, own_prompt = max(map(len, prompts.values())), "prompt" in sampler.random_phases
    jobs = [RolloutJob(key, key, prompt, list(range(n))) for key, prompt in prompts.items()]
    measurements: list[Measurement] = []
    expected: dict[int, list[list[int]]] = {}  # answers of the first dtype, by rows
    with computing("measuring", "nothing was written"):
        for chosen in settings:
            reasoner = load_reasoner(adapter, chosen, device, longest=longest + suffix)
            engine = open_engine(reasoner, rollout_plan(adapter, max_answer_tokens, adapter.own_schedule), chosen)
            bytes_per_row = row_bytes(shape, longest, suffix, chosen.bytes_per_number, own_prompt)
            deadline, best, same = time.perf_counter() + seconds / len(settings), 0.0, 1.0
            most = max(MIN_ROWS, rows_that_fit(len(jobs) * n, bytes_per_row, device))
            for rows in (MIN_ROWS << doubled for doubled in range((most // MIN_ROWS).bit_length())):
                try:
                    taken, rollouts = _seconds(partial(_draw, engine, jobs, rows, sampler, seed), deadline)
                except torch.OutOfMemoryError:
                    if rows == MIN_ROWS:
                        raise
                    log.info("%s, %d rows: more than the GPU's memory", chosen.dtype, rows)
                    break
                rate = len(rollouts.answer_ids) / taken
                if chosen is settings[0]:
                    expected[rows] = rollouts.answer_ids
                if rows in expected:
                    same = statistics.fmean(
                        ids == other for ids, other in zip(rollouts.answer_ids, expected[rows], strict=True)
                    )
                measurements.append(Measurement(chosen.dtype, rows, rate, same))
                log.info("%s, %d rows: %.0f rollouts/s", chosen.dtype, rows, rate)
                # twice the rows, with a warm-up
                if rate < WORSE * best or time.perf_counter() + 4 * taken > deadline:
                    break
                best = max(best, rate)
    return measurements


def _draw(engine: Engine, jobs: Sequence[RolloutJob], rows: int, sampler: Sampler, seed: int) -> Rollouts:
    """One batch."""
    batch = next(batches(jobs, rows, max_prompts(engine.width, engine.device.type)))
    return Independent().roll(engine, batch, sampler, seed)


def _seconds(draw: Callable[[], Rollouts], deadline: float) -> tuple[float, Rollouts]:
    """Median seconds after a warm-up; of the warm-up itself if there is no time left."""
    taken = []
    while True:
        started = time.perf_counter()
        rollouts = draw()
        taken.append(time.perf_counter() - started)
        if len(taken) > MAX_REPEATS or time.perf_counter() + taken[-1] > deadline:
            return statistics.median(taken[1:] or taken), rollouts
