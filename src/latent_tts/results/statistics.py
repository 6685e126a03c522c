"""Statistics of scaling: coverage, accuracy of picks over subsets, diversity, intervals, paired differences.

Pure arrays. Shape letters: Q questions, D rollouts drawn per question, S subsets, N rollouts of a subset, B budgets,
C clusters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import combinations
from math import comb, log2
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latent_tts.aggregator import Aggregator, Picks, Ranking, Vote
from latent_tts.aggregator.weighted import Weighted
from latent_tts.random.philox import Stream, key_of, philox
from latent_tts.types import Bools, Floats, Int64, RolloutArrays

SUBSETS = 256
TEMPERATURES = tuple(2.0 ** (power / 2) for power in range(-12, 13))  # 1/64 to 64
TIE = 1e-12  # relative; equal weights summed in another order differ by less
MAX_CELLS = 2**16  # of one array in a loop, so that it fits the processor's cache and memory stays bounded
MAX_CACHED_DRAWN = 4096
Z = 1.959963984540054  # 97.5 % quantile of the normal distribution
NEGLIGIBLE = 1e-3  # share of the range; smaller deviations are hardly evidence of how values differ


# Figures over subsets


def coverage(correct_QD: Bools, n: int) -> Floats:
    """Unbiased pass@n of each question: 1 - C(d - c, n) / C(d, n), where c of d rollouts are right.

    Args:
        correct_QD: which of the d rollouts are right.
        n: size of a subset, 1 <= n <= d.

    Returns:
        (Q,), in [0, 1]; within 1e-12 for d up to 1,024 and 1e-9 up to 2**20.

    Raises:
        ValueError: n is out of range.

    Source: Chen et al. 2021 (arXiv 2107.03374), section 2.1.
    """
    return 1.0 - _none_of(correct_QD.shape[1], n)[correct_QD.sum(1)]


def picked_accuracies(aggregator: Aggregator, rollouts: RolloutArrays, budgets: Sequence[int]) -> Floats:
    """For each size, the share of subsets whose pick is right.

    The share is exact for a `Ranking`. For other rules it is exact at n = 1, at n = d, and where there are at most
    `SUBSETS` subsets of a size. Elsewhere it is the mean over `SUBSETS` subsets: the first n rollouts of as many seeded
    permutations, which depend on d alone. So each subset is contained in one of every larger budget.

    Args:
        aggregator: how a pick is made; a subset without a pick counts as wrong.
        rollouts: d of each question.
        budgets: subset sizes n, 1 <= n <= d each.

    Returns:
        (B, Q), in [0, 1]. A share depends on its question, d and n alone, not on other questions or budgets.

    Raises:
        ValueError: a budget is out of range.
    """
    correct_QD = rollouts.correct_QD
    assert correct_QD is not None, "accuracies need gold answers"
    parts = _parts(*correct_QD.shape)
    shares = [_accuracies(aggregator, rollouts.questions(part), correct_QD[part], budgets) for part in parts]
    return np.concatenate(shares, axis=1)


def _accuracies(aggregator: Aggregator, rollouts: RolloutArrays, correct_QD: Bools, budgets: Sequence[int]) -> Floats:
    rule = aggregator.rule(rollouts)
    if isinstance(rule, Ranking):
        return _ranked_accuracies(rule.value_QD, correct_QD, budgets)
    if isinstance(rule, Picks):
        pick, columns = rule.pick, 1
    else:
        column_DQ, log_weight_DQ = _votes(rule, rollouts.prediction_QD)
        pick, columns = partial(_elect, column_DQ, log_weight_DQ), int(column_DQ.max()) + 1

    def right(members_SN: Int64) -> Bools:
        pick_QS = pick(members_SN)
        return np.take_along_axis(correct_QD, np.maximum(pick_QS, 0), axis=1) & (pick_QS >= 0)

    return _means(right, correct_QD.shape, columns, budgets)


def _means(
    figure: Callable[[Int64], NDArray[Any]], shape: tuple[int, ...], columns: int, budgets: Sequence[int]
) -> Floats:
    """Means (B, Q) over subsets of a figure (Q, S) of some (S, N) of them, which has a table of so many columns."""
    questions, drawn = shape
    sum_BQ, count_B1 = np.zeros((len(budgets), questions)), np.zeros((len(budgets), 1))
    for place, members_SN in _all_subsets(drawn, budgets):
        count_B1[place] += len(members_SN)
        n = members_SN.shape[1]
        step = max(1, MAX_CELLS // max(questions * n, columns if n > 1 else 1))
        for start in range(0, len(members_SN), step):
            sum_BQ[place] += figure(members_SN[start : start + step]).sum(1)
    return sum_BQ / count_B1


def agreement(prediction_QD: NDArray[np.int64], n: int) -> Floats:
    """The share (Q,) of n rollouts of a question that give the most frequent answer among them, the mean over subsets.

    Args:
        prediction_QD: as in `RolloutArrays`; what cannot be read is no answer.
        n: rollouts of a subset, at most D.
    """
    return np.concatenate([_agreement(prediction_QD[part], n) for part in _parts(*prediction_QD.shape)])


def _agreement(prediction_QD: NDArray[np.int64], n: int) -> Floats:
    votes = _votes(Vote(np.zeros(prediction_QD.shape)), prediction_QD)
    columns = int(votes[0].max()) + 1
    return _means(lambda members_SN: _sums(*votes, members_SN).max(0).T, prediction_QD.shape, columns, [n])[0] / n


def supported_picks(aggregator: Aggregator, rollouts: RolloutArrays) -> tuple[Int64, Floats]:
    """The pick of each question among all its rollouts, and its support.

    A question may have fewer rollouts than others. Those that it lacks are unreadable and have neither log-probability
    nor score.

    Returns:
        Numbers (Q,) of the picked rollouts, -1 for none; and the support (Q,) of each: its value in a `Ranking`, its
        prediction's share of all weight in a `Vote`. NaN where there is no pick, and for other rules.
    """
    parts = _parts(*rollouts.prediction_QD.shape)
    pick, support = zip(*(_supported_picks(aggregator, rollouts.questions(part)) for part in parts), strict=True)
    return np.concatenate(pick), np.concatenate(support)


def _supported_picks(aggregator: Aggregator, rollouts: RolloutArrays) -> tuple[Int64, Floats]:
    rule, everyone_1D = aggregator.rule(rollouts), np.arange(rollouts.prediction_QD.shape[1])[None, :]
    if isinstance(rule, Picks):
        pick_Q = rule.pick(everyone_1D)[:, 0].astype(np.int64)
        return pick_Q, np.full(len(pick_Q), np.nan)
    if isinstance(rule, Ranking):
        value_QD = np.where(np.isnan(rule.value_QD), -np.inf, rule.value_QD)
        pick_Q1 = np.where(value_QD.max(1) > -np.inf, value_QD.argmax(1), -1)[:, None]
        support_Q = np.take_along_axis(value_QD, pick_Q1, axis=1)[:, 0]
    else:
        column_DQ, log_weight_DQ = _votes(rule, rollouts.prediction_QD)
        pick_Q1 = _elect(column_DQ, log_weight_DQ, everyone_1D)
        # a row per question: sums over columns would depend on how many questions there are
        weight_QD = np.ascontiguousarray(_relative_weights(log_weight_DQ).T)
        column_QD = np.ascontiguousarray(column_DQ.T)
        mine_QD = column_QD == np.take_along_axis(column_QD, pick_Q1, axis=1)
        support_Q = (weight_QD * mine_QD).sum(1) / np.maximum(weight_QD.sum(1), np.finfo(np.float64).tiny)
    return pick_Q1[:, 0], np.where(pick_Q1[:, 0] >= 0, support_Q, np.nan)


def _parts(questions: int, drawn: int) -> Iterator[slice]:
    """Slices of the questions whose arrays stay small; all of them where each slice would make permutations anew."""
    size = max(1, MAX_CELLS // drawn) if drawn <= MAX_CACHED_DRAWN else questions
    return (slice(start, start + size) for start in range(0, questions, size))


def subsets(drawn: int, n: int) -> Iterator[NDArray[np.int64]]:
    """The subsets of size n over which a figure at n is a mean: ascending rollout numbers, in pieces (S, N)."""
    return (members_SN for _, members_SN in _all_subsets(drawn, [n]))


def _all_subsets(drawn: int, budgets: Sequence[int]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """The subsets of several sizes: pieces (S, N) with the place of their size among the budgets."""
    sampled = []
    for place, n in enumerate(budgets):
        _check_budget(drawn, n)
        # for 1 < n < drawn there are at least `drawn` subsets, so that large binomials need not be computed
        if n in (1, drawn) or (drawn <= SUBSETS and comb(drawn, n) <= SUBSETS):
            yield place, np.array(list(combinations(range(drawn), n)))
        else:
            sampled.append(place)
    for orders_SD in _permutations(drawn) if sampled else ():
        for place in sampled:
            yield place, np.sort(orders_SD[:, : budgets[place]], axis=1)


def _check_budget(drawn: int, n: int) -> None:
    if not 1 <= n <= drawn:
        raise ValueError(f"n={n} is not in [1, {drawn}]")


def _none_of(drawn: int, n: int) -> Floats:
    """Probability (D + 1,) that a subset of size n holds none of c given rollouts, for c = 0..d."""
    _check_budget(drawn, n)
    c = np.arange(drawn)
    return np.multiply.accumulate(np.concatenate([[1.0], np.maximum(drawn - n - c, 0) / (drawn - c)]))


def _permutations(drawn: int) -> Iterator[NDArray[np.int64]]:
    """`SUBSETS` seeded permutations of the rollouts, in pieces (S, D)."""
    if drawn <= MAX_CACHED_DRAWN:
        yield _permutations_of(drawn, 0, SUBSETS)
    else:
        size = max(1, MAX_CELLS // (2 * drawn))
        for start in range(0, SUBSETS, size):
            yield _permutations_of.__wrapped__(drawn, start, min(size, SUBSETS - start))


@lru_cache(maxsize=4)
def _permutations_of(drawn: int, start: int, count: int) -> NDArray[np.int64]:
    blocks_1B, subset_S1 = np.arange(-(-drawn // 4))[None, :], np.arange(start, start + count)[:, None]
    words = philox((blocks_1B, subset_S1, 0, int(Stream.SUBSET)), key_of(0, f"permutations of {drawn}"))
    words_SD = np.stack(words, axis=-1).reshape(count, -1)[:, :drawn].astype(np.uint64)
    words_SD <<= np.uint64(32)
    words_SD |= np.arange(drawn, dtype=np.uint64)  # equal words are in the order of rollout numbers
    words_SD.sort(axis=1)
    words_SD &= np.uint64(0xFFFFFFFF)
    return words_SD.astype(np.int64)


def _ranked_accuracies(value_QD: Floats, correct_QD: Bools, budgets: Sequence[int]) -> Floats:
    value_QD = np.where(np.isnan(value_QD), -np.inf, value_QD)
    order_QD = np.argsort(-value_QD, axis=1, kind="stable")
    right_QD = np.take_along_axis(correct_QD & (value_QD > -np.inf), order_QD, axis=1)
    # P(the pick has rank r) = P(a subset holds none of the r best) - P(it holds none of the r + 1 best)
    return np.array([(right_QD * -np.diff(_none_of(value_QD.shape[1], n))).sum(1) for n in budgets])


def _votes(rule: Vote, prediction_QD: Int64) -> tuple[Int64, Floats]:
    """The column of each rollout (D, Q) in one table of all questions and predictions, and its log-weight (D, Q).

    Those of a question that do not vote share a column, and their log-weight is -inf.
    """
    votes_QD = (prediction_QD >= 0) & np.isfinite(rule.log_weight_QD)
    prediction_QD = np.where(votes_QD, prediction_QD, -1)
    order_QD = np.argsort(prediction_QD, axis=1)
    sorted_QD = np.take_along_axis(prediction_QD, order_QD, axis=1)
    new_QD = np.diff(sorted_QD, axis=1, prepend=-2) > 0
    column_QD = np.empty_like(order_QD)
    np.put_along_axis(column_QD, order_QD, new_QD.cumsum().reshape(new_QD.shape) - 1, axis=1)
    log_weight_QD = np.where(votes_QD, rule.log_weight_QD, -np.inf)
    return np.ascontiguousarray(column_QD.T), np.ascontiguousarray(log_weight_QD.T)


def _elect(column_DQ: Int64, log_weight_DQ: Floats, members_SN: Int64) -> Int64:
    """The picks (Q, S) of votes among the members of each subset, -1 for none; see `_votes`."""
    sum_NSQ = _sums(column_DQ, log_weight_DQ, members_SN)
    most_SQ = sum_NSQ.max(0)
    least_SQ = np.where(most_SQ > 0, most_SQ * (1 - TIE), np.inf)  # those who do not vote have a sum of 0
    # the lowest number has the highest of these, and 0 is for none; a product of int32 is faster than `np.where`
    last_NS1 = (len(column_DQ) - members_SN.T.astype(np.int32))[..., None]
    pick_SQ = ((sum_NSQ >= least_SQ) * last_NS1).max(0)
    return np.where(pick_SQ > 0, len(column_DQ) - pick_SQ, -1).T


def _sums(column_DQ: Int64, log_weight_DQ: Floats, members_SN: Int64) -> np.ndarray:
    """The weight (N, S, Q) for each member's prediction in its subset, relative to the largest weight of a member."""
    weight_NSQ = _relative_weights(log_weight_DQ[members_SN.T])
    if members_SN.shape[1] == 1:  # many subsets, for which a table would be large
        return weight_NSQ
    cell_NSQ = column_DQ[members_SN.T]
    cell_NSQ += np.arange(len(members_SN))[:, None] * (column_DQ.max() + 1)
    return np.bincount(cell_NSQ.ravel(), weight_NSQ.ravel())[cell_NSQ]


def _relative_weights(log_weight: Floats) -> Floats:
    """Weights relative to the largest along the first axis, so that they neither overflow nor all underflow."""
    most = log_weight.max(0)
    relative = log_weight - np.where(most > -np.inf, most, 0.0)
    return np.exp(relative, out=relative)


def best_temperature(rollouts: RolloutArrays, grid: Sequence[float] = TEMPERATURES) -> float:
    """The temperature of the weighted vote that is right most often, over all drawn rollouts of each question.

    Args:
        rollouts: scored rollouts of questions of `valid`.
        grid: temperatures to try, each positive.

    Returns:
        The best one; of equally good ones the one nearest to 1 (in ratio), and of two equally near ones the lower.
    """
    drawn = rollouts.prediction_QD.shape[1]
    right = {value: float(picked_accuracies(Weighted(value), rollouts, [drawn]).sum()) for value in grid}
    return min(grid, key=lambda value: (-right[value], round(abs(log2(value)), 9), value))


# Latents


def diversity(dissimilarity_NT: Floats) -> float | None:
    """Mean pairwise cosine dissimilarity of one question's latents, averaged over steps; None for one rollout.

    Args:
        dissimilarity_NT: 1 - cosine with the latent of the same step, summed over the rollouts before; NaN at steps
            that a rollout does not have. Only steps that all rollouts have count.

    Source: You et al. (arXiv 2510.07745), section 5: 1 - cos, over pairs of rollouts, mean over steps.
    """
    count = len(dissimilarity_NT)
    shared_NT = dissimilarity_NT[:, ~np.isnan(dissimilarity_NT).any(0)]
    if count < 2 or shared_NT.shape[1] == 0:
        return None
    pairs = count * (count - 1) / 2
    # rounding may make equal latents differ by a little less than 0
    return max(0.0, float(shared_NT.sum(0, dtype=np.float64).mean() / pairs))


# Intervals


def interval(
    values_N: Floats, clusters: NDArray[np.int64] | None = None, *, low: float = 0.0, high: float = 1.0
) -> tuple[float, float]:
    """95 % interval of the mean of values in [low, high], over the questions that these are a sample of.

    It is a score interval: the set of means p that are within t standard errors of the sample mean m, where the
    variance is the one that the data would have if their mean were p. For p = m + x, with C questions, A = m - low,
    B = high - m and s2 the variance of the data, the upper end solves

        C x^2 = t^2 V(x),   V(x) = (B - x) (s2 / B + L x),

    and the lower end the same with A in place of B. V is the variance after a share x / (L' B) of the data has moved
    up. A mean higher than the sample's needs values that the sample lacks, and L in (0, 1] says how large they are
    relative to the range. L = 1 puts them at the bound; L = s2 / (A B) lets all data grow alike. Between the two,

        L = w + (1 - w) s2 / (A B),   w = exp(-k / 2),   k = (sum e^2)^2 / sum e^4,

    where e are the deviations from m and k is the number of questions that carry the variance. So the bound is assumed
    where nothing shows how values differ. t is Student's quantile with 2 C / (kurtosis - 1 - skewness^2) degrees of
    freedom (Satterthwaite). They are infinite if there are only two different values, since m then determines s2.

    - Values 0 and 1 have s2 = A B, so that L = 1, t = 1.96 and V = p (1 - p): Wilson's interval.
    - Differences that are all 0 have s2 = 0: the half-width is t^2 / (C + t^2), as in Tango's interval for paired
      shares.
    - As means over subsets approach 0 and 1, their interval approaches Wilson's.
    - The width is never 0, unless low = high.

    Args:
        values_N: one per question, or several with `clusters`.
        clusters: the question of each value, if questions occur several times (once per seed). Questions are the
            sampling unit: variance is estimated between them.
        low: the least possible value.
        high: the largest possible value.

    Returns:
        Lower and upper end, within [low, high] and on either side of the mean.

    Source: Wilson 1927 (JASA 22, 209); Tango 1998 (Stat. Med. 17, 891); Satterthwaite 1946 (Biometrics Bull. 2, 110);
    Student's quantile: Wallace 1959 (Ann. Math. Stat. 30, 1124). V, L and w are this project's own; their coverage is
    held by tests/results/test_intervals.py.
    """
    owner_N = np.arange(len(values_N)) if clusters is None else np.unique(clusters, return_inverse=True)[1]
    share_C = np.bincount(owner_N) / len(values_N)
    count = len(share_C)
    mean = float(np.clip(np.mean(values_N), low, high))
    # the deviations of the clusters' means, weighted by the clusters' sizes
    e_C = count * (np.bincount(owner_N, values_N) / len(values_N) - share_C * mean)
    square_C = np.square(e_C)
    moment2, moment4 = float(square_C.mean()), float(np.square(square_C).mean())
    below, above = mean - low, high - mean
    at_bound = count * float(np.square(share_C).sum())  # L of values at the bound: 1 for equally large clusters
    carriers = count * moment2**2 / (moment4 + (NEGLIGIBLE * (high - low)) ** 4 / count)
    weight = float(np.exp(-carriers / 2))
    alike = min(moment2 / (below * above), at_bound) if below * above > 0 else at_bound
    unseen = weight * at_bound + (1 - weight) * alike
    quantile2 = Z**2
    if moment2 > 0:
        standard_C = square_C / moment2
        skewness = np.mean(standard_C * e_C) / np.sqrt(moment2)
        spread = (1 - weight) * float(np.square(standard_C).mean() - 1 - skewness**2)
        freedom = 2 * count / max(spread, 1e-12)
        quantile2 = freedom * float(np.expm1((Z * (8 * freedom + 3) / (8 * freedom + 1)) ** 2 / freedom))
    k = quantile2 / count

    def reach(room: float) -> float:
        linear = k * (unseen * room - (moment2 / room if room > 0 else 0.0))
        root = np.sqrt(linear**2 + 4 * (1 + k * unseen) * k * moment2)
        return min(room, float(linear + root) / (2 * (1 + k * unseen)))

    return mean - reach(below), mean + reach(above)


def paired_difference(a_N: Floats, b_N: Floats, clusters: NDArray[np.int64]) -> tuple[float, float, float]:
    """The mean of a - b over paired values in [0, 1], and its `interval`, where `clusters` are the questions."""
    difference_N = a_N - b_N
    return float(difference_N.mean()), *interval(difference_N, clusters, low=-1.0)
