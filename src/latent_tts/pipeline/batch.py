"""A batch of rollouts: how many rows it has, its latents scored, and its columns as parts of the cache have them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from latent_tts.engine.cost import PassCost, Rates, Shape
from latent_tts.engine.device import peak_bytes, reset_peak_bytes, synchronized_seconds
from latent_tts.engine.packing import RolloutJob, default_rows, question_ids, require_finite, rows_that_fit
from latent_tts.engine.rollout import Rollouts
from latent_tts.engine.scoring import LatentScorer
from latent_tts.pipeline.keys import score_key
from latent_tts.pipeline.models import open_scorer_of
from latent_tts.pipeline.spec import EngineSettings, RunSpec
from latent_tts.results.cache import MEASURED, NOT_DECODED
from latent_tts.results.files import settings_digest
from latent_tts.results.parts import ragged

log = logging.getLogger(__name__)
Columns: TypeAlias = dict[str, Any]  # by name: an Arrow array, or one value for all rows


def rows_per_batch(engine: EngineSettings, shape: Shape, bytes_per_row: int, device: str, *, own_prompt: bool) -> int:
    """`engine.rows`, or what suits the model's width; fewer where they do not fit memory, the former with a warning."""
    wanted = engine.rows or default_rows(shape.width, device, own_prompt)
    rows = rows_that_fit(wanted, bytes_per_row, device)
    if engine.rows is not None and rows < wanted:
        log.warning("engine.rows: %d rows do not fit half of the free memory, %d do", wanted, rows)
    return rows


def batch_table(schema: pa.Schema, batch: Sequence[RolloutJob], columns: Columns) -> pa.Table:
    """A table of a batch's rows; what `columns` does not have is null."""
    counts = [len(job.rollouts) for job in batch]
    rows = sum(counts)
    places = {
        "row_key": pa.array([job.row_key for job in batch]).take(pa.array(np.repeat(np.arange(len(batch)), counts))),
        "rollout": pa.array(np.concatenate([np.asarray(job.rollouts, dtype=np.int32) for job in batch])),
    }
    arrays = []
    for column_field in schema:
        column: Any = (places | columns).get(column_field.name)
        if not isinstance(column, pa.Array):
            column = pa.repeat(pa.scalar(column, column_field.type), rows)
        arrays.append(column.cast(column_field.type))
    return pa.table(arrays, schema=schema)


def answer_columns(rollouts: Rollouts, *, answers: bool) -> Columns:
    """What a batch's rows say of their answers."""
    stopped = np.where(rollouts.stopped_R.numpy(), "eos", "length")
    return {
        "answer_ids": pa.array(rollouts.answer_ids, pa.list_(pa.int32())),
        "answer_logprob": pa.array(rollouts.answer_logprob_R.float().numpy()),
        "answer_margin": pa.array(rollouts.answer_margin_R.float().numpy()),
        "stop_reason": pa.array(stopped) if answers else NOT_DECODED,
        "latent_steps": pa.array(rollouts.steps_R.numpy()),
        "sweeps": pa.array(rollouts.sweeps_R.numpy()),
        "commits": pa.array(rollouts.commits_R.numpy()),
        "conflicts": pa.array(rollouts.conflicts_R.numpy()),
    }


def begin_measuring(device: torch.device) -> float:
    """When a batch begins; its peak memory is counted from here."""
    reset_peak_bytes(device)
    return synchronized_seconds(device)


def measured_columns(started: float, device: torch.device, rows: int) -> Columns:
    """A row's share of what a batch took; memory is the batch's."""
    seconds = (synchronized_seconds(device) - started) / rows
    return {"seconds": seconds, "peak_memory_bytes": peak_bytes(device), "device": device.type, "rows": rows}


def least_columns(parts: Sequence[PassCost], rates: Rates, rows: int) -> Columns:
    """A row's share of a batch's least seconds, and of the bytes that it must read or write."""
    return {"floor_seconds": rates.floor_seconds(parts) / rows, "bytes": sum(work.bytes for work in parts) / rows}


class BatchScorer:
    """The run's scorer, loaded when it is first needed, over batches of latents."""

    def __init__(self, spec: RunSpec, rates: Rates) -> None:
        self._spec, self._rates = spec, rates
        self._shape = Shape.from_config(spec.given_scorer.sizes)

    @cached_property
    def model(self) -> LatentScorer:
        """The loaded model."""
        return open_scorer_of(self._spec)

    @cached_property
    def digest(self) -> str:
        """What `cache.SCORED_BY` says of its scores."""
        computation = self.model.model.computation
        return settings_digest(score_key(self._spec.given_scorer, self._spec.engine.dtype, self._spec.n, computation))

    def score(self, batch: Sequence[RolloutJob], latents_RTD: Tensor, steps_R: Tensor) -> Columns:
        """The columns `cache.SCORE_FIELDS` of a batch, with its latents (zeros where a row has none).

        Raises:
            RunError: step scores are not finite.
        """
        scorer, steps = self.model, int(steps_R.max())
        started = begin_measuring(scorer.device)
        scores_RT = torch.zeros(len(latents_RTD), 0)  # of rows without latents
        if steps:
            offsets = [job.position_offset for job in batch]
            scores_RT = scorer.score(
                [job.prompt for job in batch],
                latents_RTD[:, :steps],
                steps_R=steps_R,
                position_offset_Q=torch.tensor(offsets, device=scorer.device) if any(offsets) else None,
            ).cpu()
            beyond_RT = torch.arange(steps) >= steps_R[:, None]
            finite_R = (scores_RT.isfinite() | beyond_RT).all(1)
            require_finite("step scores", finite_R, question_ids(batch), scorer.backbone.dtype, "scoring rollouts")
        measured = measured_columns(started, scorer.device, len(latents_RTD))
        prompts = [len(job.prompt) for job in batch]
        least = self._shape.scoring_cost(prompts, steps_R.numpy(), scorer.backbone.dtype.itemsize)
        return {
            "step_scores": ragged(scores_RT.float().numpy(), steps_R.numpy()),
            **{name: measured[name] for name in MEASURED if name in measured},
            **least_columns(least, self._rates, len(latents_RTD)),
        }
