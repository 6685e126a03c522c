"""The stage between a specification and its tables: rollouts drawn and scored where the cache lacks them, then read."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from latent_tts.errors import RunError
from latent_tts.pipeline.keys import latents_key, rollout_key
from latent_tts.pipeline.scores import Scores, open_scores, reduce_scores, score_positions
from latent_tts.pipeline.spec import RunSpec
from latent_tts.results.cache import MEASURED_SUMS, ROLLOUT_COLUMNS, SCORE_COLUMNS, RolloutCache
from latent_tts.results.parts import GatheredRows
from latent_tts.results.run_folder import LatentsFile
from latent_tts.types import Float32

log = logging.getLogger(__name__)

ANSWER_COLUMNS = ["answer_ids", "answer_logprob", "answer_margin", "stop_reason"]


@dataclass
class RunRollouts:
    """The rollouts of a run.

    Attributes:
        rows: as the cache has them, in the order of `RunSpec.wanted`; equal answers are one object.
        dissimilarity_RT: per latent the dissimilarities with the rollouts before, see `cache.ROLLOUT_COLUMNS`; NaN
            where a rollout has none.
        scores: None without a scorer.
        cache: where they are kept.
        drawn_now: how many the cache did not have.
        winners: None where all answers were decoded.
    """

    rows: pd.DataFrame
    dissimilarity_RT: Float32
    scores: Scores | None
    cache: RolloutCache
    drawn_now: int
    winners: Winners | None = None


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
        return decode_winners(spec, think_rollouts(spec, latents))
    return gather_rollouts(spec, open_cache(spec), spec.wanted(), latents=latents)


def think_rollouts(spec: RunSpec, latents: Path | None = None) -> RunRollouts:
    """The same without answers: latents and their scores."""
    cache = RolloutCache(spec.cache, latents_key(spec), about(spec))
    return gather_rollouts(spec, cache, spec.wanted(), answers=False, latents=latents)


def gather_rollouts(
    spec: RunSpec,
    cache: RolloutCache,
    wanted: pd.DataFrame,
    *,
    answers: bool = True,
    scored: bool = True,
    dissimilarity: Mapping[tuple[str, int], np.ndarray] | None = None,
    latents: Path | None = None,
) -> RunRollouts:
    """Some rollouts of a run, those that the cache has and the others drawn now, scored where there is a scorer.

    A model is loaded only if something is missing.

    Args:
        spec: the run.
        cache: of the rollouts.
        wanted: which ones (columns `row_key`, `rollout`), those of a question side by side.
        answers: whether to decode the answers.
        scored: whether the run's scorer is asked.
        dissimilarity: what `cache.ROLLOUT_COLUMNS` says of each, where it is known.
        latents: where to write the latents of all of them; None to keep none.

    Raises:
        RunError: a failure while drawing or scoring; what was computed stays in the cache.
    """
    if spec.refresh:
        cache.discard(wanted)
    scorer = spec.scorer if scored else None
    rows = GatheredRows(wanted, ROLLOUT_COLUMNS)
    scores = None if scorer is None else GatheredRows(wanted, SCORE_COLUMNS)
    score_cache = None if scorer is None else open_scores(spec, cache.folder)
    scored_by = "" if score_cache is None else score_cache.folder.name
    cache.gather(rows, scores, scored_by)
    lacking = rows.missing()
    _log_found(rows, f"in the cache {cache.folder}")
    unscored = 0
    if scores is not None and score_cache is not None:
        score_cache.gather(scores)
        unscored = len(scores.missing())
        _log_found(scores, f"scored in the cache {score_cache.folder}")
    kept = None
    if latents is not None:
        kept = LatentsFile(latents, wanted, (spec.adapter.latents, spec.shape.width), spec.engine.dtype)
    with kept or nullcontext():
        if len(lacking):
            from latent_tts.pipeline.drawing import draw

            at_once = scorer is not None and scorer.positions == "correct"  # official ones need all answers first
            draw(spec, cache, lacking, answers=answers, scored=at_once, dissimilarity=dissimilarity, kept=kept)
            cache.gather(rows, scores, scored_by)
        if len(gone := rows.missing()):
            raise RunError(
                f"{len(gone)} rollouts are missing from the cache {cache.folder}; re-run the command to draw them"
            )
        found = rows.frame()
        offsets = {} if scorer is None else score_positions(spec, found)
        to_score = None if scores is None else scores.missing()
        to_keep = None if kept is None else wanted.drop(lacking.index)
        if any(part is not None and len(part) for part in (to_score, to_keep)):
            from latent_tts.pipeline.drawing import think_again

            think_again(spec, score_cache, to_score, offsets, to_keep, kept)
            if score_cache is not None and scores is not None:
                score_cache.gather(scores)
    drawn = lacking["row_key"].nunique() * spec.n if spec.search.guided else len(lacking)
    return RunRollouts(
        rows=found,
        dissimilarity_RT=rows.padded("dissimilarity"),
        scores=None if scores is None else reduce_scores(spec, scores, offsets, unscored),
        cache=cache,
        drawn_now=drawn,
    )


def decode_winners(spec: RunSpec, thought: RunRollouts) -> RunRollouts:
    """Decode the best-of-n pick of each reported n, each among the first n rollouts.

    The picks are drawn again in full, with the same random numbers, and kept with the whole rollouts of other runs:
    their answers read keys and values that were made under the rollout's own masks.
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
    whole = gather_rollouts(spec, open_cache(spec), chosen, scored=False, dissimilarity=dissimilarity)
    rows = thought.rows
    for column in ANSWER_COLUMNS:
        values = rows[column].astype(object).tolist()
        for place, value in zip(places, whole.rows[column], strict=True):
            values[place] = value
        rows[column] = pd.Series(values, dtype=object).astype(rows[column].dtype)
    decoding = whole.rows[list(MEASURED_SUMS)].set_axis(places).reindex(range(len(rows)))
    thought.winners = Winners(picks, decoding, whole.drawn_now)
    return thought


def open_cache(spec: RunSpec) -> RolloutCache:
    """The cache of a run's rollouts."""
    return RolloutCache(spec.cache, rollout_key(spec), about(spec))


def about(spec: RunSpec) -> dict[str, Any]:
    """What `ltts cache` says of a cache folder, without being part of its key."""
    return {"name": spec.adapter.name}


def _log_found(rows: GatheredRows, where: str) -> None:
    there = len(rows.wanted) - len(rows.missing())
    if there:
        log.info("%d of %d rollouts are %s", there, len(rows.wanted), where)
