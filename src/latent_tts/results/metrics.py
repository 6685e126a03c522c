"""Rollouts to the rows of `metrics.csv`. Pure tables and arrays; nothing is drawn or loaded here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from latent_tts.aggregator import Aggregator
from latent_tts.results import statistics
from latent_tts.results.cache import MEASURED_SUMS
from latent_tts.results.run_folder import FORMAT, METRIC_COLUMNS
from latent_tts.results.statistics import Floats
from latent_tts.types import Int64, RolloutArrays

# the largest value of each metric that has an interval
MAX_VALUE = {"accuracy": 1.0, "coverage": 1.0, "invalid_rate": 1.0, "agreement": 1.0, "diversity": 2.0}


@dataclass
class Figures:
    """The figures of a run at one n.

    Attributes:
        n: rollouts per question.
        drawn: rollouts per question over which the figures are means.
        per_question: values (Q,) by metric and aggregator (empty for metrics that belong to none), in table order.
        measured: figures measured for all questions together, by metric.
    """

    n: int
    drawn: int
    per_question: dict[tuple[str, str], Floats]
    measured: dict[str, float]

    @classmethod
    def of(
        cls, n: int, drawn: int, measured: dict[str, float], **metrics: Mapping[str, Floats] | Floats | None
    ) -> Figures:
        """Figures of metrics in table order: each a value (Q,), or one by aggregator; None where there is none."""
        per_question = {
            (metric, name): each
            for metric, values in metrics.items()
            if values is not None
            for name, each in (values.items() if isinstance(values, Mapping) else [("", values)])
        }
        return cls(n, drawn, per_question, measured)


def answer_codes(answers: Iterable[str | None]) -> Int64:
    """Equal numbers for equal answers of a question; -1 for those that cannot be read."""
    return pd.factorize(np.array(list(answers), dtype=object))[0]


def rollout_arrays(rollouts: pd.DataFrame, drawn: int) -> RolloutArrays:
    """Arrays (Q, D) of a rollouts table that has `drawn` rows for each question, in order."""
    predictions = rollouts["prediction"].to_numpy(dtype=object).reshape(-1, drawn)
    known = rollouts["correct"].notna().all()
    return RolloutArrays(
        prediction_QD=np.stack([answer_codes(answers) for answers in predictions]),
        correct_QD=rollouts["correct"].to_numpy(dtype=bool).reshape(-1, drawn) if known else None,
        answer_logprob_QD=rollouts["answer_logprob"].to_numpy(dtype=np.float64).reshape(-1, drawn),
        score_QD=rollouts["score"].to_numpy(dtype=np.float64, na_value=np.nan).reshape(-1, drawn),
    )


def rollout_figures(
    rollouts: pd.DataFrame,
    *,
    drawn: int,
    reported: Sequence[int],
    aggregators: Sequence[Aggregator],
    diversity_Q: Sequence[float | None],
    gflops: Sequence[tuple[float, float]],
) -> list[Figures]:
    """The figures of a run whose rollouts all have answers. Without gold answers there is no accuracy and no coverage.

    Args:
        rollouts: a rollouts table with the columns `cache.MEASURED` beside its own.
        drawn: rollouts of each question in the table.
        reported: budgets n, each at most `drawn`; for a search the one number that it grew, of which it kept `drawn`.
        aggregators: whose picks to report.
        diversity_Q: each question's diversity over its drawn rollouts.
        gflops: for each question, the GFLOP that its rollouts share, and the GFLOP that each adds on average.
    """
    arrays = rollout_arrays(rollouts, drawn)

    def per_rollout(column: str) -> Floats:
        return rollouts[column].to_numpy(dtype=np.float64).reshape(-1, drawn).mean(1)

    shared_Q, each_Q = np.array(gflops, dtype=np.float64).T
    sizes = [min(n, drawn) for n in reported]
    correct_QD, accuracies = arrays.correct_QD, {}
    if correct_QD is not None:
        accuracies = {one.name: statistics.picked_accuracies(one, arrays, sizes) for one in aggregators}
    diverse_Q = None if None in diversity_Q else np.array(diversity_Q, dtype=np.float64)
    figures = []
    for place, (n, size) in enumerate(zip(reported, sizes, strict=True)):
        # costs were measured in batches of the whole budget, so they are reported for that budget alone
        measured = measured_figures(rollouts[list(MEASURED_SUMS)], rollouts, len(shared_Q), n) if n >= drawn else {}
        told = n >= drawn or correct_QD is None  # beside accuracies, a curve of agreement would say nothing new
        figures.append(
            Figures.of(
                n, max(n, drawn), measured,
                accuracy={name: accuracy_BQ[place] for name, accuracy_BQ in accuracies.items()},
                coverage=None if correct_QD is None else statistics.coverage(correct_QD, size),
                invalid_rate=(arrays.prediction_QD < 0).mean(1),
                agreement=statistics.agreement(arrays.prediction_QD, size) if told else None,
                diversity=diverse_Q if size > 1 else None,
                latent_steps=n * per_rollout("latent_steps"),
                answer_tokens=size * per_rollout("answer_tokens"),
                gflops=shared_Q + n * each_Q,
            )
        )  # fmt: skip
    return figures


def measured_figures(sums: pd.DataFrame, rollouts: pd.DataFrame, questions: int, n: float) -> dict[str, float]:
    """The figures that were measured while rollouts were drawn, per question.

    Args:
        sums: rows whose `cache.MEASURED_SUMS` add up to the run's; a missing value makes its figure missing.
        rollouts: the rollouts table, for `peak_memory_bytes`.
        questions: Q.
        n: rollouts per question; the mean where questions have different numbers of them.
    """
    each = sums.sum(skipna=False) / questions
    return {
        "seconds": each["seconds"],
        "floor_seconds": each["floor_seconds"],
        "gbytes": each["bytes"] / 1e9,
        "rollouts_per_second": n / each["seconds"],
        "peak_memory_bytes": rollouts["peak_memory_bytes"].max(),
    }


def metric_rows(figures: Sequence[Figures], run: Mapping[str, Any]) -> pd.DataFrame:
    """The metrics table: a row per n, metric and aggregator; metrics with a largest value get intervals.

    Args:
        figures: of each reported n.
        run: values of the columns that all rows share.

    Returns:
        A frame with the columns of `run_folder.METRIC_COLUMNS`.
    """
    rows: list[dict[str, Any]] = []
    questions = len(next(iter(figures[0].per_question.values())))
    for at in figures:
        shared = {**run, "n": at.n, "drawn": at.drawn, "questions": questions}
        for (metric, aggregator), values_Q in at.per_question.items():
            bounded = metric in MAX_VALUE and not np.isnan(values_Q).any()
            low, high = statistics.interval(values_Q, high=MAX_VALUE[metric]) if bounded else (None, None)
            row = {"metric": metric, "aggregator": aggregator, "value": values_Q.mean(), "ci_low": low, "ci_high": high}
            rows.append(shared | row)
        rows += [shared | {"metric": metric, "aggregator": "", "value": v} for metric, v in at.measured.items()]
    return pd.DataFrame(rows, columns=METRIC_COLUMNS).assign(format=FORMAT)
