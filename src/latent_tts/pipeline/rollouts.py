"""The stage between a specification and its tables: rollouts drawn and scored where the cache lacks them, then read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from latent_tts.pipeline.keys import latents_key, rollout_key
from latent_tts.pipeline.scores import Scores, score_rollouts
from latent_tts.pipeline.spec import RunSpec
from latent_tts.results.cache import MEASURED_SUMS, RolloutCache, unpack_latents
from latent_tts.results.files import settings_digest
from latent_tts.types import COMPUTATIONS, Computation

ANSWER_COLUMNS = ["answer_ids", "answer_logprob", "answer_margin", "stop_reason"]


@dataclass
class RunRollouts:
    """The rollouts of a run.

    Attributes:
        rows: as the cache has them, in the order of `RunSpec.wanted`.
        latents: of each rollout, (steps, D).
        scores: None without a scorer.
        cache: where they are kept.
        drawn_now: how many the cache did not have.
        winners: None where all answers were decoded.
    """

    rows: pd.DataFrame
    latents: list[np.ndarray]
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


def draw_rollouts(spec: RunSpec) -> RunRollouts:
    """Draw and score what the cache lacks, then read everything.

    Raises:
        RunError: a failure while drawing or scoring; what was computed stays in the cache.
    """
    if spec.decode == "winners":
        return decode_winners(spec, think_rollouts(spec))
    return read_rollouts(spec, *fill_cache(spec, rollout_key, spec.wanted()))


def think_rollouts(spec: RunSpec) -> RunRollouts:
    """The same without answers: latents and their scores."""
    return read_rollouts(spec, *fill_cache(spec, latents_key, spec.wanted(), answers=False))


def read_rollouts(spec: RunSpec, cache: RolloutCache, drawn_now: int) -> RunRollouts:
    """Read the rollouts of a run from a cache that has all of them, and score what has no scores yet."""
    rows = cache.read(spec.wanted())
    latents = unpack_latents(rows["latents"], spec.shape.width)
    scores = None if spec.scorer is None else score_rollouts(spec, cache.folder, rows["answer_ids"], latents)
    return RunRollouts(rows, latents, scores, cache, drawn_now)


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
    whole, decoded_now = fill_cache(spec, rollout_key, chosen)
    decoded, rows = whole.read(chosen), thought.rows.copy()
    for column in ANSWER_COLUMNS:
        values = rows[column].astype(object).tolist()
        for place, value in zip(places, decoded[column], strict=True):
            values[place] = value
        rows[column] = pd.Series(values, dtype=object).astype(rows[column].dtype)
    decoding = decoded[list(MEASURED_SUMS)].set_axis(places).reindex(range(len(rows)))
    thought.rows, thought.winners = rows, Winners(picks, decoding, decoded_now)
    return thought


def fill_cache(
    spec: RunSpec,
    key_of: Callable[[RunSpec, Computation], Mapping[str, Any]],
    wanted: pd.DataFrame,
    *,
    answers: bool = True,
) -> tuple[RolloutCache, int]:
    """Draw the rollouts that the cache lacks. A model is loaded only if something is missing.

    How a model is computed is part of the key, and known once it is loaded. An entry that has everything serves
    whichever way its rollouts were computed: it was right for them.

    Args:
        spec: the run.
        key_of: what determines the rollouts.
        wanted: columns `row_key`, `rollout`.
        answers: whether to decode the answers.

    Returns:
        The cache entry that has them, and how many were drawn.
    """
    lacking: dict[Path, dict[str, list[int]]] = {}
    for cache in entries(spec, key_of):
        if spec.refresh:
            cache.discard(wanted)
        lacking[cache.folder] = cache.missing(wanted)
        if not lacking[cache.folder]:
            return cache, 0
    from latent_tts.pipeline.drawing import draw, load

    cache = RolloutCache(spec.cache, key_of(spec, load(spec).computation), about(spec))
    return cache, draw(spec, cache, lacking.get(cache.folder) or cache.missing(wanted), answers=answers)


def entries(
    spec: RunSpec, key_of: Callable[[RunSpec, Computation], Mapping[str, Any]] = rollout_key
) -> Iterator[RolloutCache]:
    """The cache entries of a run's rollouts that are there, one per way to compute them."""
    for computation in COMPUTATIONS:
        key = key_of(spec, computation)
        if (spec.cache / settings_digest(key)).is_dir():
            yield RolloutCache(spec.cache, key, about(spec))


def about(spec: RunSpec) -> dict[str, Any]:
    """What `ltts cache` says of a cache folder, without being part of its key."""
    return {"name": spec.adapter.name}
