"""The rollouts that a cache lacks, drawn and scored by the workers of a run: the driver's side of `worker.py`."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch

from latent_tts.budget import is_adaptive
from latent_tts.engine.cost import Shape
from latent_tts.engine.diversity import DirectionSums
from latent_tts.engine.packing import RolloutJob
from latent_tts.errors import LESS_MEMORY, RunError, computing
from latent_tts.pipeline.dispatch import ShardQueue, Unit, results_of
from latent_tts.pipeline.keys import latents_key
from latent_tts.pipeline.models import load_reasoner_of, load_scorer_of
from latent_tts.pipeline.spec import RunSpec
from latent_tts.pipeline.worker import (
    Computed,
    Description,
    Part,
    Place,
    Request,
    Shard,
    directions_of,
    drawing_work,
    find_uncompared,
    max_flops,
    pack,
    rollouts_to_grow,
    sums_of,
)
from latent_tts.results import report
from latent_tts.results.cache import (
    RolloutCache,
    ScoreCache,
    known_to_fit,
    read_direction_sums,
    remember_what_fits,
    write_direction_sums,
)
from latent_tts.results.files import settings_digest
from latent_tts.results.parts import PartWriter, runs_of
from latent_tts.results.run_folder import KeepLatents
from latent_tts.results.timeline import Span
from latent_tts.types import Computation

log = logging.getLogger(__name__)


def find_computations(spec: RunSpec, *, scored: bool) -> tuple[Computation, Computation | None]:
    """How the workers compute the run's reasoner and, where it is `scored`, its scorer. Loads them."""
    if spec.executor.in_process:
        return load_reasoner_of(spec).computation, load_scorer_of(spec).computation if scored else None
    return Driver(spec, max(map(len, spec.prompts.values())), scored=scored).workers[0].computations


def draw(
    spec: RunSpec,
    cache: RolloutCache,
    missing: pd.DataFrame,
    *,
    answers: bool = True,
    scored: bool = False,
    dissimilarity: Mapping[Place, np.ndarray] | None = None,
    keep: KeepLatents | None = None,
) -> list[Span]:
    """Draw rollouts into a cache; what was drawn before a failure or an interruption is kept.

    Args:
        spec: the run.
        cache: where they go.
        missing: which ones (columns `row_key`, `rollout`).
        answers: whether to decode the answers.
        scored: whether the run's scorer reads their latents.
        dissimilarity: of each rollout, where it is known (see `cache.ROLLOUT_FIELDS`); else it is computed.
        keep: takes latents; None keeps none.

    Returns:
        Which worker was busy when.

    Raises:
        RunError: a failure while drawing.
        OSError: the cache cannot be written to.
        KeyboardInterrupt: with the number of rollouts that are kept.
    """
    compares = dissimilarity is None and spec.adapter.latents > 0
    jobs = jobs_of(spec, missing, compared=compares)
    driver = Driver(spec, max(len(job.prompt) for job in jobs), scored=scored)
    driver.log_work(jobs, answers=answers)
    driver.log_scoring(jobs)
    cache.write_computation(driver.workers[0].computations[0])
    if compares:
        driver.read_direction_sums(jobs, cache.folder)
    request = Request(answers, scored, compares=compares, keeps=keep is not None)
    total, done = sum(len(job.rollouts) for job in jobs), 0
    try:
        with report.progress_bar(total, "rollouts") as bar, PartWriter(cache.folder) as writer:
            with computing("drawing rollouts", f"what was drawn is in {cache.folder}", LESS_MEMORY):
                for part in driver.parts(jobs, request, bar):
                    if keep is not None and part.latents_RTD is not None:
                        keep(part.places, part.latents_RTD)
                    if spec.on_answers is not None and part.answer_ids is not None:
                        spec.on_answers(part.places, part.answer_ids)
                    assert part.make_table is not None
                    if dissimilarity is not None:
                        part = _with_dissimilarity(part, [dissimilarity[place] for place in part.places])
                    writer.put(part.make_table)
                    done += len(part.places)
    except KeyboardInterrupt:
        whole = "; those of an unfinished batch are not" if done < total else ""
        raise KeyboardInterrupt(f"{done} of {total} rollouts are kept{whole}; re-run the command to resume") from None
    finally:
        # rounds follow each other in one process; writing after each one would cost more than it saves
        if compares and not is_adaptive(spec.budget):
            driver.write_direction_sums(jobs, cache.folder)
    return driver.timeline


def recompute_latents(
    spec: RunSpec,
    scores: ScoreCache | None,
    unscored: pd.DataFrame,
    offsets: Mapping[Place, int],
    unkept: pd.DataFrame,
    keep: KeepLatents | None,
) -> list[Span]:
    """Recompute the latents of drawn rollouts, to score or to keep them; answers and recorded scores stay.

    Args:
        spec: the run.
        scores: where step scores go.
        unscored: which rollouts to score (columns `row_key`, `rollout`).
        offsets: what is added to the scorer's positions of each; 0 where it is not named.
        unkept: the rollouts whose latents are to be kept.
        keep: takes them.

    Returns:
        Which worker was busy when.

    Raises:
        RunError: a failure; what was scored stays in the cache.
        OSError: the cache cannot be written to.
    """
    missing = pd.concat([unscored, unkept]).drop_duplicates().sort_index()
    jobs = split_by_offset(jobs_of(spec, missing), offsets)
    scored = len(unscored) > 0
    driver = Driver(spec, max(len(job.prompt) for job in jobs), scored=scored)
    driver.log_recomputing(jobs, "scores" if scored else "")
    driver.log_scoring(jobs)
    to_score = set(unscored.itertuples(index=False, name=None))
    request = Request(answers=False, scored=scored, drawn=False, keeps=keep is not None)
    writer = PartWriter(scores.folder) if scored and scores is not None else None
    with report.progress_bar(len(missing), "rollouts") as bar, writer or nullcontext():
        with computing("recomputing latents", "what was scored is in the cache", LESS_MEMORY):
            for part in driver.parts(jobs, request, bar):
                if keep is not None and part.latents_RTD is not None:
                    keep(part.places, part.latents_RTD)
                if writer is not None and part.make_table is not None:
                    rows = pa.array([place in to_score for place in part.places])
                    writer.put(partial(part.make_table().filter, rows))
    return driver.timeline


def jobs_of(spec: RunSpec, missing: pd.DataFrame, *, compared: bool = False) -> list[RolloutJob]:
    """Jobs for some rollouts (columns `row_key`, `rollout`), one per run of consecutive numbers of a question.

    Where they are `compared` with those before, a question has one job, from its first missing rollout to the last.
    """
    questions = {spec.row_key(question): question for question in spec.questions}
    jobs, runs = [], runs_of(missing)
    first, last = dict(reversed(runs)), dict(runs)
    if spec.guided:  # a guided search cannot draw a part of a question's rollouts
        runs = [(key, range(spec.kept)) for key in last]
    elif compared:
        runs = [(key, range(first[key].start, last[key].stop)) for key in last]
    for key, numbers in runs:
        question = questions[key]
        donor = spec.prompts[spec.donors[question.id].id] if spec.donors else None
        jobs.append(RolloutJob(key, question.id, spec.prompts[question.id], numbers, donor))
    return jobs


def split_by_offset(jobs: Sequence[RolloutJob], offsets: Mapping[Place, int]) -> list[RolloutJob]:
    """Jobs split by what is added to the positions of their rollouts."""
    return [
        replace(job, rollouts=list(numbers), position_offset=shift)
        for job in jobs
        for shift, numbers in groupby(job.rollouts, key=lambda number, job=job: offsets.get((job.row_key, number), 0))
    ]


def divide(jobs: Sequence[RolloutJob], rows: int) -> tuple[list[RolloutJob], list[RolloutJob]]:
    """The first rollouts of some jobs, and the others."""
    first, rest = [], []
    for job in jobs:
        for part, rollouts in ((first, job.rollouts[:rows]), (rest, job.rollouts[rows:])):
            if len(rollouts):
                part.append(replace(job, rollouts=rollouts))
        rows = max(0, rows - len(job.rollouts))
    return first, rest


class Driver:
    """Drives the workers of a run's executor, which draw rollouts or recompute their latents.

    Attributes:
        timeline: which worker was busy when.
    """

    def __init__(self, spec: RunSpec, longest: int, *, scored: bool) -> None:
        """Start the workers and have them load the model.

        Args:
            spec: the run.
            longest: tokens of the longest prompt to come.
            scored: whether the run's scorer reads latents.

        Raises:
            UsageError: there are no workers, or they cannot load it.
            RunError: they compute the model in different ways.
        """
        self.spec, self._scored, self.timeline = spec, scored, list[Span]()
        work = drawing_work(spec, longest, scored=scored, max_bytes=known_to_fit(spec.cache))
        self._pool = spec.executor.open(work, spec.engine.device)
        self.workers: list[Description] = self._pool.describe()
        ways = {tuple(one and tuple(one.way.values()) for one in each.computations) for each in self.workers}
        if len(ways) > 1:
            names = ", ".join(each.name for each in self.workers)
            raise RunError(f"the workers {names} compute the models in different ways, so their rollouts differ")
        self._directions = directions_of(settings_digest(latents_key(spec, *self.workers[0].computations)))
        self._rows = min(each.rows for each in self.workers)  # of a batch that every worker takes

    def parts(self, jobs: Sequence[RolloutJob], request: Request, bar: report.ProgressBar) -> Iterator[Part]:
        """Have jobs computed; their parts as they come."""
        spec, here = self.spec, self.spec.executor.in_process
        in_rounds = is_adaptive(spec.budget)
        early_parts = EarlyParts(jobs, self._directions)

        def make_shard(contents: list[list[RolloutJob]]) -> Shard:
            own = list(chain(*contents))
            if here or not request.compares:
                return Shard(own, request, bar=bar if here else None)
            early, goes_on = early_parts.begin(own)
            return Shard(own, request, early, sums=goes_on or in_rounds)

        queue = ShardQueue(
            self._units(jobs, request),
            len(self.workers),
            None if spec.executor.fixed else self._rows,
            None if spec.guided else divide,
        )
        for contents, done in results_of(self._pool, queue, make_shard, self.timeline):
            for memory, size in done.fits.items():
                remember_what_fits(spec.cache, memory, size)
            yield from early_parts.compared(done)
            if not here:
                bar.advance(sum(len(job.rollouts) for job in chain(*contents)))

    def _units(self, jobs: Sequence[RolloutJob], request: Request) -> Iterator[Unit[list[RolloutJob]]]:
        """Batches, or the jobs of each question, as the executor shares them out."""
        contents: Iterable[Iterable[RolloutJob]] = (same for _, same in groupby(jobs, key=lambda job: job.row_key))
        if self.spec.executor.fixed:
            contents = pack(self.spec, jobs, self._rows, self.workers[0].device)
        for content in map(list, contents):
            cost = sum(max_flops(self.spec, job, answers=request.answers) for job in content)
            yield Unit(content, cost, sum(len(job.rollouts) for job in content))

    def log_work(self, jobs: Sequence[RolloutJob], *, answers: bool) -> None:
        """Log how much there is to draw, and what it costs."""
        spec, first = self.spec, self.workers[0]
        count = sum(rollouts_to_grow(spec, job) for job in jobs)
        held = first.rows * first.bytes_per_row + spec.shape.weight_bytes(spec.engine.bytes_per_number)
        memory = f"; {held / 1e9:.2g} GB for weights and batches of {first.rows} rows"
        self._log(f"{count} rollouts to draw", sum(max_flops(spec, job, answers=answers) for job in jobs), memory)

    def log_recomputing(self, jobs: Sequence[RolloutJob], why: str = "") -> None:
        """Log that latents of drawn rollouts are computed again, and what it costs."""
        count = sum(len(job.rollouts) for job in jobs)
        what = f"latents of {count} cached rollouts to compute again{why and f', for {why}'}"
        self._log(what, sum(max_flops(self.spec, job, answers=False) for job in jobs))

    def _log(self, what: str, work: float, memory: str = "") -> None:
        """Log operations, and their time at the speed of the device's matrix products if that is a second or more."""
        flops = sum(each.rates.flops for each in self.workers)
        where = "this device" if len(self.workers) == 1 else f"{len(self.workers)} workers"
        seconds = f" ({work / flops:.0f} s at the {flops / 1e9:.3g} GFLOP/s of {where})" if work >= flops else ""
        log.info("%s: at most %.3g GFLOP%s%s", what, work / 1e9, seconds, memory)

    def log_scoring(self, jobs: Sequence[RolloutJob]) -> None:
        """Log how much there is to score."""
        if self._scored:
            scorer, latents = self.spec.given_scorer, self.spec.adapter.latents
            shape, count = Shape.from_config(scorer.sizes), sum(len(job.rollouts) for job in jobs)
            work = sum(
                shape.pass_flops(len(job.prompt)) + len(job.rollouts) * shape.scoring_flops(len(job.prompt), latents)
                for job in jobs
            )
            log.info("%d rollouts to score with %s: at most %.3g GFLOP", count, scorer.name, work / 1e9)

    def read_direction_sums(self, jobs: Sequence[RolloutJob], folder: Path) -> None:
        """Take in what the cache keeps of the rollouts before some jobs; log how many latents are computed again."""
        unknown = {job.row_key: job.rollouts[-1] + 1 for job in find_uncompared(jobs, self._directions)}
        for key, sums_TD in read_direction_sums(folder, unknown).items() if unknown else ():
            self._directions.put(key, unknown[key], torch.from_numpy(sums_TD))
        if before := find_uncompared(jobs, self._directions):
            self.log_recomputing(before, "diversity")

    def write_direction_sums(self, jobs: Sequence[RolloutJob], folder: Path) -> None:
        """Keep in the cache what is known of the rollouts of the jobs' questions."""
        found = sums_of(jobs, self._directions)
        if found:
            sums = {key: (count, sums_TD.cpu().numpy()) for key, (count, sums_TD) in found.items()}
            write_direction_sums(folder, sums)


class EarlyParts:
    """Ranges of a question's rollouts that are drawn by other workers than those before them.

    Their latents come back with them, and are compared with the earlier ones once the sums of directions of those are
    there. They are compared on the CPU.
    """

    def __init__(self, jobs: Iterable[RolloutJob], directions: DirectionSums) -> None:
        """Begin without parts.

        Args:
            jobs: one per question: the rollouts to be drawn.
            directions: see `directions_of`.
        """
        self._directions, self._whole = directions, {job.row_key: job.rollouts for job in jobs}
        self._known = {key for key, rollouts in self._whole.items() if 0 < directions.counted(key) == rollouts[0]}
        self._kept = set(self._known)  # sums that are not dropped
        self._waiting: list[Part] = []

    def begin(self, jobs: Sequence[RolloutJob]) -> tuple[frozenset[str], bool]:
        """The row keys of a shard's jobs that are early, and whether later rollouts of any are in other shards."""
        goes_on = {job.row_key for job in jobs if job.rollouts[-1] < self._whole[job.row_key][-1]}
        self._kept |= goes_on
        keys = (
            job.row_key for job in jobs if job.row_key in self._known or job.rollouts[0] > self._whole[job.row_key][0]
        )
        return frozenset(keys), bool(goes_on)

    def compared(self, done: Computed) -> Iterator[Part]:
        """The parts that are now compared with all earlier rollouts: some of these, and some that waited."""
        for key, (count, sums_TD) in done.sums.items():
            self._directions.put(key, count, sums_TD, kept=self._kept)
        self._waiting += done.parts
        while (index := next((i for i, each in enumerate(self._waiting) if self._is_next(each)), None)) is not None:
            yield self._compare(self._waiting.pop(index))

    def _is_next(self, part: Part) -> bool:
        """Whether the sums of each of its early questions hold the rollouts before."""
        return all(self._directions.counted(key) == _rows_in(part, key)[1] for key in part.early)

    def _compare(self, part: Part) -> Part:
        if not part.early:
            return part
        assert part.make_table is not None
        assert part.latents_RTD is not None
        compared = part.make_table()["dissimilarity"].to_pylist()
        for key in part.early:
            rows, first = _rows_in(part, key)
            summed_NT = self._directions.add([key], part.latents_RTD[rows], first=[first], kept=self._kept)
            for row, summed_T in zip(rows, summed_NT.tolist(), strict=True):
                compared[row] = summed_T[: len(compared[row])]
        return _with_dissimilarity(part, compared)


def _rows_in(part: Part, key: str) -> tuple[list[int], int]:
    """The rows of a question in a part, and the number of its first rollout there."""
    rows = [row for row, (own, _) in enumerate(part.places) if own == key]
    return rows, part.places[rows[0]][1]


def _with_dissimilarity(part: Part, values: Sequence[Any]) -> Part:
    """A part whose rows have other values of that column."""
    assert part.make_table is not None
    table = part.make_table()
    column = table.column_names.index("dissimilarity")
    field = table.schema.field(column)
    return part.with_table(table.set_column(column, field, pa.array(values, field.type)))
