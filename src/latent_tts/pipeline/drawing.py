"""Batches drawn and scored into the cache, with what each took: the part of the pipeline that needs torch.

Latents are scored, compared and, if they are to be kept, written right after a batch has made them, and nowhere else.
Whoever needs those of rollouts that are there already has them thought again: the generator is keyed, so they are the
same, and answers are not touched.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property, partial
from itertools import groupby
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from torch import Tensor

from latent_tts.engine.cost import BatchCost, Rates, Shape, Work
from latent_tts.engine.device import peak_bytes, reset_peak_bytes, synchronized_seconds
from latent_tts.engine.diversity import DirectionSums
from latent_tts.engine.draft import load_draft
from latent_tts.engine.packing import RolloutJob, batches, max_prompts, row_bytes
from latent_tts.engine.rates import measured_rates
from latent_tts.engine.rollout import Engine, Rollouts
from latent_tts.engine.scoring import LatentScorer
from latent_tts.errors import LESS_MEMORY, RunError, computing
from latent_tts.pipeline.keys import chosen_by_scores, latents_key, score_key
from latent_tts.pipeline.models import (
    find_device,
    load_reasoner,
    load_scorer,
    open_engine,
    refuse_graphs,
    rollout_plan,
    rows_per_batch,
    write_computation,
)
from latent_tts.pipeline.progress import BatchProgress
from latent_tts.pipeline.spec import RunSpec, reserved_positions
from latent_tts.results import report
from latent_tts.results.cache import (
    MEASURED,
    NOT_DECODED,
    ROLLOUT_SCHEMA,
    SCORE_SCHEMA,
    SCORED_BY,
    SCORING,
    RolloutCache,
    ScoreCache,
)
from latent_tts.results.files import settings_digest
from latent_tts.results.parts import PartWriter, ragged, runs_of
from latent_tts.results.run_folder import LatentsFile
from latent_tts.types import Computation, Reasoner, RewardModel

log = logging.getLogger(__name__)
Columns: TypeAlias = dict[str, Any]  # by name: an Arrow array, or one value for all rows
Place: TypeAlias = tuple[str, int]
_directions = DirectionSums()  # of the questions drawn last, for their next round and the next job of a sweep


def load(spec: RunSpec) -> Reasoner:
    """The model of a run, loaded and proven; it is kept for the next call."""
    return load_reasoner(spec.adapter, spec.engine, find_device(spec.engine), longest=spec.longest_sequence)


def load_scorer_of(spec: RunSpec) -> RewardModel:
    """The scorer of a run, the same way."""
    assert spec.scorer is not None
    longest = max(map(len, spec.prompts.values())) + spec.adapter.latents
    shares = spec.scorer.base_digest == spec.adapter.digest and spec.engine.quantize is None
    base = load(spec) if shares else None
    return load_scorer(spec.scorer, spec.engine.dtype, find_device(spec.engine), longest=longest, base=base)


def find_computations(spec: RunSpec) -> tuple[Computation, Computation | None]:
    """How the models that determine a run's rollouts are computed; see `keys.computations`. Loads them."""
    scoring = load_scorer_of(spec).computation if chosen_by_scores(spec) else None
    return load(spec).computation, scoring


def draw(
    spec: RunSpec,
    cache: RolloutCache,
    lacking: pd.DataFrame,
    *,
    answers: bool = True,
    scored: bool = False,
    dissimilarity: Mapping[Place, np.ndarray] | None = None,
    kept: LatentsFile | None = None,
) -> None:
    """Draw rollouts into a cache; what was drawn before a failure or an interruption is kept.

    Args:
        spec: the run.
        cache: where they go.
        lacking: which ones (columns `row_key`, `rollout`).
        answers: whether to decode the answers.
        scored: whether the run's scorer reads their latents.
        dissimilarity: what `cache.ROLLOUT_FIELDS` says of each, where it is known; else it is computed.
        kept: where latents go; None keeps none.

    Raises:
        RunError: a failure while drawing.
        OSError: the cache cannot be written to.
    """
    jobs = jobs_of(spec, lacking)
    drawer = Drawer(spec, jobs, scored=scored)
    drawer.log_work(jobs, answers=answers)
    write_computation(cache.folder, drawer.engine.reasoner.computation)
    if dissimilarity is None:
        drawer.log_catching_up(jobs)
    total = sum(len(job.rollouts) for job in jobs)
    with report.progress_bar(total, "rollouts") as bar, PartWriter(cache.folder) as writer:
        with computing("drawing rollouts", f"what was drawn is in {cache.folder}", LESS_MEMORY):
            progress = drawer.progress(bar, answers=answers)
            for batch in drawer.batches(jobs):
                if dissimilarity is None:
                    drawer.catch_up(batch)
                with progress.batch(batch):
                    part = drawer.draw(batch, answers=answers, dissimilarity=dissimilarity, kept=kept)
                writer.put(part)


def think_again(
    spec: RunSpec,
    scores: ScoreCache | None,
    unscored: pd.DataFrame,
    offsets: Mapping[Place, int],
    unkept: pd.DataFrame,
    kept: LatentsFile | None,
) -> None:
    """Make the latents of drawn rollouts again, to score or to keep them; answers and recorded scores stay.

    Args:
        spec: the run.
        scores: where step scores go.
        unscored: which rollouts to score (columns `row_key`, `rollout`).
        offsets: what is added to the scorer's positions of each; 0 where it is not named.
        unkept: the rollouts whose latents are to be kept.
        kept: where they go.

    Raises:
        RunError: a failure; what was scored stays in the cache.
        OSError: the cache cannot be written to.
    """
    missing = pd.concat([unscored, unkept]).drop_duplicates().sort_index()
    jobs = shifted_jobs(jobs_of(spec, missing), offsets)
    scored = len(unscored) > 0
    drawer = Drawer(spec, jobs, scored=scored)
    drawer.log_thinking(jobs, "scores" if scored else "latents.safetensors")
    to_score = set(unscored.itertuples(index=False, name=None))
    writer = PartWriter(scores.folder) if scored and scores is not None else None
    with report.progress_bar(len(missing), "rollouts") as bar, writer or nullcontext():
        with computing("thinking again", "what was scored is in the cache", LESS_MEMORY):
            progress = drawer.progress(bar, answers=False)
            for batch in drawer.batches(jobs):
                with progress.batch(batch):
                    thought = drawer.roll(batch, answers=False)
                if kept is not None:
                    kept.put(places_of(batch), to_host(thought.latents_RTD))
                if writer is not None:
                    columns = drawer.scorer.score(batch, thought.latents_RTD, thought.steps_R)
                    writer.put(partial(score_table, batch, columns, to_score))


def score_kept(
    spec: RunSpec,
    scores: ScoreCache,
    lacking: pd.DataFrame,
    offsets: Mapping[Place, int],
    read_latents: Callable[[Sequence[RolloutJob]], tuple[Tensor, Tensor]],
) -> None:
    """Score rollouts whose latents are in a file.

    Args:
        spec: the run.
        scores: where step scores go.
        lacking: which ones to score (columns `row_key`, `rollout`).
        offsets: see `think_again`.
        read_latents: makes the latents (R, T, D) of a batch, zeros where a row has none, and their numbers (R).

    Raises:
        RunError: a failure while scoring; what was scored stays in the cache.
        OSError: the cache cannot be written to.
    """
    jobs, device = shifted_jobs(jobs_of(spec, lacking), offsets), find_device(spec.engine)
    scorer = BatchScorer(spec, device)
    rows = rows_per_batch(spec.engine, scorer.shape, scorer.bytes_per_row(jobs), device, own_prompt=False)
    scorer.log_work(jobs)
    with report.progress_bar(len(lacking), "scores") as bar, PartWriter(scores.folder) as writer:
        with computing("scoring rollouts", f"what was scored is in {scores.folder}", LESS_MEMORY):
            progress = BatchProgress(bar, scorer.model.backbone, scorer.shape, scorer.max_flops)
            for batch in batches(jobs, rows, max_prompts(scorer.shape.width, torch.device(device).type)):
                latents_RTD, steps_R = read_latents(batch)
                with progress.batch(batch):
                    columns = scorer.score(batch, latents_RTD, steps_R)
                writer.put(partial(score_table, batch, columns))


def jobs_of(spec: RunSpec, lacking: pd.DataFrame) -> list[RolloutJob]:
    """Jobs for some rollouts (columns `row_key`, `rollout`), one per run of consecutive numbers of a question."""
    questions = {spec.row_key(question): question for question in spec.questions}
    jobs, whole = [], range(spec.kept)
    runs: Iterable[tuple[str, range]] = runs_of(lacking)
    if spec.search.guided:  # it grows all that it keeps, or none
        runs = dict.fromkeys((key for key, _ in runs), whole).items()
    for key, numbers in runs:
        question = questions[key]
        donor = spec.prompts[spec.donors[question.id].id] if spec.donors else None
        jobs.append(RolloutJob(key, question.id, spec.prompts[question.id], numbers, donor))
    return jobs


def shifted_jobs(jobs: Sequence[RolloutJob], offsets: Mapping[Place, int]) -> list[RolloutJob]:
    """Jobs split by what is added to the positions of their rollouts."""
    if not offsets:
        return list(jobs)
    return [
        replace(job, rollouts=list(numbers), position_offset=shift)
        for job in jobs
        for shift, numbers in groupby(job.rollouts, key=lambda number, job=job: offsets[job.row_key, number])
    ]


def places_of(batch: Sequence[RolloutJob]) -> list[Place]:
    """The (row key, rollout) of each row of a batch."""
    return [(job.row_key, number) for job in batch for number in job.rollouts]


def to_host(latents_RTD: Tensor) -> Tensor:
    """The same latents on the CPU, from a GPU through pinned memory."""
    if not latents_RTD.is_cuda:
        return latents_RTD
    host = torch.empty(latents_RTD.shape, dtype=latents_RTD.dtype, pin_memory=True)
    host.copy_(latents_RTD, non_blocking=True)
    torch.cuda.current_stream(latents_RTD.device).synchronize()
    return host


class Drawer:
    """Rolls batches of a run's rollouts, and scores and compares their latents where they are made."""

    def __init__(self, spec: RunSpec, jobs: Sequence[RolloutJob], *, scored: bool) -> None:
        """Measure the machine; models are loaded when they are first needed.

        Args:
            spec: the run.
            jobs: all that will be rolled.
            scored: whether the run's scorer reads their latents.
        """
        self.spec, self._scored = spec, scored
        self.device = find_device(spec.engine)
        if spec.search.guided:
            refuse_graphs(spec.engine, f"search={spec.search.name} forks its rollouts")
        if not spec.schedule.stepwise:
            refuse_graphs(spec.engine, f"schedule={spec.schedule.name} decides on the way what it computes")
        self.own_prompt = "prompt" in spec.sampler.random_phases
        self.bytes_per_row = self._bytes_per_row(jobs)
        self.rows = rows_per_batch(spec.engine, spec.shape, self.bytes_per_row, self.device, own_prompt=self.own_prompt)
        self.rates = measured_rates(spec.shape.width, spec.engine.dtype, self.device)
        self._sampler = spec.answers.over(spec.sampler)

    @cached_property
    def engine(self) -> Engine:
        """The loaded reasoner."""
        spec = self.spec
        plan = rollout_plan(spec.adapter, spec.max_answer_tokens, spec.schedule, spec.forced_ids)
        reasoner = load(spec)
        draft = None if spec.draft is None else load_draft(spec.draft.path, spec.draft.record, reasoner.lm.device)
        return open_engine(reasoner, plan, spec.engine, draft)

    @cached_property
    def scorer(self) -> BatchScorer:
        """The loaded scorer."""
        return BatchScorer(self.spec, self.device, self.rates)

    @cached_property
    def _latents(self) -> str:
        """What determines the latents of the run."""
        return settings_digest(latents_key(self.spec, *find_computations(self.spec)))

    def batches(self, jobs: Sequence[RolloutJob]) -> Iterator[list[RolloutJob]]:
        """Pack jobs into batches, the runs of a question in order."""
        search = self.spec.search
        # prompts run in batches of their own size, unless each job brings many rows
        prompts = None if search.guided else max_prompts(self.spec.shape.width, torch.device(self.device).type)
        return batches(jobs, max(search.survivors or 1, self.rows // search.rows_per_survivor), prompts)

    def roll(self, batch: Sequence[RolloutJob], *, answers: bool) -> Rollouts:
        """Draw a batch.

        Raises:
            RunError: latents or log-probabilities are not finite.
        """
        spec, scorer, reduction = self.spec, None, None
        if spec.search.guided:
            assert spec.scorer is not None
            scorer, reduction = self.scorer.model, spec.scorer.reduction
        rollouts = spec.search.roll(
            self.engine, batch, self._sampler, spec.seed, scorer=scorer, reduction=reduction, answers=answers
        )
        finite_R = rollouts.latents_RTD.flatten(1).isfinite().all(1)
        _require_finite("latents", finite_R, batch, self.engine.lm.dtype, "drawing rollouts")
        if answers:
            finite_R = rollouts.answer_logprob_R.isfinite()
            _require_finite("log-probabilities of answers", finite_R, batch, self.engine.lm.dtype, "drawing rollouts")
        return rollouts

    def draw(
        self,
        batch: Sequence[RolloutJob],
        *,
        answers: bool,
        dissimilarity: Mapping[Place, np.ndarray] | None,
        kept: LatentsFile | None,
    ) -> Callable[[], pa.Table]:
        """Draw a batch; returns what makes its part of the cache. See `draw` for the arguments."""
        started = _begin(self.engine.device)
        rollouts = self.roll(batch, answers=answers)
        measured = _measured(started, self.engine.device, len(rollouts.answer_ids))
        places, latents_RTD, steps_R = places_of(batch), rollouts.latents_RTD, rollouts.steps_R.numpy()
        rollouts.latents_RTD = latents_RTD[:0]  # the table does not hold them
        scored = self.scorer.score(batch, latents_RTD, rollouts.steps_R) if self._scored else {}
        if dissimilarity is None:
            compared = ragged(_directions.add(self._keys(batch), latents_RTD).numpy(), steps_R)
        else:
            compared = pa.array([dissimilarity[place] for place in places], pa.list_(pa.float32()))
        if kept is not None:
            kept.put(places, to_host(latents_RTD))
        if answers and self.spec.on_answers is not None:
            self.spec.on_answers(places, rollouts.answer_ids)

        def table() -> pa.Table:
            columns = _answer_columns(rollouts, answers=answers) | measured
            if not self.spec.search.guided:  # what a search cannot do without is not counted
                columns |= self._least(batch, rollouts, answers=answers)
            columns["dissimilarity"] = compared
            if scored:
                columns[SCORED_BY] = self.scorer.digest
                columns |= {SCORING + name: column for name, column in scored.items()}
            return _table(ROLLOUT_SCHEMA, batch, columns)

        return table

    def catch_up(self, batch: Sequence[RolloutJob]) -> None:
        """Think the rollouts before a batch again, as far as what is known of them has to be compared with it."""
        if not self.spec.adapter.latents:
            return
        before = self._unknown(batch)
        for earlier in self.batches(before):
            _directions.add(self._keys(earlier), self.roll(earlier, answers=False).latents_RTD)

    def _unknown(self, jobs: Iterable[RolloutJob]) -> list[RolloutJob]:
        """The rollouts that come before those of some jobs and were not compared yet, or are known no more."""
        unknown = []
        for job in jobs:
            key, first = self._key(job), job.rollouts[0]
            known = _directions.counted(key)
            if known > first:
                _directions.forget(key)
                known = 0
            if known < first:
                unknown.append(replace(job, rollouts=range(known, first)))
        return unknown

    def _key(self, job: RolloutJob) -> str:
        return f"{self._latents} {job.row_key}"

    def _keys(self, batch: Sequence[RolloutJob]) -> list[str]:
        return list(map(self._key, batch))

    def _bytes_per_row(self, jobs: Sequence[RolloutJob]) -> int:
        """Upper estimate of a row's bytes; a guided search holds the rows of two steps, in reasoner and scorer."""
        spec, number, longest = self.spec, self.spec.engine.bytes_per_number, max(len(job.prompt) for job in jobs)
        suffix = reserved_positions(spec.adapter, spec.max_answer_tokens)
        own = row_bytes(spec.shape, longest, suffix, number, self.own_prompt)
        if spec.draft is not None:
            own += 4 * longest * spec.shape.width  # its copy of the prompt's states
        if not self._scored and not spec.search.guided:
            return own
        assert spec.scorer is not None
        scorer = Shape.from_config(spec.scorer.sizes)
        scoring = row_bytes(scorer, longest, spec.adapter.latents, number, own_prompt=False)
        return 2 * (own + scoring) if spec.search.guided else max(own, scoring)

    def grown(self, job: RolloutJob) -> int:
        """How many rollouts a job grows; a guided search keeps fewer."""
        return self.spec.n if self.spec.search.guided else len(job.rollouts)

    def max_flops(self, job: RolloutJob, *, answers: bool) -> float:
        """Operations of a job whose answers are as long as allowed."""
        spec, passes, latents, prompt = self.spec, self.spec.passes, self.spec.adapter.latents, len(job.prompt)
        chosen = spec.max_answer_tokens - len(spec.forced_ids)
        per_rollout = (
            passes.rollout_flops(prompt, latents, chosen) if answers else passes.thinking_flops(prompt, latents)
        )
        return passes.shared_flops(prompt) + self.grown(job) * per_rollout

    def progress(self, bar: report.ProgressBar, *, answers: bool) -> BatchProgress:
        """What moves a bar while batches are drawn."""
        return BatchProgress(bar, self.engine.lm.base_model, self.spec.shape, partial(self.max_flops, answers=answers))

    def log_work(self, jobs: Sequence[RolloutJob], *, answers: bool) -> None:
        """Say how much there is to draw and to score, and what it takes."""
        spec, work = self.spec, sum(self.max_flops(job, answers=answers) for job in jobs)
        weights = spec.shape.weight_bytes(spec.engine.bytes_per_number)
        log.info(
            "%d rollouts to draw: at most %.3g GFLOP (every answer as long as allowed), at least %.0f s at the "
            "%.3g GFLOP/s of this device's %s products, about %.2g GB for a batch of %d rows and the weights",
            sum(map(self.grown, jobs)), work / 1e9, work / self.rates.flops, self.rates.flops / 1e9, spec.engine.dtype,
            (self.rows * self.bytes_per_row + weights) / 1e9, self.rows,
        )  # fmt: skip
        if self._scored:
            self.scorer.log_work(jobs)

    def log_catching_up(self, jobs: Sequence[RolloutJob]) -> None:
        """Say how many drawn rollouts have to be thought again, to be compared with those to come."""
        if self.spec.adapter.latents:
            first = [next(same) for _, same in groupby(jobs, key=lambda job: job.row_key)]
            before = self._unknown(first)
            if before:
                self.log_thinking(before, "their distance from the new ones")

    def log_thinking(self, jobs: Sequence[RolloutJob], why: str) -> None:
        """Say that drawn rollouts are thought again, and what it takes."""
        work = sum(self.max_flops(job, answers=False) for job in jobs)
        log.info(
            "latents are not in the cache, so %d rollouts are thought again for %s, answers stay: at most %.3g GFLOP, "
            "at least %.0f s",
            sum(len(job.rollouts) for job in jobs), why, work / 1e9, work / self.rates.flops,
        )  # fmt: skip
        if self._scored:
            self.scorer.log_work(jobs)

    def _least(self, batch: Sequence[RolloutJob], rollouts: Rollouts, *, answers: bool) -> Columns:
        """A row's share of what drawing a batch cannot do without."""
        begun = len(self.spec.forced_ids)
        least = BatchCost(
            passes=self.spec.passes,
            item=self.engine.lm.dtype.itemsize,
            prompts_Q=np.array([len(job.prompt) for job in batch]),
            steps_R=rollouts.steps_R.numpy(),
            answers_R=np.array([len(ids) - begun for ids in rollouts.answer_ids]) if answers else None,
        )
        return _shares(least.work(), self.rates, len(rollouts.answer_ids))


class BatchScorer:
    """The run's scorer, loaded when it is first needed, over batches of latents."""

    def __init__(self, spec: RunSpec, device: str, rates: Rates | None = None) -> None:
        assert spec.scorer is not None
        self._spec, self._scorer, self._device = spec, spec.scorer, device
        self.shape = Shape.from_config(spec.scorer.sizes)
        self.rates = rates or measured_rates(self.shape.width, spec.engine.dtype, device)

    @cached_property
    def model(self) -> LatentScorer:
        """The loaded model."""
        return LatentScorer(load_scorer_of(self._spec))

    @cached_property
    def digest(self) -> str:
        """What `cache.SCORED_BY` says of its scores."""
        computation = self.model.model.computation
        return settings_digest(score_key(self._scorer, self._spec.engine.dtype, self._spec.n, computation))

    def score(self, batch: Sequence[RolloutJob], latents_RTD: Tensor, steps_R: Tensor) -> Columns:
        """The columns `cache.SCORE_FIELDS` of a batch, with its latents (zeros where a row has none).

        Raises:
            RunError: step scores are not finite.
        """
        scorer, steps = self.model, int(steps_R.max())
        started = _begin(scorer.device)
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
            _require_finite("step scores", finite_R, batch, scorer.backbone.dtype, "scoring rollouts")
        measured = _measured(started, scorer.device, len(latents_RTD))
        prompts = [len(job.prompt) for job in batch]
        least = self.shape.scoring_work(prompts, steps_R.numpy(), scorer.backbone.dtype.itemsize)
        columns = {"step_scores": ragged(scores_RT.float().numpy(), steps_R.numpy())}
        columns |= {name: measured[name] for name in MEASURED if name in measured}
        return columns | _shares(least, self.rates, len(latents_RTD))

    def bytes_per_row(self, jobs: Sequence[RolloutJob]) -> int:
        """Upper estimate of a row's bytes; a batch may hold one row per prompt."""
        longest = max(len(job.prompt) for job in jobs)
        number = self._spec.engine.bytes_per_number
        return row_bytes(self.shape, longest, self._spec.adapter.latents, number, own_prompt=True)

    def max_flops(self, job: RolloutJob) -> float:
        """Operations of scoring a job."""
        prompt, latents = len(job.prompt), self._spec.adapter.latents
        return self.shape.prompt_flops(prompt) + len(job.rollouts) * self.shape.scoring_flops(prompt, latents)

    def log_work(self, jobs: Sequence[RolloutJob]) -> None:
        """Say how much there is to score, and what it takes."""
        work = sum(map(self.max_flops, jobs))
        count = sum(len(job.rollouts) for job in jobs)
        log.info("%d rollouts to score with %s: at most %.3g GFLOP", count, self._scorer.name, work / 1e9)


def score_table(batch: Sequence[RolloutJob], columns: Columns, wanted: set[Place] | None = None) -> pa.Table:
    """The scores of a batch as a part of their cache has them, those that are wanted."""
    table = _table(SCORE_SCHEMA, batch, columns)
    return table if wanted is None else table.filter(pa.array([place in wanted for place in places_of(batch)]))


def _table(schema: pa.Schema, batch: Sequence[RolloutJob], columns: Columns) -> pa.Table:
    """A table of a batch's rows; what `columns` does not have is null."""
    counts = [len(job.rollouts) for job in batch]
    rows = sum(counts)
    places = {
        "row_key": pa.array([job.row_key for job in batch]).take(pa.array(np.repeat(np.arange(len(batch)), counts))),
        "rollout": pa.array(np.concatenate([np.asarray(job.rollouts, dtype=np.int32) for job in batch])),
    }
    arrays = []
    for field in schema:
        column: Any = (places | columns).get(field.name)
        if not isinstance(column, pa.Array):
            column = pa.repeat(pa.scalar(column, field.type), rows)
        arrays.append(column.cast(field.type))
    return pa.table(arrays, schema=schema)


def _answer_columns(rollouts: Rollouts, *, answers: bool) -> Columns:
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


def _require_finite(what: str, finite_R: Tensor, batch: Sequence[RolloutJob], dtype: torch.dtype, doing: str) -> None:
    """Raise RunError unless all rows of a batch are finite."""
    if finite_R.all():
        return
    owners = [job.question_id for job in batch for _ in job.rollouts]
    first = owners[int(finite_R.int().argmin())]
    raise RunError(
        f"{doing} failed: {what} of question {first} are not finite in {str(dtype).removeprefix('torch.')}\n"
        "the weights, a very large sampler.sigma, or float16, whose range is small (engine.dtype=bfloat16 has that of "
        "float32)"
    )


def _begin(device: torch.device) -> float:
    """When a batch begins; its peak memory is counted from here."""
    reset_peak_bytes(device)
    return synchronized_seconds(device)


def _measured(started: float, device: torch.device, rows: int) -> Columns:
    """A row's share of what a batch took; memory is the batch's."""
    seconds = (synchronized_seconds(device) - started) / rows
    return {"seconds": seconds, "peak_memory_bytes": peak_bytes(device), "device": device.type, "rows": rows}


def _shares(parts: Sequence[Work], rates: Rates, rows: int) -> Columns:
    """A row's share of a batch's least seconds, and of the bytes that it must read or write."""
    return {"floor_seconds": rates.floor_seconds(parts) / rows, "bytes": sum(work.bytes for work in parts) / rows}
