"""Draws and scores the rollouts that a cache lacks, batch by batch, keeping what is done whenever it is stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from latent_tts.engine.cost import BatchCost, Rates, RolloutCost, Shape, Work
from latent_tts.engine.device import peak_bytes, reset_peak_bytes, synchronized_seconds
from latent_tts.engine.packing import RolloutJob, batches, max_prompts
from latent_tts.engine.rollout import Engine, Rollouts
from latent_tts.engine.scoring import LatentScorer
from latent_tts.errors import RunError
from latent_tts.results.store import NOT_DECODED, PartCache, RolloutCache, ScoreCache, written_in_parts
from latent_tts.sampler import Sampler
from latent_tts.search import Search


def fill(
    cache: RolloutCache,
    jobs: Sequence[RolloutJob],
    engine: Engine,
    search: Search,
    sampler: Sampler,
    *,
    seed: int,
    rows: int,
    rates: Rates,
    progress: Callable[[int], None],
    answers: bool = True,
) -> None:
    """Draw every rollout of `jobs` into `cache`.

    Args:
        cache: where rows go, a part every two seconds and at the end, however it ends.
        jobs: what to draw.
        engine: the loaded model.
        search: which rollouts are grown, without a scorer.
        sampler: what makes rollouts differ.
        seed: of the run.
        rows: most rows of a batch.
        rates: of the device.
        progress: called with the number of rollouts of each finished batch.
        answers: whether to decode the answers, or to keep the latents alone.
    """
    packed = batches(jobs, rows, max_prompts(engine.width, engine.device.type))
    _fill(cache, packed, lambda batch: _draw_batch(batch, engine, search, sampler, seed, rates, answers), progress)


def fill_beams(
    cache: RolloutCache,
    jobs: Sequence[RolloutJob],
    grow: Callable[[list[RolloutJob]], Rollouts],
    device: torch.device,
    *,
    rows: int,
    progress: Callable[[int], None],
) -> None:
    """Search every question of `jobs` and put its surviving beams into `cache`.

    Args:
        cache: where rows go, a part every two seconds and at the end, however it ends.
        jobs: what to search; the rollouts of a job are the places of its beams, best first.
        grow: the search, from a batch to the surviving beams of each question, question-major.
        device: where it runs.
        rows: most beams of a batch.
        progress: called with the number of beams of each finished batch.
    """

    def work(batch: list[RolloutJob]) -> list[dict[str, Any]]:
        started = _begin(device)
        rollouts = grow(batch)
        return _rows(batch, rollouts, _measured(started, device, len(rollouts.steps_R)), answers=True)

    _fill(cache, batches(jobs, rows), work, progress)


def _fill(
    cache: PartCache,
    packed: Iterable[list[RolloutJob]],
    work: Callable[[list[RolloutJob]], list[dict[str, Any]]],
    progress: Callable[[int], None],
) -> None:
    with written_in_parts(cache.add) as take:
        for batch in packed:
            take(work(batch))
            progress(sum(len(job.rollouts) for job in batch))


def _draw_batch(
    batch: list[RolloutJob],
    engine: Engine,
    search: Search,
    sampler: Sampler,
    seed: int,
    rates: Rates,
    answers: bool,
) -> list[dict[str, Any]]:
    started = _begin(engine.device)
    rollouts = search.roll(engine, batch, sampler, seed, answers=answers)
    rows = len(rollouts.answer_ids)
    measured = _measured(started, engine.device, rows)
    plan, begun = engine.plan, len(engine.plan.forced_ids)
    passes = RolloutCost.of(
        Shape.from_config(engine.lm.config.to_dict()),
        plan.latents,
        len(plan.thinking_end_ids) + begun,
        sampler.random_phases,
        plan.schedule.repeated_passes(plan.latents),
        plan.stop_id is not None,
    )
    least = BatchCost(
        passes=passes,
        item=engine.lm.dtype.itemsize,
        prompts_Q=[len(job.prompt) for job in batch],
        steps_R=rollouts.steps_R.tolist(),
        answers_R=[len(ids) - begun for ids in rollouts.answer_ids] if answers else None,
    )
    if not rollouts.latents_RTD.isfinite().all():
        raise RunError(
            f"drawing rollouts failed: latents of question {batch[0].question_id} or beside it are not finite in "
            f"{str(engine.lm.dtype).removeprefix('torch.')}\nthe weights, a very large sampler.sigma, or float16, "
            "whose range is small (engine.dtype=bfloat16 has that of float32)"
        )
    return _rows(batch, rollouts, measured | _least(least.work(), rates, rows), answers)


def fill_scores(
    cache: ScoreCache,
    jobs: Sequence[RolloutJob],
    scorer: LatentScorer,
    latents: Mapping[tuple[str, int], NDArray[np.float32]],
    *,
    rows: int,
    rates: Rates,
    progress: Callable[[int], None],
) -> None:
    """Score every rollout of `jobs` into `cache`.

    Args:
        cache: where step scores go, a part every two seconds and at the end, however it ends.
        jobs: what to score; a job's rollouts share its position offset.
        scorer: the loaded LatentRM.
        latents: of each (row key, rollout), (steps, D).
        rows: most rows of a batch.
        rates: of the device.
        progress: called with the number of rollouts of each finished batch.
    """
    packed = batches(jobs, rows, max_prompts(scorer.backbone.config.hidden_size, scorer.device.type))
    _fill(cache, packed, lambda batch: _score_batch(batch, scorer, latents, rates), progress)


def _score_batch(
    batch: list[RolloutJob], scorer: LatentScorer, latents: Mapping[tuple[str, int], NDArray[np.float32]], rates: Rates
) -> list[dict[str, Any]]:
    started = _begin(scorer.device)
    places = [(job.row_key, number) for job in batch for number in job.rollouts]
    steps = [len(latents[place]) for place in places]
    width = latents[places[0]].shape[1]
    latents_RTD = torch.zeros(len(places), max(steps), width)
    for row, place in enumerate(places):
        latents_RTD[row, : steps[row]] = torch.tensor(latents[place])
    scores_RT = scorer.score(
        [job.prompt for job in batch],
        latents_RTD,
        steps_R=torch.tensor(steps),
        position_offset_Q=torch.tensor([job.position_offset for job in batch], device=scorer.device),
    ).tolist()
    measured = _measured(started, scorer.device, len(places))
    shape, item = Shape.from_config(scorer.backbone.config.to_dict()), scorer.backbone.dtype.itemsize
    least = shape.scoring_work([len(job.prompt) for job in batch], steps, item)
    cost = {key: measured[key] for key in ("seconds", "peak_memory_bytes")} | _least(least, rates, len(places))
    return [
        {"row_key": row_key, "rollout": number, "step_scores": scores_RT[row][: steps[row]], **cost}
        for row, (row_key, number) in enumerate(places)
    ]


def _measured(started: float, device: torch.device, rows: int) -> dict[str, Any]:
    """A row's share of what a batch took."""
    return {
        "seconds": (synchronized_seconds(device) - started) / rows,
        "peak_memory_bytes": peak_bytes(device),
        "device": device.type,
        "rows": rows,
    }


def _least(stretches: list[Work], rates: Rates, rows: int) -> dict[str, float]:
    """A row's share of what a batch cannot do without."""
    return {"floor_seconds": rates.floor(stretches) / rows, "bytes": sum(work.bytes for work in stretches) / rows}


def _rows(batch: list[RolloutJob], rollouts: Rollouts, measured: dict[str, Any], answers: bool) -> list[dict[str, Any]]:
    latents = rollouts.latents_RTD.numpy().astype("<f4", copy=False)
    logprob, margin = rollouts.answer_logprob_R.tolist(), rollouts.answer_margin_R.tolist()
    stopped, steps = rollouts.stopped_R.tolist(), rollouts.steps_R.tolist()
    places = [(job.row_key, number) for job in batch for number in job.rollouts]
    return [
        {
            "row_key": row_key,
            "rollout": number,
            "answer_ids": rollouts.answer_ids[row],
            "answer_logprob": logprob[row],
            "answer_margin": margin[row],
            "stop_reason": NOT_DECODED if not answers else "eos" if stopped[row] else "length",
            "latent_steps": steps[row],
            "latents": latents[row, : steps[row]].tobytes(),
            **measured,
        }
        for row, (row_key, number) in enumerate(places)
    ]


def _begin(device: torch.device) -> float:
    """Start measuring a batch; returns the time."""
    reset_peak_bytes(device)
    return synchronized_seconds(device)
