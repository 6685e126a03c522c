"""Scores of rollouts: kept beside them in the cache, reduced to one per rollout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from latent_tts.errors import RunError
from latent_tts.pipeline.keys import score_key
from latent_tts.pipeline.spec import RunSpec, scorer_positions
from latent_tts.results.cache import MEASURED_SUMS, SCORE_FIELDS, SCORES_FOLDER, ScoreCache
from latent_tts.results.files import settings_digest
from latent_tts.results.parts import GatheredRows
from latent_tts.scorer.latent_rm import LatentRM
from latent_tts.types import Computation, Float32, Floats

ROWS_AT_ONCE = 1 << 14


@dataclass
class Scores:
    """The scores of a run's rollouts.

    Attributes:
        step_scores_RT: of each latent, NaN beyond a rollout's own; the rows are in the order of `RunSpec.wanted`. None
            unless the run keeps them.
        score: the score of each rollout.
        prefills: how many prompts the scorer ran for each question.
        scored_now: how many rollouts the cache had no scores of.
        seconds: that scoring took.
        attention: of the scorer; see `Computation`.
    """

    step_scores_RT: Float32 | None
    score: Floats
    prefills: list[int]
    scored_now: int
    seconds: float
    attention: str


class CachedScores:
    """What the cache has of the scores of a run's rollouts by its scorer, computed in one way.

    Attributes:
        computation: the way.
        digest: of the scorer's key.
        rows: the columns `cache.SCORE_FIELDS` of the rollouts.
    """

    def __init__(self, spec: RunSpec, rollouts: Path, wanted: pd.DataFrame, computation: Computation) -> None:
        """Begin without rows.

        Args:
            spec: the run, which has a scorer.
            rollouts: the folder of the rollouts.
            wanted: which ones (columns `row_key`, `rollout`).
            computation: the way.
        """
        self.computation, self.rows = computation, GatheredRows(wanted, SCORE_FIELDS)
        self._rollouts, self._key = rollouts, score_key(spec.given_scorer, spec.engine.dtype, spec.n, computation)
        self.digest = settings_digest(self._key)

    def open(self) -> ScoreCache:
        """The cache of scores that are made later, below the folder of the rollouts."""
        return ScoreCache(self._rollouts, self._key)

    def gather_rescored(self) -> None:
        """Gather what is missing from that cache, if it exists."""
        if (self._rollouts / SCORES_FOLDER / self.digest).is_dir():
            self.open().gather(self.rows)


def reduce_scores(
    spec: RunSpec,
    cached: CachedScores,
    rollouts: pd.DataFrame,
    offsets: Mapping[tuple[str, int], int],
    scored_now: int,
) -> Scores:
    """The scores of rollouts from their step scores. What scoring took is added to what drawing took.

    Args:
        spec: the run, which has a scorer.
        cached: all its rollouts.
        rollouts: the same rollouts; their columns `cache.MEASURED` are modified in place.
        offsets: see `score_positions`.
        scored_now: see `Scores`.
    """
    rows, step_scores_RT = cached.rows.frame(), cached.rows.padded("step_scores")
    seconds, score = float(rows["seconds"].sum()), np.empty(len(rows))
    for name in MEASURED_SUMS:
        rollouts[name] += rows.pop(name).to_numpy()
    peaks = [rollouts["peak_memory_bytes"].to_numpy(dtype=float), rows["peak_memory_bytes"].to_numpy()]
    rollouts["peak_memory_bytes"] = np.maximum(*peaks)
    for start in range(0, len(rows), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        score[part] = spec.given_scorer.score_rollouts(own_step_scores(step_scores_RT[part]))
    _check_finite(spec, rows, step_scores_RT, score)
    check_range(spec.given_scorer, score)
    distinct = [{offsets.get((spec.row_key(q), i), 0) for i in range(spec.n)} for q in spec.questions]
    kept_RT = step_scores_RT if spec.keep_steps else None
    return Scores(kept_RT, score, list(map(len, distinct)), scored_now, seconds, cached.computation.attention)


def own_step_scores(step_scores_RT: Float32) -> list[Float32]:
    """The step scores of some rollouts, each with as many as it has latents."""
    steps_R = (~np.isnan(step_scores_RT)).sum(1)
    return [row[:steps] for row, steps in zip(step_scores_RT, steps_R.tolist(), strict=True)]


def _check_finite(spec: RunSpec, rows: pd.DataFrame, step_scores_RT: Float32, score: Floats) -> None:
    """Raise RunError unless rollouts with steps have finite scores, and those without have none."""
    has_steps_R = np.asarray(~np.isnan(step_scores_RT).all(1))
    wrong_R = np.where(has_steps_R, ~np.isfinite(score), ~np.isnan(score))
    if wrong_R.any():
        row = int(wrong_R.argmax())
        question = next(each.id for each in spec.questions if spec.row_key(each) == rows["row_key"].iloc[row])
        raise RunError(
            f"scorer={spec.given_scorer.name}: it gives a rollout of question {question} the score "
            f"{score[row]:g}; "
            f"{'scores must be finite' if has_steps_R[row] else 'a rollout without latents has the score NaN'}"
        )


def check_range(scorer: LatentRM, score: Floats) -> None:
    """Raise RunError for a score beyond `scorer.range`."""
    if scorer.range is None:
        return
    low, high = scorer.range
    beyond = score[(score < low) | (score > high)]
    if len(beyond):
        raise RunError(f"scorer.range=[{low:g},{high:g}]: a rollout has the score {beyond[0]:g}; declare a wider range")


def score_positions(spec: RunSpec, rows: pd.DataFrame) -> dict[tuple[str, int], int]:
    """What `scorer.positions=official` adds to the positions of each (row key, rollout); empty for correct ones.

    Args:
        spec: the run, which has a scorer.
        rows: `row_key`, `rollout`, `answer_ids` and `latent_steps` of all its rollouts.

    Raises:
        RunError: a rollout's text is too long for the scorer.
    """
    scorer, adapter, n = spec.given_scorer, spec.adapter, spec.n
    if scorer.positions != "official":
        return {}
    from latent_tts.engine.official_positions import position_offsets

    texts = [adapter.answer_text([int(token) for token in ids]) for ids in rows["answer_ids"]]
    forced = len(adapter.thinking_end_ids)
    beyond = [
        steps + forced + scorer.count_tokens(text) for text, steps in zip(texts, rows["latent_steps"], strict=True)
    ]
    lengths = [
        [len(spec.prompts[question.id]) + tokens for tokens in beyond[place * n : (place + 1) * n]]
        for place, question in enumerate(spec.questions)
    ]
    longest, limit = max(map(max, lengths)), scorer_positions(scorer)
    if longest > limit:
        raise RunError(
            f"scorer.positions=official: a rollout's text has {longest} tokens, {scorer.name} takes {limit}\n"
            "scorer.positions=correct needs only the prompt and the latents"
        )
    shifts = [int(shift) for row in position_offsets(lengths) for shift in row]
    return dict(zip(rows[["row_key", "rollout"]].itertuples(index=False, name=None), shifts, strict=True))
