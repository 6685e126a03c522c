"""Loaded models, kept for the next job of a sweep; the device they are on, and the rows of a batch that fit it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from latent_tts.engine import quantization
from latent_tts.engine.cost import Shape
from latent_tts.engine.packing import default_rows, rows_that_fit
from latent_tts.engine.rollout import RolloutPlan
from latent_tts.errors import bad_value
from latent_tts.model import ModelAdapter
from latent_tts.pipeline.spec import EngineSettings
from latent_tts.schedule import Schedule
from latent_tts.scorer import Scorer
from latent_tts.types import Reasoner, RewardModel

log = logging.getLogger(__name__)
_loaded: dict[str, tuple[tuple[str | None, ...], Any]] = {}


def load_reasoner(adapter: ModelAdapter, engine: EngineSettings, device: str) -> Reasoner:
    """The adapter's model, loaded and quantised; the last one is kept, since the jobs of a sweep mostly share it."""
    key = (type(adapter).__name__, adapter.digest, device, engine.dtype, engine.quantize)

    def load() -> Reasoner:
        reasoner = adapter.load(device=device, dtype=engine.dtype)
        if engine.quantize is not None:
            quantization.quantize(reasoner.lm, engine.quantize)
        return reasoner

    return _keep("model", key, load)


def load_scorer(scorer: Scorer, dtype: str, device: str) -> RewardModel:
    """The scorer's model; the last one is kept."""
    key = (type(scorer).__name__, scorer.digest, device, dtype)
    return _keep("scorer", key, lambda: scorer.load(device=device, dtype=dtype))


def _keep(kind: str, key: tuple[str | None, ...], load: Any) -> Any:
    if kind not in _loaded or _loaded[kind][0] != key:
        _loaded.pop(kind, None)
        _loaded[kind] = key, load()
    return _loaded[kind][1]


def find_device(engine: EngineSettings) -> str:
    """The torch device of `engine.device`.

    Raises:
        UsageError: there is no such device, or it cannot do `engine.quantize`.
    """
    device = _find_device(engine.device)
    if engine.quantize is not None:
        quantization.check_device(engine.quantize, device)
    return device


def _find_device(wanted: str) -> str:
    if wanted == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    if wanted == "cpu":
        return "cpu"
    index = wanted.partition(":")[2]
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(index or 0) >= count:
        raise bad_value(
            "engine.device", wanted, f"this machine has {count} CUDA devices; engine.device=cpu works anywhere"
        )
    return f"cuda:{index or 0}"


def rows_per_batch(engine: EngineSettings, shape: Shape, bytes_per_row: int, device: str, *, own_prompt: bool) -> int:
    """`engine.rows`, or what suits the model's width; fewer, with a warning, where they do not fit memory."""
    wanted = engine.rows or default_rows(shape.width, device, own_prompt)
    rows = rows_that_fit(wanted, bytes_per_row, device)
    if rows < wanted:
        log.warning("engine.rows: %d rows do not fit half of the free memory, %d do", wanted, rows)
    return rows


def rollout_plan(
    adapter: ModelAdapter, max_answer_tokens: int, schedule: Schedule | None = None, forced_ids: Sequence[int] = ()
) -> RolloutPlan:
    """What a rollout of the adapter's model consists of; without a schedule one latent is made after another."""
    plan = RolloutPlan(
        adapter.latents, adapter.thinking_end_ids, adapter.eos_id, max_answer_tokens, adapter.stop_id,
        forced_ids=list(forced_ids), other_eos_ids=adapter.eos_ids[1:],
    )  # fmt: skip
    if schedule is None or schedule.stepwise:
        return plan
    return replace(plan, schedule=schedule, latent_id=adapter.latent_id)
