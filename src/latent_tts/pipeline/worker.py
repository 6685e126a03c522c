"""What a worker does with its share of a run: batches drawn, scored and compared where their latents are made.

Latents are scored, compared and, if they are to be kept, copied right after a batch has made them, and nowhere else.
Latents of rollouts that were drawn earlier are recomputed where they are needed: the random numbers are keyed, so they
are the same. Answers are left alone.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial
from typing import TypeAlias

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from latent_tts.engine.cost import Rates, Shape, batch_costs
from latent_tts.engine.device import (
    compute_in_batches,
    device_name,
    keep_freed_memory,
    measured_rates,
    warn_of_halving,
)
from latent_tts.engine.diversity import DirectionSums
from latent_tts.engine.packing import RolloutJob, batches, max_prompts, question_ids, require_finite, row_bytes
from latent_tts.engine.rollout import Engine, Rollouts
from latent_tts.errors import require
from latent_tts.executor import Work
from latent_tts.pipeline.batch import (
    BatchScorer,
    Columns,
    answer_columns,
    batch_table,
    begin_measuring,
    least_columns,
    measured_columns,
    rows_per_batch,
)
from latent_tts.pipeline.code import DRAWING
from latent_tts.pipeline.keys import latents_key
from latent_tts.pipeline.models import find_device, open_engine_of, refuse_graphs, sampler_of
from latent_tts.pipeline.progress import batch_progress
from latent_tts.pipeline.spec import RunSpec, reserved_positions
from latent_tts.pipeline.worker_checks import work_of
from latent_tts.results import report
from latent_tts.results.cache import ROLLOUT_SCHEMA, SCORE_SCHEMA, SCORED_BY, SCORING
from latent_tts.results.files import settings_digest
from latent_tts.results.parts import ragged, release_memory
from latent_tts.types import Computation

# after so many, what they freed is given back: later ones, of other sizes, do not fit all of it
BATCHES_KEPT = 8

Place: TypeAlias = tuple[str, int]
Sums: TypeAlias = dict[str, tuple[int, Tensor]]  # by row key: see `DirectionSums`


# Messages between driver and worker


@dataclass(frozen=True)
class Request:
    """What a worker computes for the rollouts of a shard.

    Attributes:
        answers: whether answers are decoded.
        scored: whether the run's scorer reads their latents.
        drawn: whether they are new; otherwise latents are recomputed, for scores or to be kept.
        compares: whether they are compared with those before them.
        keeps: whether latents come back.
    """

    answers: bool
    scored: bool
    drawn: bool = True
    compares: bool = False
    keeps: bool = False


@dataclass(frozen=True)
class Shard:
    """Rollouts for a worker.

    Attributes:
        jobs: questions, with a range of rollouts each.
        request: what is computed for them.
        early: row keys of questions whose earlier rollouts other workers draw or have drawn: those of the shard are not
            compared, and their latents come back.
        sums: whether the sums of directions of the other questions come back, for their next rollouts.
        bar: of the driver's process, which a worker in it moves.
    """

    jobs: list[RolloutJob]
    request: Request
    early: frozenset[str] = frozenset()
    sums: bool = False
    bar: report.ProgressBar | None = None


@dataclass(frozen=True)
class Part:
    """A batch of a shard, computed.

    Attributes:
        places: (row key, rollout) of each row.
        make_table: makes what the cache keeps of it; None where nothing is.
        answer_ids: of each row; None where answers were not decoded.
        latents_RTD: on the host, if they are asked for or some rows are early.
        early: see `Shard.early`.
    """

    places: list[Place]
    make_table: Callable[[], pa.Table] | None
    answer_ids: list[list[int]] | None = None
    latents_RTD: Tensor | None = None
    early: frozenset[str] = frozenset()

    def with_table(self, table: pa.Table) -> Part:
        """The same with a table, which can be pickled, instead of a function that makes one."""
        return replace(self, make_table=partial(_same, table))


def _same(table: pa.Table) -> pa.Table:
    return table


@dataclass(frozen=True)
class Computed:
    """What a worker sends back for a shard.

    Attributes:
        parts: its batches.
        sums: of directions, if they are asked for.
        fits: estimated bytes of a batch that fits, by model, dtype and device; empty where none was too large.
    """

    parts: list[Part]
    sums: Sums = field(default_factory=dict)
    fits: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Description:
    """A worker, as it describes itself.

    Attributes:
        name: for people.
        computations: how it computes the reasoner, and the scorer; None where it has none to compute.
        device: that it computes on.
        rows: most rows of a batch.
        bytes_per_row: upper estimate.
        rates: measured, of its device.
    """

    name: str
    computations: tuple[Computation, Computation | None]
    device: str
    rows: int
    bytes_per_row: int
    rates: Rates


def drawing_work(spec: RunSpec, longest: int, *, scored: bool, max_bytes: Mapping[str, int]) -> Work:
    """The work of a run's executor; see `Drawer`. Shards bring their questions to other processes."""
    if not spec.executor.in_process:
        prompt = max(spec.prompts.items(), key=lambda item: len(item[1]))
        spec = replace(
            spec, questions=[], prompts=dict([prompt]), donors={}, counts=None, refresh=False, on_answers=None
        )
    options = (spec.adapter, spec.sampler, spec.schedule, spec.search, spec.scorer)
    return work_of(
        spec.executor,
        partial(Drawer, spec, longest, scored=scored, max_bytes=max_bytes),
        options,
        [spec.config.get(name) for name in (*DRAWING, "scorer")],
        [spec.adapter, spec.scorer],
        spec.draft,
    )


# The worker


def places_of(jobs: Iterable[RolloutJob]) -> list[Place]:
    """The (row key, rollout) of each rollout of some jobs."""
    return [(job.row_key, number) for job in jobs for number in job.rollouts]


def to_host(latents_RTD: Tensor) -> Tensor:
    """The same latents on the CPU, from a GPU through pinned memory."""
    if not latents_RTD.is_cuda:
        return latents_RTD
    return torch.empty(latents_RTD.shape, dtype=latents_RTD.dtype, pin_memory=True).copy_(latents_RTD)


def pack(spec: RunSpec, jobs: Sequence[RolloutJob], rows: int, device: str) -> Iterator[list[RolloutJob]]:
    """Batches of at most `rows` rows, the runs of a question in order."""
    search = spec.search
    # prompts run in batches of their own size, unless each job brings many rows
    prompts = None if spec.guided else max_prompts(spec.shape.width, torch.device(device).type)
    return batches(jobs, max(search.survivors or 1, rows // search.rows_per_survivor), prompts)


def rollouts_to_grow(spec: RunSpec, job: RolloutJob) -> int:
    """How many rollouts a job grows; a guided search keeps fewer."""
    return spec.n if spec.guided else len(job.rollouts)


def max_flops(spec: RunSpec, job: RolloutJob, *, answers: bool) -> float:
    """Operations of a job whose answers are as long as allowed."""
    passes, latents, prompt = spec.passes, spec.adapter.latents, len(job.prompt)
    chosen = spec.max_answer_tokens - len(spec.forced_ids)
    per_rollout = passes.rollout_flops(prompt, latents, chosen) if answers else passes.thinking_flops(prompt, latents)
    return passes.shared_flops(prompt) + rollouts_to_grow(spec, job) * per_rollout


@lru_cache(maxsize=1)
def directions_of(latents: str) -> DirectionSums:
    """Sums by row key for latents with this digest; those of the last run stay, for its next round or a larger n."""
    return DirectionSums()


def sums_of(jobs: Iterable[RolloutJob], directions: DirectionSums) -> Sums:
    """The sums of directions of the questions of some jobs, where they are known."""
    found = {job.row_key: directions.get(job.row_key) for job in jobs}
    return {key: each for key, each in found.items() if each is not None}


def find_uncompared(jobs: Iterable[RolloutJob], directions: DirectionSums) -> list[RolloutJob]:
    """Earlier rollouts of the same questions that the sums lack: never compared, or dropped since."""
    unknown = []
    for job in jobs:
        key, first = job.row_key, job.rollouts[0]
        known = directions.counted(key)
        if known > first:
            directions.forget(key)
            known = 0
        if known < first:
            unknown.append(replace(job, rollouts=range(known, first)))
    return unknown


class Drawer:
    """Rolls batches of a run's rollouts, and scores and compares their latents where they are made."""

    def __init__(self, spec: RunSpec, longest: int, *, scored: bool, max_bytes: Mapping[str, int]) -> None:
        """Measure the machine; models are loaded when they are first needed.

        Args:
            spec: the run; without questions in another process than the driver's.
            longest: tokens of the longest prompt to come.
            scored: whether the run's scorer reads latents.
            max_bytes: what is known to fit, see `Computed.fits`.
        """
        self.spec, self._scored = spec, scored or spec.guided
        self.device = find_device(spec.engine)
        keep_freed_memory()
        kind = torch.device(self.device).type
        allowed = f"its plan was faster on {spec.planned_on}, and this run is on {kind}; ltts probe makes another"
        require("schedule", "auto", spec.planned_on in (None, kind), allowed)
        if spec.guided:
            refuse_graphs(spec.engine, f"search={spec.search.name} forks its rollouts")
        if not spec.schedule.stepwise or spec.schedule.exit is not None:
            refuse_graphs(spec.engine, f"schedule={spec.schedule.name} decides on the way what it computes")
        self._sampler = sampler_of(spec)  # before free memory is asked for
        self.own_prompt = "prompt" in spec.sampler.random_phases
        self.bytes_per_row = self._bytes_per_row(longest)
        self.rows = rows_per_batch(spec.engine, spec.shape, self.bytes_per_row, self.device, own_prompt=self.own_prompt)
        self.memory = f"{spec.adapter.digest} {spec.engine.dtype} {device_name(self.device)}"
        self._max_bytes = max_bytes.get(self.memory)
        while self._max_bytes is not None and self.rows > 1 and self.rows * self.bytes_per_row > self._max_bytes:
            self.rows //= 2
        self.rates = measured_rates(spec.shape.width, spec.engine.dtype, self.device)
        self._computed = 0  # batches

    @cached_property
    def engine(self) -> Engine:
        """The loaded reasoner."""
        return open_engine_of(self.spec)

    @cached_property
    def scorer(self) -> BatchScorer:
        """The loaded scorer."""
        return BatchScorer(self.spec, self.rates)

    @property
    def _computations(self) -> tuple[Computation, Computation | None]:
        scoring = self.scorer.model.model.computation if self._scored else None
        return self.engine.reasoner.computation, scoring

    @cached_property
    def _directions(self) -> DirectionSums:
        return directions_of(settings_digest(latents_key(self.spec, *self._computations)))

    def describe(self) -> Description:
        """What the driver has to know of this worker; loads its models."""
        return Description(
            name=f"{socket.gethostname()} {os.getpid()}",
            computations=self._computations,
            device=self.device,
            rows=self.rows,
            bytes_per_row=self.bytes_per_row,
            rates=self.rates,
        )

    def compute(self, shard: Shard) -> Computed:
        """Compute a shard batch by batch. Where one does not fit memory, it is split, and those after it are smaller.

        Raises:
            RunError: latents, log-probabilities or scores are not finite.
        """
        make = partial(self._part, shard=shard)
        parts = list(compute_in_batches(shard.jobs, make, self.batches, self._halve, self.device))
        if not self.spec.executor.in_process:
            parts = [part if part.make_table is None else part.with_table(part.make_table()) for part in parts]
        compared = [job for job in shard.jobs if shard.sums and job.row_key not in shard.early]
        known = sums_of(compared, self._directions).items()
        sums = {key: (count, sums_TD.to("cpu", copy=True)) for key, (count, sums_TD) in known}
        return Computed(parts, sums, {} if self._max_bytes is None else {self.memory: self._max_bytes})

    def batches(self, jobs: Sequence[RolloutJob]) -> Iterator[list[RolloutJob]]:
        """Pack jobs into batches."""
        return pack(self.spec, jobs, self.rows, self.device)

    def _halve(self, batch: list[RolloutJob]) -> bool:
        """Halve the rows of a batch and of all later ones, if that divides it."""
        rows = sum(len(job.rollouts) for job in batch) * self.spec.search.rows_per_survivor
        self.rows = max(1, rows // 2)
        if len(list(self.batches(batch))) < 2:
            return False
        self._max_bytes = self.rows * self.bytes_per_row
        warn_of_halving(rows, self.device)
        return True

    def _part(self, batch: list[RolloutJob], shard: Shard) -> Part:
        request, shown = shard.request, nullcontext()
        if request.compares:
            self.catch_up([job for job in batch if job.row_key not in shard.early])
        if shard.bar is not None:
            most = sum(max_flops(self.spec, job, answers=request.answers) for job in batch)
            shown = batch_progress(shard.bar, self.engine.lm.base_model, self.spec.shape, batch, most)
        with shown:
            part = self.draw(batch, shard) if request.drawn else self._recompute(batch, shard)
        self._computed += 1
        if self._computed % BATCHES_KEPT == 0:
            release_memory()
        return part

    def roll(self, batch: Sequence[RolloutJob], *, answers: bool) -> Rollouts:
        """Draw a batch.

        Raises:
            RunError: latents or log-probabilities are not finite.
        """
        spec, scorer, reduction = self.spec, None, None
        if spec.guided:
            scorer, reduction = self.scorer.model, spec.given_scorer.reduction
        rollouts = spec.search.roll(
            self.engine, batch, self._sampler, spec.seed, scorer=scorer, reduction=reduction, answers=answers
        )
        finite = {"latents": rollouts.latents_RTD.flatten(1).isfinite().all(1)}
        if answers:
            finite["log-probabilities of answers"] = rollouts.answer_logprob_R.isfinite()
        for what, finite_R in finite.items():
            require_finite(what, finite_R, question_ids(batch), self.engine.lm.dtype, "drawing rollouts")
        return rollouts

    def draw(self, batch: list[RolloutJob], shard: Shard) -> Part:
        """Draw a batch."""
        request = shard.request
        started = begin_measuring(self.engine.device)
        rollouts = self.roll(batch, answers=request.answers)
        measured = measured_columns(started, self.engine.device, len(rollouts.answer_ids))
        places, latents_RTD, steps_R = places_of(batch), rollouts.latents_RTD, rollouts.steps_R.numpy()
        rollouts.latents_RTD = latents_RTD.new_empty(0)  # the table does not hold them
        scored = self.scorer.score(batch, latents_RTD, rollouts.steps_R) if request.scored else {}
        early = shard.early.intersection(job.row_key for job in batch)
        compared = [place for place, job in enumerate(batch) if request.compares and job.row_key not in early]
        compared_RT = self._compare(batch, compared, latents_RTD)

        def table() -> pa.Table:
            columns = answer_columns(rollouts, answers=request.answers) | measured
            if not self.spec.guided:  # what a search cannot do without is not counted
                columns |= self._minimum_work(batch, rollouts, answers=request.answers)
            columns["dissimilarity"] = ragged(compared_RT.numpy(), steps_R)
            if scored:
                columns[SCORED_BY] = self.scorer.digest
                columns |= {SCORING + name: column for name, column in scored.items()}
            return batch_table(ROLLOUT_SCHEMA, batch, columns)

        return Part(
            places=places,
            make_table=table,
            answer_ids=rollouts.answer_ids if request.answers else None,
            latents_RTD=to_host(latents_RTD) if request.keeps or early else None,
            early=early,
        )

    def _recompute(self, batch: list[RolloutJob], shard: Shard) -> Part:
        """Recompute the latents of a batch."""
        request = shard.request
        thought = self.roll(batch, answers=False)
        scores = self.scorer.score(batch, thought.latents_RTD, thought.steps_R) if request.scored else None
        return Part(
            places=places_of(batch),
            make_table=None if scores is None else partial(batch_table, SCORE_SCHEMA, batch, scores),
            latents_RTD=to_host(thought.latents_RTD) if request.keeps else None,
        )

    def catch_up(self, batch: Sequence[RolloutJob]) -> None:
        """Recompute the earlier rollouts that a batch has to be compared with and whose sums are not known."""
        kept = {job.row_key for job in batch}
        for earlier in self.batches(find_uncompared(batch, self._directions)):
            self._add(earlier, self.roll(earlier, answers=False).latents_RTD, kept)

    def _compare(self, batch: list[RolloutJob], places: list[int], latents_RTD: Tensor) -> Tensor:
        """How far the rollouts of the jobs at some places are from those before, see `DirectionSums.add`; else 0."""
        compared_RT = torch.zeros(latents_RTD.shape[:2])
        if places:
            rows_R = torch.arange(len(latents_RTD)).view(len(batch), -1)[places].flatten()
            jobs = [batch[place] for place in places]
            compared_RT[rows_R] = self._add(jobs, latents_RTD[rows_R.to(latents_RTD.device)])
        return compared_RT

    def _add(self, batch: Sequence[RolloutJob], latents_RTD: Tensor, kept: Collection[str] = ()) -> Tensor:
        first = [job.rollouts[0] for job in batch]
        return self._directions.add([job.row_key for job in batch], latents_RTD, first=first, kept=kept)

    def _bytes_per_row(self, longest: int) -> int:
        """Upper estimate of a row's bytes; a guided search holds the rows of two steps, in reasoner and scorer."""
        spec, number = self.spec, self.spec.engine.bytes_per_number
        suffix = reserved_positions(spec.adapter, spec.max_answer_tokens)
        own = row_bytes(spec.shape, longest, suffix, number, self.own_prompt)
        if spec.draft is not None:
            own += 4 * longest * spec.shape.width  # its copy of the prompt's states
        if not self._scored:
            return own
        scorer = Shape.from_config(spec.given_scorer.sizes)
        scoring = row_bytes(scorer, longest, spec.adapter.latents, number, own_prompt=False)
        return 2 * (own + scoring) if spec.guided else max(own, scoring)

    def _minimum_work(self, batch: Sequence[RolloutJob], rollouts: Rollouts, *, answers: bool) -> Columns:
        """Each row's share of the least time and bytes that drawing a batch takes."""
        begun = len(self.spec.forced_ids)
        least = batch_costs(
            self.spec.passes,
            self.engine.lm.dtype.itemsize,
            np.array([len(job.prompt) for job in batch]),
            rollouts.steps_R.numpy(),
            np.array([len(ids) - begun for ids in rollouts.answer_ids]) if answers else None,
        )
        return least_columns(least, self.rates, len(rollouts.answer_ids))
