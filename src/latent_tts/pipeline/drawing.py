"""The rollouts that a cache lacks, drawn and scored by the workers of a run: the driver's side of `drawer.py`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property, partial
from itertools import groupby, pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from torch import Tensor

from latent_tts.budget import is_adaptive
from latent_tts.engine.packing import RolloutJob, batches, max_prompts
from latent_tts.errors import LESS_MEMORY, RunError, computing
from latent_tts.pipeline.batch import BatchScorer, batch_table
from latent_tts.pipeline.dispatch import ShardQueue, Unit, results_of
from latent_tts.pipeline.drawer import (
    Description,
    DrawingWork,
    Part,
    Place,
    Request,
    Shard,
    directions,
    directions_key,
    find_uncompared,
    latents_digest,
    max_flops,
    pack,
    places_of,
    rollouts_to_grow,
    sums_of,
)
from latent_tts.pipeline.models import (
    find_device,
    load_reasoner_of,
    load_scorer_of,
    rows_per_batch,
)
from latent_tts.pipeline.progress import BatchProgress
from latent_tts.pipeline.spec import RunSpec
from latent_tts.results import report
from latent_tts.results.cache import (
    SCORE_SCHEMA,
    RolloutCache,
    ScoreCache,
    known_to_fit,
    read_direction_sums,
    remember_what_fits,
    write_direction_sums,
)
from latent_tts.results.parts import PLACE, PartWriter, runs_of
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
    jobs = jobs_of(spec, missing)
    driver = Driver(spec, max(len(job.prompt) for job in jobs), scored=scored)
    driver.log_work(jobs, answers=answers)
    cache.write_computation(driver.workers[0].computations[0])
    if dissimilarity is None:
        driver.read_direction_sums(jobs, cache.folder)
        driver.log_catching_up(jobs)
    request = Request(answers, scored, compares=dissimilarity is None, keeps=keep is not None)
    total, done = sum(len(job.rollouts) for job in jobs), 0
    try:
        with report.progress_bar(total, "rollouts") as bar, PartWriter(cache.folder) as writer:
            with computing("drawing rollouts", f"what was drawn is in {cache.folder}", LESS_MEMORY):
                for part in driver.parts(jobs, request, bar, dissimilarity):
                    if keep is not None and part.latents_RTD is not None:
                        keep(part.places, part.latents_RTD)
                    if spec.on_answers is not None and part.answer_ids is not None:
                        spec.on_answers(part.places, part.answer_ids)
                    assert part.make_table is not None
                    writer.put(part.make_table)
                    done += len(part.places)
    except KeyboardInterrupt:
        whole = "; those of an unfinished batch are not" if done < total else ""
        raise KeyboardInterrupt(f"{done} of {total} rollouts are kept{whole}; re-run the command to resume") from None
    finally:
        # rounds follow each other in one process; writing after each one would cost more than it saves
        if dissimilarity is None and not is_adaptive(spec.budget):
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
    to_score = set(unscored.itertuples(index=False, name=None))
    request = Request(answers=False, scored=scored, drawn=False, keeps=keep is not None)
    writer = PartWriter(scores.folder) if scored and scores is not None else None
    with report.progress_bar(len(missing), "rollouts") as bar, writer or nullcontext():
        with computing("recomputing latents", "what was scored is in the cache", LESS_MEMORY):
            for part in driver.parts(jobs, request, bar):
                if keep is not None and part.latents_RTD is not None:
                    keep(part.places, part.latents_RTD)
                if writer is not None and part.make_table is not None:
                    writer.put(partial(_rows_of, part.make_table, to_score))
    return driver.timeline


def _rows_of(make_table: Callable[[], pa.Table], wanted: set[Place]) -> pa.Table:
    """The rows of a table at some places."""
    table = make_table()
    places = zip(*(table[name].to_pylist() for name in PLACE), strict=True)
    return table.filter(pa.array([place in wanted for place in places]))


def score_kept(
    spec: RunSpec,
    scores: ScoreCache,
    missing: pd.DataFrame,
    offsets: Mapping[Place, int],
    read_latents: Callable[[Sequence[RolloutJob]], tuple[Tensor, Tensor]],
) -> None:
    """Score rollouts whose latents are in a file.

    Args:
        spec: the run.
        scores: where step scores go.
        missing: which ones to score (columns `row_key`, `rollout`).
        offsets: see `recompute_latents`.
        read_latents: makes the latents (R, T, D) of a batch, zeros where a row has none, and their numbers (R).

    Raises:
        RunError: a failure while scoring; what was scored stays in the cache.
        OSError: the cache cannot be written to.
    """
    jobs, device = split_by_offset(jobs_of(spec, missing), offsets), find_device(spec.engine)
    scorer = BatchScorer(spec, device)
    rows = rows_per_batch(spec.engine, scorer.shape, scorer.bytes_per_row(jobs), device, own_prompt=False)
    scorer.log_work(jobs)
    with report.progress_bar(len(missing), "scores") as bar, PartWriter(scores.folder) as writer:
        with computing("scoring rollouts", f"what was scored is in {scores.folder}", LESS_MEMORY):
            progress = BatchProgress(bar, scorer.model.backbone, scorer.shape, scorer.max_flops)
            for batch in batches(jobs, rows, max_prompts(scorer.shape.width, torch.device(device).type)):
                latents_RTD, steps_R = read_latents(batch)
                with progress.batch(batch):
                    columns = scorer.score(batch, latents_RTD, steps_R)
                writer.put(partial(batch_table, SCORE_SCHEMA, batch, columns))


def jobs_of(spec: RunSpec, missing: pd.DataFrame) -> list[RolloutJob]:
    """Jobs for some rollouts (columns `row_key`, `rollout`), one per run of consecutive numbers of a question."""
    questions = {spec.row_key(question): question for question in spec.questions}
    jobs, whole = [], range(spec.kept)
    runs: Iterable[tuple[str, range]] = runs_of(missing)
    if spec.guided:  # a guided search cannot draw a part of a question's rollouts
        runs = dict.fromkeys((key for key, _ in runs), whole).items()
    for key, numbers in runs:
        question = questions[key]
        donor = spec.prompts[spec.donors[question.id].id] if spec.donors else None
        jobs.append(RolloutJob(key, question.id, spec.prompts[question.id], numbers, donor))
    return jobs


def split_by_offset(jobs: Sequence[RolloutJob], offsets: Mapping[Place, int]) -> list[RolloutJob]:
    """Jobs split by what is added to the positions of their rollouts."""
    if not offsets:
        return list(jobs)
    return [
        replace(job, rollouts=list(numbers), position_offset=shift)
        for job in jobs
        for shift, numbers in groupby(job.rollouts, key=lambda number, job=job: offsets[job.row_key, number])
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


def first_of_questions(jobs: Iterable[RolloutJob]) -> list[RolloutJob]:
    """The first of the jobs of each question, which stand side by side."""
    return [next(same) for _, same in groupby(jobs, key=lambda job: job.row_key)]


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
        work = DrawingWork.of(spec, longest, scored=scored, max_bytes=known_to_fit(spec.cache))
        self._pool = spec.executor.open(work, spec.engine.device)
        self.workers: list[Description] = self._pool.describe()
        ways = {tuple(one and tuple(one.way.values()) for one in each.computations) for each in self.workers}
        if len(ways) > 1:
            names = ", ".join(each.name for each in self.workers)
            raise RunError(f"the workers {names} compute the models in different ways, so their rollouts differ")

    @cached_property
    def _latents(self) -> str:
        """What determines the latents."""
        return latents_digest(self.spec, self.workers[0].computations)

    @property
    def _rows(self) -> int:
        """Most rows of a batch that every worker takes."""
        return min(each.rows for each in self.workers)

    @property
    def _flops(self) -> float:
        """Operations per second of all workers."""
        return sum(each.rates.flops for each in self.workers)

    def parts(
        self,
        jobs: Sequence[RolloutJob],
        request: Request,
        bar: report.ProgressBar,
        dissimilarity: Mapping[Place, np.ndarray] | None = None,
    ) -> Iterator[Part]:
        """Have jobs computed; their parts as they come."""
        units = self._units(jobs, request)
        here, fixed = self.spec.executor.in_process, self.spec.executor.fixed
        divided = request.compares and not here
        latents = self._latents
        early_parts = EarlyParts(latents)
        ends = {job.row_key: job.rollouts[-1] for job in jobs}

        def make_shard(contents: list[list[RolloutJob]], early: frozenset[str]) -> Shard:
            own = [job for content in contents for job in content]
            known = {} if dissimilarity is None else {place: dissimilarity[place] for place in places_of(own)}
            early_parts.keys |= early
            # where a question's rollouts are in several shards, the sums that they are compared by go between workers
            goes_on = is_adaptive(self.spec.budget) or fixed or any(job.rollouts[-1] < ends[job.row_key] for job in own)
            asked = replace(request, sums=divided and goes_on)
            sums = sums_of((job for job in own if job.row_key not in early), latents) if divided else {}
            return Shard(own, asked, known, sums, early, bar if here else None)

        queue = ShardQueue(units, len(self.workers), None if fixed else self._rows, divide)
        for contents, parts in results_of(self._pool, queue, make_shard, self.timeline):
            for part in early_parts.compared(parts):
                if part.max_bytes is not None:
                    remember_what_fits(self.spec.cache, part.memory, part.max_bytes)
                yield part
            if not here:
                bar.advance(sum(len(job.rollouts) for content in contents for job in content))

    def _units(self, jobs: Sequence[RolloutJob], request: Request) -> list[Unit[list[RolloutJob]]]:
        """Batches, or the jobs of each question, as the executor shares them out.

        The driver compares on the CPU what workers could not compare. It rounds as CPUs do, and lacks what is drawn
        again before a gap in a question's rollouts.
        """
        fixed, device = self.spec.executor.fixed, self.workers[0].device
        if fixed:
            contents = list(pack(self.spec, jobs, self._rows, device))
        else:
            contents = [list(same) for _, same in groupby(jobs, key=lambda job: job.row_key)]
        compares = request.compares and self.spec.adapter.latents > 0
        gaps = {before.row_key for before, after in pairwise(jobs) if before.row_key == after.row_key}
        divisible = not self.spec.guided and not (compares and fixed and device != "cpu")
        return [
            Unit(
                content,
                cost=sum(max_flops(self.spec, job, answers=request.answers) for job in content),
                rows=sum(len(job.rollouts) for job in content),
                keys=frozenset(job.row_key for job in content) if compares else frozenset(),
                divisible=divisible and not (compares and any(job.row_key in gaps for job in content)),
            )
            for content in contents
        ]

    def log_work(self, jobs: Sequence[RolloutJob], *, answers: bool) -> None:
        """Log how much there is to draw and to score, and what it costs."""
        spec, first = self.spec, self.workers[0]
        work = sum(max_flops(spec, job, answers=answers) for job in jobs)
        weights = spec.shape.weight_bytes(spec.engine.bytes_per_number)
        log.info(
            "%d rollouts to draw: at most %.3g GFLOP%s; %.2g GB for weights and batches of %d rows",
            sum(rollouts_to_grow(spec, job) for job in jobs), work / 1e9, self._shortest_time(work),
            (first.rows * first.bytes_per_row + weights) / 1e9, first.rows,
        )  # fmt: skip
        self._log_scoring(jobs)

    def read_direction_sums(self, jobs: Sequence[RolloutJob], folder: Path) -> None:
        """Take in what the cache keeps of the rollouts before some jobs, where this process does not know them."""
        before = find_uncompared(first_of_questions(jobs), self._latents)
        unknown = {job.row_key: job.rollouts[-1] + 1 for job in before}
        for key, sums_TD in read_direction_sums(folder, unknown).items() if unknown else ():
            directions.put(directions_key(self._latents, key), unknown[key], torch.from_numpy(sums_TD))

    def write_direction_sums(self, jobs: Sequence[RolloutJob], folder: Path) -> None:
        """Keep in the cache what is known of the rollouts of the jobs' questions."""
        found = sums_of(first_of_questions(jobs), self._latents)
        if found:
            sums = {key: (count, sums_TD.cpu().numpy()) for key, (count, sums_TD) in found.items()}
            write_direction_sums(folder, sums)

    def log_catching_up(self, jobs: Sequence[RolloutJob]) -> None:
        """Log how many drawn rollouts have their latents computed again, to compare new ones with."""
        if self.spec.adapter.latents:
            before = find_uncompared(first_of_questions(jobs), self._latents)
            if before:
                self.log_recomputing(before, "diversity")

    def log_recomputing(self, jobs: Sequence[RolloutJob], why: str = "") -> None:
        """Say that latents of drawn rollouts are computed again, and what it takes."""
        work = sum(max_flops(self.spec, job, answers=False) for job in jobs)
        log.info(
            "latents of %d cached rollouts to compute again%s: at most %.3g GFLOP%s",
            sum(len(job.rollouts) for job in jobs), why and f", for {why}", work / 1e9, self._shortest_time(work),
        )  # fmt: skip
        self._log_scoring(jobs)

    def _shortest_time(self, work: float) -> str:
        """The seconds that operations take at the speed of the device's matrix products; empty for less than one."""
        where = "this device" if len(self.workers) == 1 else f"{len(self.workers)} workers"
        seconds = work / self._flops
        return f" ({seconds:.0f} s at the {self._flops / 1e9:.3g} GFLOP/s of {where})" if seconds >= 1 else ""

    def _log_scoring(self, jobs: Sequence[RolloutJob]) -> None:
        if self._scored:
            first = self.workers[0]
            BatchScorer(self.spec, first.device, first.rates).log_work(jobs)


class EarlyParts:
    """Rollouts that a worker drew while another one was drawing earlier rollouts of the same question.

    Their latents come back with them, and are compared with the earlier ones once the sums of directions of those are
    there.

    Attributes:
        keys: row keys of questions of which some worker has had early rollouts; their sums are not dropped.
    """

    def __init__(self, latents: str) -> None:
        """Begin empty; `latents` is the digest of the run's latents, see `directions_key`."""
        self._latents, self.keys = latents, set[str]()
        self._waiting: list[Part] = []

    def compared(self, parts: Iterable[Part]) -> Iterator[Part]:
        """The parts that are now compared with all earlier rollouts: some of these, and some that waited."""
        for part in parts:
            for key, (count, sums_TD) in part.sums.items():
                directions.put(self._name(key), count, sums_TD, kept=self._kept)
            if part.early:
                self._waiting.append(part)
            else:
                yield part
            while (index := next((i for i, each in enumerate(self._waiting) if self._is_next(each)), None)) is not None:
                yield self._compare(self._waiting.pop(index))

    @property
    def _kept(self) -> set[str]:
        return set(map(self._name, self.keys))

    def _name(self, key: str) -> str:
        return directions_key(self._latents, key)

    def _is_next(self, part: Part) -> bool:
        """Whether the sums of each of its early questions hold the rollouts before."""
        return all(directions.counted(self._name(key)) == _rows_in(part, key)[1] for key in part.early)

    def _compare(self, part: Part) -> Part:
        assert part.make_table is not None
        assert part.latents_RTD is not None
        table = part.make_table()
        column = table.column_names.index("dissimilarity")
        compared = table[column].to_pylist()
        for key in part.early:
            rows, first = _rows_in(part, key)
            summed_NT = directions.add([self._name(key)], part.latents_RTD[rows], first=[first], kept=self._kept)
            for row, summed_T in zip(rows, summed_NT.tolist(), strict=True):
                compared[row] = summed_T[: len(compared[row])]
        field = table.schema.field(column)
        return part.with_table(table.set_column(column, field, pa.array(compared, field.type)))


def _rows_in(part: Part, key: str) -> tuple[list[int], int]:
    """The rows of a question in a part, and the number of its first rollout there."""
    rows = [row for row, (own, _) in enumerate(part.places) if own == key]
    return rows, part.places[rows[0]][1]
