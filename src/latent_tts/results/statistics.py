"""Statistics of scaling: coverage, subset means of picks, diversity, bootstrap intervals, paired differences.

Pure arrays. Shape letters: Q questions, D rollouts drawn a question, S subsets, B bootstrap resamples, M metrics.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from math import comb, log2

import numpy as np
from numpy.typing import NDArray

from latent_tts.aggregator import Aggregator
from latent_tts.aggregator.weighted import Weighted
from latent_tts.random.philox import Stream, key_of, philox
from latent_tts.types import RolloutArrays

SUBSETS = 256
RESAMPLES = 2000
TEMPERATURES = tuple(2.0 ** (power / 2) for power in range(-12, 13))  # 1/64 to 64
Floats = NDArray[np.float64]


def coverage(correct_QD: NDArray[np.bool_], n: int) -> Floats:
    """Unbiased pass@n of each question: 1 - C(d - c, n) / C(d, n).

    Args:
        correct_QD: which of the d rollouts are right.
        n: budget, 1 <= n <= d.

    Returns:
        (Q,), in [0, 1].

    Source: Chen et al. 2021 (arXiv 2107.03374), section 2.1.
    """
    drawn = correct_QD.shape[1]
    if not 1 <= n <= drawn:
        raise ValueError(f"n={n} is not in [1, {drawn}]")
    by_count = np.array([1.0 - comb(drawn - c, n) / comb(drawn, n) for c in range(drawn + 1)])
    return by_count[correct_QD.sum(1)]


def subsets(drawn: int, n: int) -> NDArray[np.bool_]:
    """Which rollouts are in each of the subsets of size n that a figure at n is a mean over.

    Returns:
        (S, D) of bools, n True in each row: every subset where there are at most `SUBSETS` (so at n = 1 and n = drawn),
        which makes the mean exact; else `SUBSETS` random ones, which depend on (drawn, n) alone.
    """
    if comb(drawn, n) <= SUBSETS:
        members = np.array(list(combinations(range(drawn), n)))
    else:
        key = key_of(0, f"subsets of {n} of {drawn}")
        words = philox((np.arange(drawn)[None, :], np.arange(SUBSETS)[:, None], 0, int(Stream.SUBSET)), key)
        members = words[0].argsort(axis=1, kind="stable")[:, :n]
    chosen = np.zeros((len(members), drawn), dtype=bool)
    np.put_along_axis(chosen, members, True, axis=1)
    return chosen


def diversity(latents_NTD: NDArray[np.floating]) -> float | None:
    """Mean pairwise cosine dissimilarity of one question's latent thoughts, averaged over steps; None for one rollout.

    Source: You et al. (arXiv 2510.07745), section 5: 1 - cos, over pairs of rollouts, mean over steps.
    """
    count = latents_NTD.shape[0]
    if count < 2 or latents_NTD.shape[1] == 0:
        return None
    latents = latents_NTD.astype(np.float64)
    norms = np.linalg.norm(latents, axis=-1, keepdims=True)
    units = np.divide(latents, norms, out=np.zeros_like(latents), where=norms > 0)
    # sum over pairs of u_i . u_j, from |sum u|^2
    cosine_T = (np.square(units.sum(0)).sum(-1) - np.square(units).sum((0, 2))) / (count * (count - 1))
    return max(0.0, float(1.0 - cosine_T.mean()))  # equal latents differ by rounding alone


def bootstrap_weights(questions: int, clusters: NDArray[np.int64] | None = None) -> Floats:
    """Resampling weights (B, Q), each row summing to 1: how often a question is in a resample.

    Args:
        questions: Q.
        clusters: for each entry the question it belongs to, where a question occurs several times (once a seed): whole
            questions are resampled, with all their entries.
    """
    owner = np.arange(questions) if clusters is None else np.unique(clusters, return_inverse=True)[1]
    distinct = int(owner.max()) + 1
    key = key_of(0, f"bootstrap over {distinct}")
    blocks = -(-distinct // 4)
    words = philox((np.arange(blocks)[None, :], np.arange(RESAMPLES)[:, None], 0, int(Stream.BOOTSTRAP)), key)
    picks = np.stack(words, axis=-1).reshape(RESAMPLES, -1)[:, :distinct] * distinct >> 32
    counts = np.stack([np.bincount(row, minlength=distinct) for row in picks])[:, owner].astype(np.float64)
    return counts / counts.sum(1, keepdims=True)


def interval(values_Q: Floats, weights_BQ: Floats) -> tuple[float, float]:
    """95 % percentile-bootstrap interval of the mean of `values_Q`."""
    low, high = np.quantile(weights_BQ @ values_Q, [0.025, 0.975])
    return float(low), float(high)


def paired_difference(a_Q: Floats, b_Q: Floats, clusters: NDArray[np.int64]) -> tuple[float, float, float]:
    """Mean of a - b over paired entries with its 95 % interval, resampling questions with all their entries."""
    difference = a_Q - b_Q
    low, high = interval(difference, bootstrap_weights(len(difference), clusters))
    return float(difference.mean()), low, high


def picked_accuracy(aggregator: Aggregator, rollouts: RolloutArrays, n: int) -> Floats:
    """Share of `subsets` of size n whose pick is right, per question (Q,).

    A question whose every member is out of the running counts as wrong.
    """
    drawn = rollouts.correct_QD.shape[1]
    members_SD = subsets(drawn, n)
    means = []
    for start in range(0, len(rollouts.correct_QD), 128):  # bounds the (Q, S, D) arrays
        chunk = rollouts.questions(slice(start, start + 128))
        values = aggregator.values(chunk, members_SD)
        values = np.where(members_SD & ~np.isnan(values), values, -np.inf)
        winner_QS = values.argmax(-1)
        right = np.take_along_axis(chunk.correct_QD, winner_QS, axis=1) & (values.max(-1) > -np.inf)
        means.append(right.mean(1))
    return np.concatenate(means)


def choose_temperature(rollouts: RolloutArrays, grid: Sequence[float] = TEMPERATURES) -> float:
    """The temperature of the weighted vote that is right most often, over all drawn rollouts of each question.

    Args:
        rollouts: scored rollouts of questions of `valid`.
        grid: temperatures to try, each positive.

    Returns:
        The best one; of several equally good ones the nearest to 1 (in ratio), of two as near the lower.
    """
    drawn = rollouts.correct_QD.shape[1]
    right = {value: float(picked_accuracy(Weighted(value), rollouts, drawn).sum()) for value in grid}
    return min(grid, key=lambda value: (-right[value], round(abs(log2(value)), 9), value))
