"""The columns of a batch's rollouts as parts of the cache have them: answers, scores, and what they took."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import torch

from latent_tts.engine.cost import Rates, Work
from latent_tts.engine.device import peak_bytes, reset_peak_bytes, synchronized_seconds
from latent_tts.engine.packing import RolloutJob
from latent_tts.engine.rollout import Rollouts
from latent_tts.results.cache import NOT_DECODED, SCORE_SCHEMA

Columns: TypeAlias = dict[str, Any]  # by name: an Arrow array, or one value for all rows


def score_table(batch: Sequence[RolloutJob], columns: Columns) -> pa.Table:
    """The scores of a batch as a part of their cache has them."""
    return batch_table(SCORE_SCHEMA, batch, columns)


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


def least_columns(parts: Sequence[Work], rates: Rates, rows: int) -> Columns:
    """A row's share of a batch's least seconds, and of the bytes that it must read or write."""
    return {"floor_seconds": rates.floor_seconds(parts) / rows, "bytes": sum(work.bytes for work in parts) / rows}
