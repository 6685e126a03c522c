"""The stage between a specification and its tables: rollouts drawn and scored where the cache lacks them, then read."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd

from latent_tts.budget import Tally, is_adaptive, play
from latent_tts.errors import RunError
from latent_tts.pipeline.keys import latents_key, rollout_key
from latent_tts.pipeline.rounds import AnswerReader, Outcome, Tallying
from latent_tts.pipeline.scores import (
    CachedScores,
    Scores,
    reduce_scores,
    score_positions,
)
from latent_tts.pipeline.spec import RunSpec
from latent_tts.results import report
from latent_tts.results.cache import MEASURED_SUMS, ROLLOUT_FIELDS, RolloutCache, check_writable
from latent_tts.results.files import settings_digest
from latent_tts.results.parts import GatheredRows
from latent_tts.results.run_folder import KeepLatents, latents_file
from latent_tts.results.timeline import Span
from latent_tts.types import COMPUTATIONS, SCORING_COMPUTATIONS, Computation, Float32, Int64

log = logging.getLogger(__name__)
KeyOf: TypeAlias = Callable[[RunSpec, Computation, Computation | None], Mapping[str, Any]]

ANSWER_COLUMNS = ["answer_ids", "answer_logprob", "answer_margin", "stop_reason"]


@dataclass
class RunRollouts:
    """The rollouts of a run.

    Attributes:
        rows: as the cache has them, in the order of `RunSpec.wanted`; equal answers are one object, and what was
            measured includes scoring.
        dissimilarity_RT: per latent the dissimilarities with the rollouts before, see `cache.ROLLOUT_FIELDS`; NaN
            where a rollout has none.
        scores: None without a scorer.
        cache: where they are kept.
        drawn_now: how many the cache did not have.
        winners: None where all answers were decoded.
        outcome: where each question ended, if the budget looked at its rollouts.
        timeline: which worker was busy when.
    """

    rows: pd.DataFrame
    dissimilarity_RT: Float32
    scores: Scores | None
    cache: RolloutCache
    drawn_now: int
    winners: Winners | None = None
    outcome: Outcome | None = None
    timeline: list[Span] = field(default_factory=list)


@dataclass
class Winners:
    """The picks of a run that decodes nothing else (`answer.decode=winners`).

    Attributes:
        picks: for each reported n the number of each question's pick.
        decoding: `cache.MEASURED_SUMS` of each rollout's answer, NaN where it was not decoded.
        decoded_now: how many answers the cache did not have.
    """

    picks: dict[int, np.ndarray]
    decoding: pd.DataFrame
    decoded_now: int


def draw_rollouts(spec: RunSpec, latents: Path | None = None) -> RunRollouts:
    """Draw and score what the cache lacks, and read the rest.

    Args:
        spec: the run.
        latents: where to write the latents of all rollouts; None to keep none.

    Raises:
        RunError: a failure while drawing or scoring; what was computed stays in the cache.
    """
    if spec.decode == "winners":
        return decode_winners(spec, gather_rollouts(spec, latents_key, spec.wanted(), answers=False, latents=latents))
    if is_adaptive(spec.budget):
        return draw_in_rounds(spec, latents)
    return gather_rollouts(spec, rollout_key, spec.wanted(), latents=latents)


def draw_in_rounds(spec: RunSpec, latents: Path | None = None) -> RunRollouts:
    """Draw and score round by round, for a budget that looks at the rollouts of a round before it grants the next.

    The rollouts of a round are drawn together, so that questions that have stopped leave their places in a batch to the
    others. A question always gets rollouts 0, 1, 2, ..., so cache and tables nest with those of every other budget.
    """
    assert is_adaptive(spec.budget)
    reader = AnswerReader(spec)
    tallying, before = Tallying(spec, reader.read), [0] * len(spec.questions)
    rounds, drawn_now, scored_now = 0, 0, 0
    timeline: list[Span] = []
    drawing = replace(spec, on_answers=spec.on_answers or reader.take)  # `ltts ask` reads them itself

    def tallies_after(drawn_Q: Int64) -> list[Tally]:
        nonlocal before, rounds, drawn_now, scored_now
        part = replace(drawing, counts=drawn_Q.tolist())
        new = part.wanted(before)
        if not new.empty:
            rounds += 1
            with report.in_round(rounds):
                rollouts = gather_rollouts(part, rollout_key, new)
            tallying.add(
                rollouts.rows, None if rollouts.scores is None else rollouts.scores.score, before, part.table_counts
            )
            drawn_now, before = drawn_now + rollouts.drawn_now, part.table_counts
            scored_now += 0 if rollouts.scores is None else rollouts.scores.scored_now
            timeline.extend(rollouts.timeline)
        return tallying.tallies()

    with reader:
        outcome = Outcome(*play(spec.budget, len(spec.questions), tallies_after))
    log.info("rounds: %d; rollouts: %d, %d of them drawn now", rounds, sum(outcome.counts), drawn_now)
    ended = replace(spec, counts=outcome.counts, refresh=False)
    with report.in_round(rounds + 1):
        rollouts = gather_rollouts(ended, rollout_key, ended.wanted(), latents=latents)
    rollouts.outcome, rollouts.drawn_now = outcome, drawn_now
    if rollouts.scores is not None:
        rollouts.scores.scored_now += scored_now
    rollouts.timeline = timeline + rollouts.timeline
    return rollouts


def gather_rollouts(
    spec: RunSpec,
    key_of: KeyOf,
    wanted: pd.DataFrame,
    *,
    answers: bool = True,
    scored: bool = True,
    dissimilarity: Mapping[tuple[str, int], np.ndarray] | None = None,
    latents: Path | None = None,
) -> RunRollouts:
    """Some rollouts of a run, those that the cache has and the others drawn now, scored where there is a scorer.

    A model is loaded only if something is missing. How it is computed is part of the key, and known once it is loaded;
    a complete entry serves whichever way that was: each is checked against the model's own pass before it draws.

    Args:
        spec: the run.
        key_of: what determines the rollouts.
        wanted: which ones (columns `row_key`, `rollout`), those of a question side by side.
        answers: whether to decode the answers.
        scored: whether the run's scorer scores them.
        dissimilarity: of each rollout, where it is known; see `cache.ROLLOUT_FIELDS`.
        latents: where to write the latents of all of them; None to keep none.

    Raises:
        RunError: a failure while drawing or scoring; what was computed stays in the cache.
    """
    found: dict[Path, CachedRollouts] = {}
    for cache in entries(spec, key_of):
        if spec.refresh:
            cache.require_writable("cache=refresh draws its rollouts again")
            cache.discard(wanted)
        found[cache.folder] = CachedRollouts.read(spec, cache, wanted, scored=scored)
        if found[cache.folder].complete:
            break
    else:
        check_writable(spec.cache)
        from latent_tts.pipeline.driver import find_computations

        ways = find_computations(spec, scored=spec.guided)
        cache = RolloutCache(spec.cache, key_of(spec, *ways), {"name": spec.adapter.name})
    cached = found.get(cache.folder) or CachedRollouts.read(spec, cache, wanted, scored=scored)
    cached.log_found()
    shape = spec.adapter.latents, spec.shape.width
    keeping = nullcontext() if latents is None else latents_file(latents, wanted, shape, spec.engine.dtype)
    with keeping as keep:
        return cached.complete_with(spec, keep, answers=answers, dissimilarity=dissimilarity)


@dataclass
class CachedRollouts:
    """What a cache entry has of some rollouts and of their scores.

    Attributes:
        cache: the entry.
        rows: the rollouts.
        scores: of them, for each way to compute the scorer; none without a scorer.
    """

    cache: RolloutCache
    rows: GatheredRows
    scores: list[CachedScores]

    @classmethod
    def read(cls, spec: RunSpec, cache: RolloutCache, wanted: pd.DataFrame, *, scored: bool) -> CachedRollouts:
        """Read what the cache entry has."""
        ways = SCORING_COMPUTATIONS if scored and spec.scorer is not None else []
        scores = [CachedScores(spec, cache.folder, wanted, way) for way in ways]
        self = cls(cache, GatheredRows(wanted, ROLLOUT_FIELDS), scores)
        self._read()
        return self

    def _read(self) -> None:
        self.cache.gather(self.rows, {scores.digest: scores.rows for scores in self.scores})
        for scores in self.scores:
            scores.gather_rescored()

    @property
    def complete(self) -> bool:
        """Whether it has every rollout."""
        return self.rows.missing().empty

    def log_found(self) -> None:
        """Log what was found."""
        there = len(self.rows.wanted) - len(self.rows.missing())
        scored = max((len(scores.rows.wanted) - len(scores.rows.missing()) for scores in self.scores), default=0)
        of_scores = f", {'all' if scored == there else scored} of them scored" if self.scores else ""
        if there:
            log.info(
                "%d of %d rollouts are in the cache %s%s", there, len(self.rows.wanted), self.cache.folder, of_scores
            )

    def _settle_scores(self, spec: RunSpec) -> CachedScores | None:
        """Keep the scores that are complete, however they were computed, or those of the way that serves now."""
        found = [each for each in self.scores if each.rows.missing().empty]
        if self.scores and not found:
            from latent_tts.pipeline.driver import find_computations

            _, way = find_computations(spec, scored=True)
            found = [each for each in self.scores if way is not None and each.computation.attention == way.attention]
        self.scores = found[:1]
        return found[0] if found else None

    def complete_with(
        self,
        spec: RunSpec,
        keep: KeepLatents | None,
        *,
        answers: bool,
        dissimilarity: Mapping[tuple[str, int], np.ndarray] | None,
    ) -> RunRollouts:
        """Draw and score what is missing; see `gather_rollouts`."""
        missing = self.rows.missing()
        if len(missing):
            self.cache.require_writable(f"{len(missing)} rollouts are missing from it")
        elif self.scores and not any(scores.rows.missing().empty for scores in self.scores):
            self.cache.require_writable("scores of its rollouts are missing from it")
        scores, unscored = self._settle_scores(spec), 0
        timeline: list[Span] = []
        if scores is not None:
            unscored = len(scores.rows.missing())
        if len(missing):
            from latent_tts.pipeline.driver import draw

            # official positions need all answers first
            at_once = scores is not None and spec.scorer is not None and spec.scorer.positions == "correct"
            timeline += draw(
                spec, self.cache, missing, answers=answers, scored=at_once, dissimilarity=dissimilarity, keep=keep
            )
            self._read()
        if len(gone := self.rows.missing()):
            where = f"the cache {self.cache.folder}; re-run the command to draw them"
            raise RunError(f"{len(gone)} rollouts are missing from {where}")
        rows = self.rows.frame()
        offsets = {} if scores is None else score_positions(spec, rows)
        to_score = scores.rows.missing() if scores is not None else missing.iloc[:0]
        to_keep = self.rows.wanted.drop(missing.index) if keep is not None else missing.iloc[:0]
        if len(to_score) or len(to_keep):
            from latent_tts.pipeline.driver import recompute_latents

            score_cache = scores.open() if scores is not None and len(to_score) else None
            timeline += recompute_latents(spec, score_cache, to_score, offsets, to_keep, keep)
            self._read()
        return RunRollouts(
            rows=rows,
            dissimilarity_RT=self.rows.padded("dissimilarity"),
            scores=None if scores is None else reduce_scores(spec, scores, rows, offsets, unscored),
            cache=self.cache,
            drawn_now=missing["row_key"].nunique() * spec.n if spec.guided else len(missing),
            timeline=timeline,
        )


def decode_winners(spec: RunSpec, thought: RunRollouts) -> RunRollouts:
    """Decode the best-of-n pick of each reported n, each among the first n rollouts.

    The picks are drawn again in full, with the same random numbers, because an answer is decoded from the keys and
    values of its own rollout, which are not cached. They are cached with the complete rollouts of other runs.
    """
    assert thought.scores is not None, "winners are found by scores"
    n, wanted = spec.n, spec.wanted()
    score_QN = np.nan_to_num(thought.scores.score.astype(np.float32), nan=-np.inf).reshape(-1, n)
    picks = {budget: score_QN[:, :budget].argmax(1) for budget in spec.budget.reported(n)}
    places = np.unique(np.concatenate([np.arange(len(score_QN)) * n + pick for pick in picks.values()]))
    chosen = wanted.iloc[places].reset_index(drop=True)
    known = thought.dissimilarity_RT[places], thought.rows["latent_steps"].to_numpy()[places]
    dissimilarity = {
        (key, number): row[:steps]
        for key, number, row, steps in zip(chosen["row_key"], chosen["rollout"], *known, strict=True)
    }
    whole = gather_rollouts(spec, rollout_key, chosen, scored=False, dissimilarity=dissimilarity)
    rows = thought.rows
    for column in ANSWER_COLUMNS:
        values = rows[column].astype(object).tolist()
        for place, value in zip(places, whole.rows[column], strict=True):
            values[place] = value
        rows[column] = pd.Series(values, dtype=object).astype(rows[column].dtype)
    decoding = whole.rows[list(MEASURED_SUMS)].set_axis(places).reindex(range(len(rows)))
    thought.winners = Winners(picks, decoding, whole.drawn_now)
    thought.timeline += whole.timeline
    return thought


def entries(spec: RunSpec, key_of: KeyOf = rollout_key) -> Iterator[RolloutCache]:
    """The existing cache entries of a run's rollouts, one per way to compute them."""
    # the ways in which the models that determine them may be computed: the reasoner, a guiding scorer
    for ways in product(COMPUTATIONS, SCORING_COMPUTATIONS if spec.guided else [None]):
        key = key_of(spec, *ways)
        if (spec.cache / settings_digest(key)).is_dir():
            yield RolloutCache(spec.cache, key, {"name": spec.adapter.name})
