"""Accuracy of picks by comparing all pairs of rollouts in every subset: the reference for `results.statistics`."""

import numpy as np

BLOCK = 128  # questions per block


def values(name, rollouts, members_SD, temperature=1.0):
    """The support for each rollout in each subset (Q, S, D); -inf if it cannot win."""
    shape = (len(rollouts.prediction_QD), *members_SD.shape)
    if name == "best_of_n":
        scores_QD = np.where(np.isnan(rollouts.score_QD), -np.inf, rollouts.score_QD)
        return np.broadcast_to(scores_QD[:, None, :], shape)
    if name == "likelihood":
        return np.broadcast_to(rollouts.answer_logprob_QD[:, None, :], shape)
    same_QDD = rollouts.prediction_QD[:, :, None] == rollouts.prediction_QD[:, None, :]
    if name == "majority":
        votes_QSD = members_SD.astype(np.float32) @ same_QDD.astype(np.float32)
        return np.where((rollouts.prediction_QD >= 0)[:, None, :], votes_QSD, -np.inf)
    assert name == "weighted"
    votes_QD = (rollouts.prediction_QD >= 0) & ~np.isnan(rollouts.score_QD)
    scores_QSD = np.where(votes_QD[:, None, :] & members_SD, rollouts.score_QD[:, None, :], -np.inf)
    highest_QS1 = scores_QSD.max(-1, keepdims=True)
    highest_QS1 = np.where(np.isfinite(highest_QS1), highest_QS1, 0.0)
    weights_QSD = np.exp((scores_QSD - highest_QS1) / temperature)
    sums_QSD = weights_QSD @ same_QDD.astype(np.float64)
    sums_QSD = np.where(votes_QD[:, None, :] & members_SD & (sums_QSD > 0), sums_QSD, -np.inf)
    # equal sums may differ by rounding, since a matrix product sums in different orders
    best_QSD = (sums_QSD > 0) & (sums_QSD >= sums_QSD.max(-1, keepdims=True) * (1 - 1e-12))
    return np.where(best_QSD, 1.0, -np.inf)


def accuracy(aggregator, rollouts, members_SN):
    """Share (Q) of the subsets (S, N) whose pick is right."""
    members_SD = np.zeros((len(members_SN), rollouts.correct_QD.shape[1]), dtype=bool)
    np.put_along_axis(members_SD, members_SN, True, axis=1)
    temperature = getattr(aggregator, "temperature", None)
    means = []
    for start in range(0, len(rollouts.correct_QD), BLOCK):
        chunk = rollouts.questions(slice(start, start + BLOCK))
        found = np.where(members_SD, values(aggregator.name, chunk, members_SD, temperature), -np.inf)
        winner_QS = found.argmax(-1)
        right = np.take_along_axis(chunk.correct_QD, winner_QS, axis=1) & (found.max(-1) > -np.inf)
        means.append(right.mean(1))
    return np.concatenate(means)
