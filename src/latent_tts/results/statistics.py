"""Statistics of scaling: coverage, accuracy of picks over subsets, diversity, intervals, paired differences.

Pure arrays. Shape letters: Q questions, D rollouts drawn per question, S subsets, N rollouts of a subset, B budgets,
C clusters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import combinations, pairwise
from math import comb, log2

import numpy as np
from numpy.typing import NDArray

from latent_tts.aggregator import Aggregator, Picks, Ranking, Vote
from latent_tts.aggregator.weighted import Weighted
from latent_tts.random.philox import Stream, key_of, philox
from latent_tts.types import Bools, Floats, Int64, RolloutArrays

SUBSETS = 256
TEMPERATURES = tuple(2.0 ** (power / 2) for power in range(-12, 13))  # 1/64 to 64
TIE = 1e-12  # relative; equal weights summed in another order differ by less
MAX_CELLS = 2**15  # of one array in a loop, so that it fits the processor's cache and memory stays bounded
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
    for n in budgets:
        _check_budget(correct_QD.shape[1], n)
    result_BQ = np.empty((len(budgets), len(correct_QD)))
    for part in _parts(*correct_QD.shape):
        result_BQ[:, part] = _accuracies(aggregator, rollouts.questions(part), correct_QD[part], budgets)
    return result_BQ


def _accuracies(aggregator: Aggregator, rollouts: RolloutArrays, correct_QD: Bools, budgets: Sequence[int]) -> Floats:
    rule = aggregator.rule(rollouts)
    if isinstance(rule, Ranking):
        return _ranked_accuracies(rule.value_QD, correct_QD, budgets)
    if isinstance(rule, Picks):
        return np.array([_called_accuracy(aggregator, rollouts, correct_QD, n) for n in budgets])
    return _voted_accuracies(*_votes(rule, rollouts), correct_QD, budgets)


def agreement(prediction_QD: NDArray[np.int64], n: int) -> Floats:
    """The share (Q,) of n rollouts of a question that give the most frequent answer among them, the mean over subsets.

    Args:
        prediction_QD: as in `RolloutArrays`; what cannot be read is no answer.
        n: rollouts of a subset, at most D.
    """
    drawn = prediction_QD.shape[1]
    _check_budget(drawn, n)
    pieces = list(subsets(drawn, n))
    shares = np.empty(len(prediction_QD))
    for question, row_D in enumerate(prediction_QD):
        is_answer_CD = row_D == np.unique(row_D[row_D >= 0])[:, None]
        counts = [is_answer_CD[:, piece_SN].sum(2).max(0, initial=0) for piece_SN in pieces]
        shares[question] = np.concatenate(counts).mean() / n
    return shares


def picks(aggregator: Aggregator, rollouts: RolloutArrays) -> Int64:
    """The pick (Q,) of each question among all its rollouts; -1 for none.

    A question may have fewer rollouts than others. Those that it lacks are unreadable and have neither log-probability
    nor score.
    """
    rule, drawn = aggregator.rule(rollouts), rollouts.prediction_QD.shape[1]
    if isinstance(rule, Ranking):
        value_QD = np.where(np.isnan(rule.value_QD), -np.inf, rule.value_QD)
        return np.where(value_QD.max(1) > -np.inf, value_QD.argmax(1), -1)
    if isinstance(rule, Picks):
        return rule.pick(np.arange(drawn)[None, :])[:, 0].astype(np.int64)
    classes_QD, log_weight_QD = _votes(rule, rollouts)
    # the lowest rollout number comes last: see `_vote_counts`
    all_in_one_step = [np.arange(drawn)[::-1, None]]
    width = int(classes_QD.max()) + 1
    return next(_elect(all_in_one_step, np.ascontiguousarray(classes_QD.T), width, log_weight_QD.T.copy()))[0]


def supported_picks(aggregator: Aggregator, rollouts: RolloutArrays) -> tuple[Int64, Floats]:
    """The pick of each question, as in `picks`, and its support.

    Returns:
        Numbers (Q,) of the picked rollouts, -1 for none; and the support (Q,) of each: its value in a `Ranking`, its
        prediction's share of all weight in a `Vote`. NaN where there is no pick, and for other rules.
    """
    parts = _parts(*rollouts.prediction_QD.shape)
    pick, support = zip(*(_supported_picks(aggregator, rollouts.questions(part)) for part in parts), strict=True)
    return np.concatenate(pick), np.concatenate(support)


def _supported_picks(aggregator: Aggregator, rollouts: RolloutArrays) -> tuple[Int64, Floats]:
    rule, pick_Q = aggregator.rule(rollouts), picks(aggregator, rollouts)
    if isinstance(rule, Picks):
        return pick_Q, np.full(len(pick_Q), np.nan)
    place_Q1 = np.maximum(pick_Q, 0)[:, None]
    if isinstance(rule, Ranking):
        support_Q = np.take_along_axis(rule.value_QD, place_Q1, axis=1)[:, 0]
    else:
        classes_QD, log_weight_QD = _votes(rule, rollouts)
        most_Q1 = log_weight_QD.max(1, keepdims=True)
        weight_QD = np.exp(log_weight_QD - np.where(np.isfinite(most_Q1), most_Q1, 0.0))
        mine_QD = classes_QD == np.take_along_axis(classes_QD, place_Q1, axis=1)
        support_Q = (weight_QD * mine_QD).sum(1) / np.maximum(weight_QD.sum(1), np.finfo(np.float64).tiny)
    return pick_Q, np.where(pick_Q >= 0, support_Q, np.nan)


def _parts(questions: int, drawn: int) -> Iterator[slice]:
    """Slices of the questions whose arrays stay small; all of them where each slice would make permutations anew."""
    size = max(1, 8 * MAX_CELLS // drawn) if drawn <= MAX_CACHED_DRAWN else questions
    return (slice(start, start + size) for start in range(0, questions, size))


def subsets(drawn: int, n: int) -> Iterator[NDArray[np.int64]]:
    """The subsets of size n over which a figure at n is a mean: ascending rollout numbers, in pieces (S, N)."""
    if _has_few_subsets(drawn, n):
        yield np.array(list(combinations(range(drawn), n)))
    elif n == 1:
        yield np.arange(drawn)[:, None]
    else:
        for orders_SD in _permutations(drawn):
            yield np.sort(orders_SD[:, :n], axis=1)


def _check_budget(drawn: int, n: int) -> None:
    if not 1 <= n <= drawn:
        raise ValueError(f"n={n} is not in [1, {drawn}]")


def _has_few_subsets(drawn: int, n: int) -> bool:
    # for n < drawn there are at least `drawn` subsets, so that large binomials need not be computed
    return n == drawn or (drawn <= SUBSETS and comb(drawn, n) <= SUBSETS)


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
        size = max(1, 4 * MAX_CELLS // drawn)
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


def _called_accuracy(aggregator: Aggregator, rollouts: RolloutArrays, correct_QD: Bools, n: int) -> Floats:
    questions, drawn = correct_QD.shape
    right_Q, count = np.zeros(questions), 0
    for members_SN in subsets(drawn, n):
        count += len(members_SN)
        for part_SN in np.array_split(members_SN, -(-members_SN.size // MAX_CELLS)):
            size = max(1, MAX_CELLS // part_SN.size)
            for start in range(0, questions, size):
                part = slice(start, start + size)
                chunk = rollouts.questions(part)
                rule = aggregator.rule(chunk)
                assert isinstance(rule, Picks)
                right_Q[part] += _right(rule.pick(part_SN), correct_QD[part]).sum(1)
    return right_Q / count


def _right(pick_QS: NDArray[np.integer], correct_QD: Bools) -> Bools:
    return (pick_QS >= 0) & np.take_along_axis(correct_QD, np.maximum(pick_QS, 0), axis=1)


def _votes(rule: Vote, rollouts: RolloutArrays) -> tuple[NDArray[np.int64], Floats]:
    """For each rollout the class of its prediction (0 where it does not vote) and its log-weight (-inf there)."""
    votes_QD = (rollouts.prediction_QD >= 0) & np.isfinite(rule.log_weight_QD)
    return _classes(rollouts.prediction_QD, votes_QD), np.where(votes_QD, rule.log_weight_QD, -np.inf)


def _voted_accuracies(
    classes_QD: NDArray[np.int64], log_weight_QD: Floats, correct_QD: Bools, budgets: Sequence[int]
) -> Floats:
    drawn = correct_QD.shape[1]

    def count(orders_SN: NDArray[np.int64], sizes: Sequence[int]) -> Floats:
        return _vote_counts(orders_SN, sizes, classes_QD, log_weight_QD, correct_QD)

    result_BQ = np.empty((len(budgets), len(correct_QD)))
    walked = sorted({n for n in budgets if n > 1 and not _has_few_subsets(drawn, n)})
    walked_BQ = np.zeros((len(walked), len(correct_QD)))
    for orders_SD in _permutations(drawn) if walked else ():
        walked_BQ += count(orders_SD, walked)
    for place, n in enumerate(budgets):
        if n == 1:
            result_BQ[place] = ((classes_QD > 0) & correct_QD).mean(1)
        elif n in walked:
            result_BQ[place] = walked_BQ[walked.index(n)] / SUBSETS
        else:
            members_SN = next(subsets(drawn, n))
            result_BQ[place] = count(members_SN, [n])[0] / len(members_SN)
    return result_BQ


def _classes(prediction_QD: NDArray[np.int64], votes_QD: Bools) -> NDArray[np.int64]:
    """Predictions numbered from 1 within each question; 0 for a rollout that does not vote."""
    prediction_QD = np.where(votes_QD, prediction_QD, -1)
    order_QD = np.argsort(prediction_QD, axis=1)
    sorted_QD = np.take_along_axis(prediction_QD, order_QD, axis=1)
    new_QD = np.diff(sorted_QD, axis=1, prepend=-1) > 0
    classes_QD = np.empty_like(order_QD)
    np.put_along_axis(classes_QD, order_QD, np.cumsum(new_QD, axis=1), axis=1)
    return classes_QD


def _vote_counts(
    orders_SN: NDArray[np.int64],
    sizes: Sequence[int],
    classes_QD: NDArray[np.int64],
    log_weight_QD: Floats,
    correct_QD: Bools,
) -> Floats:
    """For how many orders the first n rollouts elect a right pick, for each n of the ascending sizes (B, Q)."""
    # within a step the lowest rollout number comes last, since the last of several writes to a cell stays
    steps = [-np.sort(-orders_SN[:, low:high].T, axis=0) for low, high in pairwise([0, *sizes])]
    longest = max(map(len, steps))
    result_BQ = np.empty((len(sizes), len(correct_QD)))
    width_Q = classes_QD.max(1) + 1
    by_width = np.argsort(-width_Q, kind="stable")  # questions of about as many answers share a table
    start = 0
    while start < len(by_width):
        width = int(width_Q[by_width[start]])
        chunk = by_width[start : start + max(1, MAX_CELLS // (len(orders_SN) * max(width, longest)))]
        start += len(chunk)
        picks = _elect(steps, np.ascontiguousarray(classes_QD[chunk].T), width, log_weight_QD[chunk].T.copy())
        for place, pick_SQ in enumerate(picks):
            result_BQ[place, chunk] = _right(pick_SQ.T, correct_QD[chunk]).sum(1)
    return result_BQ


def _elect(
    steps: Sequence[NDArray[np.int64]], classes_DQ: NDArray[np.int64], width: int, log_weight_DQ: Floats
) -> Iterator[NDArray[np.int64]]:
    """After each step, which adds rollouts (N, S) to every subset, the picks (S, Q) of a vote; -1 for none."""
    drawn, questions = classes_DQ.shape
    shape = (width, steps[0].shape[1], questions)
    row_DQ = classes_DQ * (shape[1] * questions)
    column_SQ = np.arange(shape[1] * questions).reshape(shape[1:])
    weight_KSQ, first_KSQ = np.zeros(shape), np.full(shape, drawn)
    scale_SQ = np.full(shape[1:], -np.inf)
    for numbers_NS in steps:
        cell_NSQ = row_DQ[numbers_NS]
        cell_NSQ += column_SQ
        added_NSQ = log_weight_DQ[numbers_NS]
        # weights are relative to the largest of the subset so far, so that they neither overflow nor all underflow
        higher_SQ = np.maximum(scale_SQ, added_NSQ.max(0))
        safe_SQ = np.where(higher_SQ > -np.inf, higher_SQ, 0.0)
        added_NSQ -= safe_SQ
        np.exp(added_NSQ, out=added_NSQ)
        weight_KSQ *= np.exp(scale_SQ - safe_SQ)
        weight_KSQ += np.bincount(cell_NSQ.ravel(), added_NSQ.ravel(), weight_KSQ.size).reshape(shape)
        scale_SQ = higher_SQ
        lowest_KSQ = np.full(shape, drawn)
        lowest_KSQ.reshape(-1)[cell_NSQ] = numbers_NS[..., None]
        np.minimum(first_KSQ, lowest_KSQ, out=first_KSQ)
        most_SQ = weight_KSQ[1:].max(0, initial=0.0)
        best_KSQ = weight_KSQ[1:] >= np.where(most_SQ > 0, most_SQ * (1 - TIE), np.inf)
        pick_SQ = np.where(best_KSQ, first_KSQ[1:], drawn).min(0, initial=drawn)
        yield np.where(pick_SQ < drawn, pick_SQ, -1)


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
