"""Tallies of made-up rollouts, and the vote counted the plain way."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from latent_tts.budget import Tally
from latent_tts.text.answer import shared_forms


def tally_of(
    answers: Sequence[str | None],
    n: int | None = None,
    *,
    equal: Callable[[str, str], bool] | None = None,
    logprobs: Sequence[float] | None = None,
    scores: Sequence[float] | None = None,
    log_weights: Sequence[float] | None = None,
    max_log_weight: float | None = 0.0,
) -> Tally:
    """A tally of rollouts with these answers; n as many unless it is named."""
    count = len(answers)

    def array(values: Sequence[float] | None, filled: float) -> np.ndarray:
        return np.array([filled] * count if values is None else values, dtype=np.float64)

    return Tally(
        n or count, list(answers), array(log_weights, 0.0), array(logprobs, -1.0), array(scores, np.nan),
        max_log_weight, equal, prompt_gflop=1.0, gflop_N=np.full(count, 0.5),
    )  # fmt: skip


def elected(
    answers: Sequence[str | None],
    equal: Callable[[str, str], bool] | None = None,
    weights: Sequence[float] | None = None,
) -> int | None:
    """Number of the rollout that a vote picks: the first voter of the heaviest class, of tied ones the earliest."""
    forms = shared_forms(answers, equal or (lambda one, other: one == other))
    totals: dict[str, float] = {}
    for form, weight in zip(forms, weights or [1.0] * len(forms), strict=True):
        if form is not None:
            totals[form] = totals.get(form, 0.0) + weight
    if not totals:
        return None
    most = max(totals.values())
    return min(forms.index(form) for form, total in totals.items() if total >= most * (1 - 1e-12))
