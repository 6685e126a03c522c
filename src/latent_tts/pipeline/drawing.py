"""Drawing what the cache lacks: which device, how many rows, what it will cost; the loaded models are kept."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pandas as pd
from omegaconf import DictConfig

from latent_tts.engine.cost import Shape
from latent_tts.errors import FEWER_ROWS, bad_value, computing
from latent_tts.model import ModelAdapter
from latent_tts.pipeline.spec import ITEM_BYTES, Prepared, positions_beside_the_prompt
from latent_tts.results import report, store
from latent_tts.schedule import Schedule
from latent_tts.scorer import Scorer
from latent_tts.types import Reasoner, RewardModel

if TYPE_CHECKING:
    from latent_tts.engine.rollout import RolloutPlan

log = logging.getLogger(__name__)


def draw_missing(
    cfg: DictConfig, prepared: Prepared, cache: store.RolloutCache, wanted: pd.DataFrame, *, answers: bool = True
) -> int:
    """Draw what the cache lacks, with or without answers; returns how many rollouts were drawn.

    The model is loaded only if there is something to draw.
    """
    lacking = missing(cache, wanted, "in")
    total = sum(map(len, lacking.values()))
    if not total:
        return 0
    from latent_tts.engine.packing import RolloutJob, measured_rates, row_bytes
    from latent_tts.engine.rollout import Engine
    from latent_tts.pipeline import executor

    device = engine_device(cfg)
    shape, adapter = prepared.shape, prepared.adapter
    jobs = [
        RolloutJob(
            row_key=key,
            question_id=question.id,
            prompt=prepared.prompts[question.id],
            rollouts=lacking[key],
            donor=prepared.prompts[prepared.donors[question.id].id] if prepared.donors else None,
        )
        for question in prepared.questions
        if (key := prepared.row_key(question)) in lacking
    ]
    own_prompt = "prompt" in prepared.sampler.random_phases
    chosen = cfg.max_answer_tokens - len(prepared.forced_ids)
    suffix = positions_beside_the_prompt(adapter, cfg.max_answer_tokens)
    longest = max(len(job.prompt) for job in jobs)
    bytes_per_row = row_bytes(shape, longest, suffix, ITEM_BYTES[cfg.engine.dtype], own_prompt)
    rows = rows_of_a_batch(cfg, shape, bytes_per_row, device, own_prompt)

    def each(prompt: int) -> float:
        passes, most = prepared.passes, adapter.latents
        return passes.rollout(prompt, most, chosen) if answers else passes.thinking(prompt, most)

    work = sum(prepared.passes.once(len(job.prompt)) + len(job.rollouts) * each(len(job.prompt)) for job in jobs)
    rates = measured_rates(shape.width, cfg.engine.dtype, device)
    log.info(
        "%d rollouts to draw: at most %.3g GFLOP (every answer as long as allowed), at least %.0f s at the "
        "%.3g GFLOP/s of this device's %s products, about %.2g GB for a batch of %d rows and the weights",
        total, work / 1e9, work / rates.flops, rates.flops / 1e9, cfg.engine.dtype,
        (rows * bytes_per_row + shape.weight_bytes(ITEM_BYTES[cfg.engine.dtype])) / 1e9, rows,
    )  # fmt: skip
    plan = plan_of(adapter, cfg.max_answer_tokens, prepared.schedule, prepared.forced_ids)
    engine = Engine(load_once(adapter, device, cfg), plan)
    with report.progress_bar(total, "rollouts") as bar:
        with computing("drawing rollouts", f"what was drawn is in {cache.folder}", FEWER_ROWS):
            executor.fill(
                cache,
                jobs,
                engine,
                prepared.search,
                prepared.answers.over(prepared.sampler),
                seed=cfg.seed,
                rows=rows,
                rates=rates,
                progress=lambda k: report.advance(bar, k),
                answers=answers,
            )
    return total


def search_missing(cfg: DictConfig, prepared: Prepared, cache: store.RolloutCache, wanted: pd.DataFrame) -> int:
    """Search the questions whose beams the cache lacks; returns how many rollouts were grown."""
    lacking = missing(cache, wanted, "in")
    if not lacking:
        return 0
    from latent_tts.engine.packing import RolloutJob, row_bytes
    from latent_tts.engine.rollout import Engine
    from latent_tts.engine.scoring import LatentScorer
    from latent_tts.pipeline import executor

    search, scorer, adapter = prepared.search, prepared.scorer, prepared.adapter
    assert search.survivors is not None
    assert scorer is not None
    device = engine_device(cfg)
    jobs = [
        RolloutJob(question.id, question.id, prepared.prompts[question.id], list(range(search.survivors)))
        for question in prepared.questions
        if question.id in lacking
    ]
    longest, item = max(len(job.prompt) for job in jobs), ITEM_BYTES[cfg.engine.dtype]
    own_prompt = "prompt" in prepared.sampler.random_phases
    suffix = positions_beside_the_prompt(adapter, cfg.max_answer_tokens)
    # a step's rows are there beside those that they were forked from, in the reasoner as in the scorer
    bytes_per_row = 2 * row_bytes(prepared.shape, longest, suffix, item, own_prompt)
    bytes_per_row += 2 * row_bytes(Shape.from_config(scorer.config), longest, adapter.latents, item, own_prompt=False)
    rows = rows_of_a_batch(cfg, prepared.shape, bytes_per_row, device, own_prompt)
    beams, candidates = search.survivors, search.rows_per_survivor
    log.info("%d questions to search: %d beams of %d candidates each", len(jobs), beams, candidates)
    plan = plan_of(adapter, cfg.max_answer_tokens, forced_ids=prepared.forced_ids)
    engine = Engine(load_once(adapter, device, cfg), plan)
    sampler = prepared.answers.over(prepared.sampler)
    judge = LatentScorer(load_scorer_once(scorer, device, cfg.engine.dtype))
    with report.progress_bar(len(jobs) * beams, "beams") as bar:
        with computing("searching", f"finished questions are in {cache.folder}", FEWER_ROWS):
            executor.fill_beams(
                cache,
                jobs,
                lambda batch: search.roll(engine, batch, sampler, cfg.seed, scorer=judge, reduction=scorer.reduction),
                engine.device,
                rows=max(beams, rows // candidates),
                progress=lambda k: report.advance(bar, k),
            )
    return len(jobs) * prepared.n


def rows_of_a_batch(cfg: DictConfig, shape: Shape, bytes_per_row: int, device: str, own_prompt: bool) -> int:
    """Rows of a batch: `engine.rows`, or what suits the model's width; fewer, and said, if they do not fit memory."""
    from latent_tts.engine.packing import default_rows, rows_that_fit

    wanted = cfg.engine.rows or default_rows(shape.width, device, own_prompt)
    rows = rows_that_fit(wanted, bytes_per_row, device)
    if rows < wanted:
        log.warning("engine.rows: %d rows do not fit half of the free memory, %d do", wanted, rows)
    return rows


def plan_of(
    adapter: ModelAdapter, max_answer_tokens: int, schedule: Schedule | None = None, forced_ids: Sequence[int] = ()
) -> RolloutPlan:
    """What a rollout of the adapter's model consists of; `schedule` is one latent after another unless said."""
    from latent_tts.engine.rollout import RolloutPlan

    plan = RolloutPlan(
        adapter.latents, adapter.thinking_end_ids, adapter.eos_id, max_answer_tokens, adapter.stop_id,
        forced_ids=list(forced_ids),
    )  # fmt: skip
    if schedule is None or schedule.stepwise:
        return plan
    return replace(plan, schedule=schedule, latent_id=adapter.latent_id)


def missing(cache: store.PartCache, wanted: pd.DataFrame, how: str) -> dict[str, list[int]]:
    """Rollout numbers of each row key that a cache lacks; says how many it has (`in` it, or `scored in` it)."""
    present = cache.present()
    lacking: dict[str, list[int]] = {}
    for key, rollout in wanted.itertuples(index=False):
        if (key, rollout) not in present:
            lacking.setdefault(key, []).append(rollout)
    there = len(wanted) - sum(map(len, lacking.values()))
    if there:
        log.info("%d of %d rollouts are %s the cache %s", there, len(wanted), how, cache.folder)
    return lacking


_loaded: dict[str, tuple[tuple[str | None, ...], Any]] = {}


def load_once(adapter: ModelAdapter, device: str, cfg: DictConfig) -> Reasoner:
    """The adapter's model, loaded and quantised; the last one is kept, since the jobs of a sweep mostly share it."""
    return _kept("model", adapter, device, cfg.engine.dtype, cfg.engine.quantize)


def load_scorer_once(scorer: Scorer, device: str, dtype: str) -> RewardModel:
    """The same for a scorer."""
    return _kept("scorer", scorer, device, dtype)


def _kept(kind: str, what: ModelAdapter | Scorer, device: str, dtype: str, quantize: str | None = None) -> Any:
    key = (type(what).__name__, what.digest, device, dtype, quantize)
    if kind not in _loaded or _loaded[kind][0] != key:
        _loaded.pop(kind, None)
        loaded = what.load(device=device, dtype=dtype)
        if quantize is not None and isinstance(loaded, Reasoner):
            from latent_tts.engine import quantization

            quantization.quantize(loaded.lm, quantize)
        _loaded[kind] = key, loaded
    return _loaded[kind][1]


def engine_device(cfg: DictConfig) -> str:
    """The torch device that rollouts are drawn on.

    Raises:
        UsageError: there is no such device, or it cannot do `engine.quantize`.
    """
    device = resolve_device(cfg.engine.device)
    if cfg.engine.quantize is not None:
        from latent_tts.engine import quantization

        quantization.check_device(cfg.engine.quantize, device)
    return device


def resolve_device(wanted: str) -> str:
    """The torch device of `engine.device`, which is one that `check_engine` lets pass.

    Raises:
        UsageError: CUDA is asked for and not there.
    """
    import torch

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
