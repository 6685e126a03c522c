"""Batches drawn into the cache and scored, with what each took: the part of the pipeline that needs torch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from latent_tts.engine.cost import BatchCost, Rates, Shape, Work
from latent_tts.engine.device import peak_bytes, reset_peak_bytes, synchronized_seconds
from latent_tts.engine.packing import RolloutJob, batches, max_prompts, row_bytes
from latent_tts.engine.rates import measured_rates
from latent_tts.engine.rollout import Engine, Rollouts
from latent_tts.engine.scoring import LatentScorer
from latent_tts.errors import LESS_MEMORY, RunError, computing
from latent_tts.pipeline.models import (
    find_device,
    load_reasoner,
    load_scorer,
    rollout_plan,
    rows_per_batch,
    write_computation,
)
from latent_tts.pipeline.spec import RunSpec, reserved_positions
from latent_tts.results import report
from latent_tts.results.cache import NOT_DECODED, PartCache, RolloutCache, ScoreCache
from latent_tts.results.files import written_in_parts
from latent_tts.types import Reasoner

log = logging.getLogger(__name__)
Row = dict[str, Any]


def load(spec: RunSpec) -> Reasoner:
    """The model of a run, loaded and proven; it is kept for the next call."""
    return load_reasoner(spec.adapter, spec.engine, find_device(spec.engine), longest=spec.longest_sequence)


def draw(spec: RunSpec, cache: RolloutCache, lacking: Mapping[str, list[int]], *, answers: bool = True) -> int:
    """Draw rollouts into a cache; what was drawn before a failure or an interruption is kept.

    Args:
        spec: the run.
        cache: where they go.
        lacking: rollout numbers by row key.
        answers: whether to decode the answers.

    Returns:
        How many rollouts were grown.

    Raises:
        RunError: a failure while drawing.
    """
    device, search, shape = find_device(spec.engine), spec.search, spec.shape
    jobs = [
        RolloutJob(
            row_key=key,
            question_id=question.id,
            prompt=spec.prompts[question.id],
            rollouts=lacking[key],
            donor=spec.prompts[spec.donors[question.id].id] if spec.donors else None,
        )
        for question in spec.questions
        if (key := spec.row_key(question)) in lacking
    ]
    total = sum(len(job.rollouts) for job in jobs)
    own_prompt = "prompt" in spec.sampler.random_phases
    bytes_per_row = _bytes_per_row(spec, max(len(job.prompt) for job in jobs))
    rows = rows_per_batch(spec.engine, shape, bytes_per_row, device, own_prompt=own_prompt)
    rates = measured_rates(shape.width, spec.engine.dtype, device)
    _log_work(spec, jobs, rates, rows, bytes_per_row, answers=answers)
    plan = rollout_plan(spec.adapter, spec.max_answer_tokens, spec.schedule, spec.forced_ids)
    reasoner = load(spec)
    write_computation(cache.folder, reasoner.computation)
    engine = Engine(reasoner, plan)
    sampler = spec.answers.over(spec.sampler)
    scorer, reduction = None, None
    if search.guided:
        assert spec.scorer is not None
        scorer = LatentScorer(load_scorer(spec.scorer, spec.engine.dtype, device, longest=spec.longest_sequence))
        reduction = spec.scorer.reduction

    def draw_batch(batch: list[RolloutJob]) -> list[Row]:
        started = _begin(engine.device)
        rollouts = search.roll(engine, batch, sampler, spec.seed, scorer=scorer, reduction=reduction, answers=answers)
        measured = _measured(started, engine.device, len(rollouts.answer_ids))
        _require_finite(rollouts, batch, engine, answers=answers)
        if not search.guided:  # what a search cannot do without is not counted
            measured |= _least_of_batch(spec, batch, rollouts, engine.lm.dtype.itemsize, rates, answers=answers)
        return _rollout_rows(batch, rollouts, measured, answers=answers)

    # prompts run in batches of their own size, unless each job brings many rows
    prompts = None if search.guided else max_prompts(engine.width, engine.device.type)
    packed = batches(jobs, max(search.survivors or 1, rows // search.rows_per_survivor), prompts)
    with report.progress_bar(total, "rollouts") as bar:
        with computing("drawing rollouts", f"what was drawn is in {cache.folder}", LESS_MEMORY):
            _fill(cache, packed, draw_batch, lambda count: report.advance(bar, count))
    return len(jobs) * spec.n if search.guided else total


def score(
    spec: RunSpec,
    cache: ScoreCache,
    lacking: Mapping[str, list[int]],
    latents: Mapping[tuple[str, int], NDArray[np.float32]],
    offsets: Mapping[tuple[str, int], int],
) -> None:
    """Score rollouts into a cache; what was scored before a failure or an interruption is kept.

    Args:
        spec: the run.
        cache: where step scores go.
        lacking: rollout numbers by row key.
        latents: of each (row key, rollout), (steps, D).
        offsets: what is added to the positions of each (row key, rollout); 0 where it is not named.

    Raises:
        RunError: a failure while scoring.
    """
    scorer = spec.scorer
    assert scorer is not None
    device, dtype = find_device(spec.engine), spec.engine.dtype
    shape = Shape.from_config(scorer.config)
    jobs = []
    for question in spec.questions:
        key = spec.row_key(question)
        by_offset: dict[int, list[int]] = {}
        for number in lacking.get(key, []):
            by_offset.setdefault(offsets.get((key, number), 0), []).append(number)
        prompt = spec.prompts[question.id]
        jobs += [
            RolloutJob(key, question.id, prompt, numbers, position_offset=shift) for shift, numbers in by_offset.items()
        ]
    total = sum(len(job.rollouts) for job in jobs)
    longest, steps = max(len(job.prompt) for job in jobs), max(map(len, latents.values()))
    # a batch may hold one row per prompt
    bytes_per_row = row_bytes(shape, longest, steps, spec.engine.bytes_per_number, own_prompt=True)
    rows = rows_per_batch(spec.engine, shape, bytes_per_row, device, own_prompt=False)
    work = sum(
        shape.prompt_flops(len(job.prompt)) + len(job.rollouts) * shape.scoring_flops(len(job.prompt), steps)
        for job in jobs
    )
    log.info("%d rollouts to score with %s: at most %.3g GFLOP", total, scorer.name, work / 1e9)
    model = LatentScorer(load_scorer(scorer, dtype, device, longest=longest + steps))
    packed = batches(jobs, rows, max_prompts(shape.width, model.device.type))
    with report.progress_bar(total, "scores") as bar:
        with computing("scoring rollouts", f"what was scored is in {cache.folder}", LESS_MEMORY):
            rates = measured_rates(shape.width, dtype, device)
            _fill(
                cache,
                packed,
                lambda batch: _score_batch(batch, model, latents, rates),
                lambda count: report.advance(bar, count),
            )


def _fill(
    cache: PartCache,
    packed: Iterable[list[RolloutJob]],
    work: Callable[[list[RolloutJob]], list[Row]],
    progress: Callable[[int], None],
) -> None:
    """Work on batches one after another; a part is written every two seconds and at the end, however it ends."""
    with written_in_parts(cache.add) as take:
        for batch in packed:
            take(work(batch))
            progress(sum(len(job.rollouts) for job in batch))


def _bytes_per_row(spec: RunSpec, longest: int) -> int:
    """Upper estimate of a row's bytes; a guided search holds the rows of two steps, in the reasoner and the scorer."""
    number, own_prompt = spec.engine.bytes_per_number, "prompt" in spec.sampler.random_phases
    suffix = reserved_positions(spec.adapter, spec.max_answer_tokens)
    own = row_bytes(spec.shape, longest, suffix, number, own_prompt)
    if not spec.search.guided:
        return own
    assert spec.scorer is not None
    scorer = Shape.from_config(spec.scorer.config)
    return 2 * (own + row_bytes(scorer, longest, spec.adapter.latents, number, own_prompt=False))


def _log_work(
    spec: RunSpec, jobs: Sequence[RolloutJob], rates: Rates, rows: int, bytes_per_row: int, *, answers: bool
) -> None:
    """Say how much there is to draw, and what it takes."""
    passes, most = spec.passes, spec.adapter.latents
    chosen = spec.max_answer_tokens - len(spec.forced_ids)

    def flops_per_rollout(prompt: int) -> float:
        return passes.rollout(prompt, most, chosen) if answers else passes.thinking(prompt, most)

    def grown(job: RolloutJob) -> int:
        return spec.n if spec.search.guided else len(job.rollouts)

    work = sum(passes.once(len(job.prompt)) + grown(job) * flops_per_rollout(len(job.prompt)) for job in jobs)
    weights = spec.shape.weight_bytes(spec.engine.bytes_per_number)
    log.info(
        "%d rollouts to draw: at most %.3g GFLOP (every answer as long as allowed), at least %.0f s at the "
        "%.3g GFLOP/s of this device's %s products, about %.2g GB for a batch of %d rows and the weights",
        sum(map(grown, jobs)), work / 1e9, work / rates.flops, rates.flops / 1e9, spec.engine.dtype,
        (rows * bytes_per_row + weights) / 1e9, rows,
    )  # fmt: skip


def _require_finite(rollouts: Rollouts, batch: Sequence[RolloutJob], engine: Engine, *, answers: bool) -> None:
    """Raise RunError unless all latents and log-probabilities are finite."""
    finite_R = rollouts.latents_RTD.flatten(1).isfinite().all(1)
    _require_finite_rows("latents", finite_R, batch, engine.lm.dtype, "drawing rollouts")
    finite_R = rollouts.answer_logprob_R.isfinite() if answers else finite_R
    _require_finite_rows("log-probabilities of answers", finite_R, batch, engine.lm.dtype, "drawing rollouts")


def _require_finite_rows(
    what: str, finite_R: Tensor, batch: Sequence[RolloutJob], dtype: torch.dtype, doing: str
) -> None:
    if finite_R.all():
        return
    owners = [job.question_id for job in batch for _ in job.rollouts]
    first = owners[int(finite_R.int().argmin())]
    raise RunError(
        f"{doing} failed: {what} of question {first} are not finite in {str(dtype).removeprefix('torch.')}\n"
        "the weights, a very large sampler.sigma, or float16, whose range is small (engine.dtype=bfloat16 has that of "
        "float32)"
    )


def _least_of_batch(
    spec: RunSpec, batch: Sequence[RolloutJob], rollouts: Rollouts, item: int, rates: Rates, *, answers: bool
) -> dict[str, float]:
    """A row's share of what drawing a batch cannot do without."""
    begun = len(spec.forced_ids)
    least = BatchCost(
        passes=spec.passes,
        item=item,
        prompts_Q=[len(job.prompt) for job in batch],
        steps_R=rollouts.steps_R.tolist(),
        answers_R=[len(ids) - begun for ids in rollouts.answer_ids] if answers else None,
    )
    return _least(least.work(), rates, len(rollouts.answer_ids))


def _score_batch(
    batch: Sequence[RolloutJob],
    scorer: LatentScorer,
    latents: Mapping[tuple[str, int], NDArray[np.float32]],
    rates: Rates,
) -> list[Row]:
    started = _begin(scorer.device)
    places = [(job.row_key, number) for job in batch for number in job.rollouts]
    steps = [len(latents[place]) for place in places]
    latents_RTD = torch.zeros(len(places), max(steps), latents[places[0]].shape[1])
    for row, place in enumerate(places):
        latents_RTD[row, : steps[row]] = torch.tensor(latents[place])
    offset_Q = torch.tensor([job.position_offset for job in batch], device=scorer.device)
    scores_RT = [[]] * len(places)  # of rows without latents
    if max(steps):
        scored_RT = scorer.score(
            [job.prompt for job in batch],
            latents_RTD,
            steps_R=torch.tensor(steps),
            position_offset_Q=offset_Q if any(job.position_offset for job in batch) else None,
        ).cpu()
        beyond_RT = torch.arange(max(steps)) >= torch.tensor(steps)[:, None]
        finite_R = (scored_RT.isfinite() | beyond_RT).all(1)
        _require_finite_rows("step scores", finite_R, batch, scorer.backbone.dtype, "scoring rollouts")
        scores_RT = scored_RT.tolist()
    measured = _measured(started, scorer.device, len(places))
    shape, item = Shape.from_config(scorer.backbone.config.to_dict()), scorer.backbone.dtype.itemsize
    least = shape.scoring_work([len(job.prompt) for job in batch], steps, item)
    cost = {key: measured[key] for key in ("seconds", "peak_memory_bytes")} | _least(least, rates, len(places))
    return [
        {"row_key": row_key, "rollout": number, "step_scores": scores_RT[row][: steps[row]], **cost}
        for row, (row_key, number) in enumerate(places)
    ]


def _rollout_rows(batch: Sequence[RolloutJob], rollouts: Rollouts, measured: Row, *, answers: bool) -> list[Row]:
    """The cache's rows of a batch."""
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
    """When a batch begins; its peak memory is counted from here."""
    reset_peak_bytes(device)
    return synchronized_seconds(device)


def _measured(started: float, device: torch.device, rows: int) -> Row:
    """A row's share of what a batch took; memory is the batch's."""
    seconds = (synchronized_seconds(device) - started) / rows
    return {"seconds": seconds, "peak_memory_bytes": peak_bytes(device), "device": device.type, "rows": rows}


def _least(stretches: Sequence[Work], rates: Rates, rows: int) -> dict[str, float]:
    """A row's share of what a batch cannot do without."""
    return {"floor_seconds": rates.floor(stretches) / rows, "bytes": sum(work.bytes for work in stretches) / rows}
