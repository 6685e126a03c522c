"""Scores of rollouts: taken from the cache, made where it lacks them, reduced to one per rollout."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from latent_tts.errors import RunError
from latent_tts.pipeline.keys import score_key
from latent_tts.pipeline.spec import RunSpec, scorer_positions
from latent_tts.results.cache import ScoreCache
from latent_tts.scorer import Scorer
from latent_tts.types import Floats


@dataclass
class Scores:
    """The scores of a run's rollouts.

    Attributes:
        rows: `step_scores` of each rollout and what scoring took, in the order of `RunSpec.wanted`.
        score: the score of each rollout.
        prefills: how many prompts the scorer ran for each question.
        scored_now: how many rollouts the cache had no scores of.
    """

    rows: pd.DataFrame
    score: np.ndarray
    prefills: list[int]
    scored_now: int


def score_rollouts(
    spec: RunSpec, rollout_folder: Path, answer_ids: Iterable[Sequence[int]], latents: Sequence[np.ndarray]
) -> Scores:
    """Score the run's rollouts, taking from the cache what is there.

    Args:
        spec: the run, which has a scorer.
        rollout_folder: cache folder of the rollouts; scores are kept in it.
        answer_ids: of each rollout, in the order of `RunSpec.wanted`; official positions count their tokens.
        latents: (steps, D) of each.

    Raises:
        RunError: a sequence is too long for the scorer, or a failure while scoring.
    """
    scorer, wanted = spec.scorer, spec.wanted()
    assert scorer is not None
    cache = ScoreCache(rollout_folder, score_key(scorer, spec.engine.dtype, spec.n))
    places: list[tuple[str, int]] = list(wanted[["row_key", "rollout"]].itertuples(index=False, name=None))
    shifts = {}
    if scorer.positions == "official":
        shifts = dict(zip(places, official_positions(spec, answer_ids, latents), strict=True))
    lacking = cache.missing(wanted)
    if lacking:
        from latent_tts.pipeline.drawing import score

        score(spec, cache, lacking, dict(zip(places, latents, strict=True)), shifts)
    rows = cache.read(wanted)
    step_scores = [np.asarray(steps, dtype=np.float64) for steps in rows["step_scores"]]
    counted = zip(spec.questions, spec.drawn, strict=True)
    distinct = [{shifts.get((spec.row_key(question), i), 0) for i in range(count)} for question, count in counted]
    score = scorer.score_rollouts(step_scores)
    check_range(scorer, score)
    return Scores(rows, score, list(map(len, distinct)), sum(map(len, lacking.values())))


def check_range(scorer: Scorer, score: Floats) -> None:
    """Raise RunError for a score beyond `scorer.range`."""
    if scorer.range is None:
        return
    low, high = scorer.range
    beyond = score[(score < low) | (score > high)]
    if len(beyond):
        raise RunError(f"scorer.range=[{low:g},{high:g}]: a rollout has the score {beyond[0]:g}; declare a wider range")


def official_positions(spec: RunSpec, answer_ids: Iterable[Sequence[int]], latents: Sequence[np.ndarray]) -> list[int]:
    """What `scorer.positions=official` adds to the positions of each rollout.

    Raises:
        RunError: a rollout's text is too long for the scorer.
    """
    from latent_tts.engine.official_positions import position_offsets

    scorer, adapter, n = spec.scorer, spec.adapter, spec.n
    assert scorer is not None
    texts = [adapter.answer_text([int(token) for token in ids]) for ids in answer_ids]
    forced = len(adapter.thinking_end_ids)
    beyond = [len(rows) + forced + scorer.count_tokens(text) for text, rows in zip(texts, latents, strict=True)]
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
    return [shift for row in position_offsets(lengths) for shift in row]
