"""Rollouts to the rows of `metrics.csv`. Pure tables and arrays; nothing is drawn or loaded here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from latent_tts.aggregator import Aggregator
from latent_tts.results import statistics as stats
from latent_tts.results import store
from latent_tts.types import RolloutArrays

MAX_VALUE = {"diversity": 2.0}  # of metrics that have an interval, where it is not 1


def arrays_of(rollouts: pd.DataFrame, drawn: int) -> RolloutArrays:
    """Arrays (Q, D) of a rollouts table that has `drawn` rows for each question, in order."""
    predictions = rollouts["prediction"].to_numpy(dtype=object).reshape(-1, drawn)
    codes = np.full(predictions.shape, -1, dtype=np.int64)
    for row, values in enumerate(predictions):
        known: dict[str, int] = {}
        for column, value in enumerate(values):
            if value is not None and value == value:
                codes[row, column] = known.setdefault(value, len(known))
    return RolloutArrays(
        prediction_QD=codes,
        correct_QD=rollouts["correct"].to_numpy(dtype=bool).reshape(-1, drawn),
        answer_logprob_QD=rollouts["answer_logprob"].to_numpy(dtype=np.float64).reshape(-1, drawn),
        score_QD=rollouts["score"].to_numpy(dtype=np.float64, na_value=np.nan).reshape(-1, drawn),
    )


@dataclass
class WinnersAt:
    """What a run that decodes winners alone knows at one n.

    Attributes:
        n: the first n rollouts of each question.
        picked: the rollouts table's row of each question's pick.
        latent_steps, diversity, gflops: of each question.
        measured: `store.MEASURED_SUMS` of all questions.
    """

    n: int
    picked: pd.DataFrame
    latent_steps: Sequence[int]
    diversity: Sequence[float | None]
    gflops: Sequence[float]
    measured: pd.Series


def winner_rows(figures: Sequence[WinnersAt], rollouts: pd.DataFrame, run: Mapping[str, Any]) -> pd.DataFrame:
    """The metrics table of a run that decodes winners alone: plain figures of the first n rollouts at each n.

    Args:
        figures: at each reported n; what was measured is reported at the largest.
        rollouts: the rollouts table, for `peak_memory_bytes`.
        run: values of the columns that all rows share.
    """
    rows: list[dict[str, Any]] = []
    largest = max(at.n for at in figures)
    for at in figures:
        questions = len(at.picked)
        figures_Q = {
            "accuracy": at.picked["correct"],
            "invalid_rate": at.picked["prediction"].isna(),
            "diversity": at.diversity,
            "latent_steps": at.latent_steps,
            "answer_tokens": at.picked["answer_tokens"],
            "gflops": at.gflops,
        }
        if at.n == 1 or any(value is None for value in at.diversity):
            del figures_Q["diversity"]
        if at.n == largest:
            costs = _costs(at.measured / questions, at.n, rollouts["peak_memory_bytes"].max())
            figures_Q |= {metric: [value] * questions for metric, value in costs.items()}
        for metric, values_Q in figures_Q.items():
            values = np.asarray(values_Q, dtype=np.float64)
            low, high = (None, None)
            if metric in ("accuracy", "invalid_rate", "diversity"):
                low, high = stats.interval(values, high=MAX_VALUE.get(metric, 1.0))
            aggregator = "best_of_n" if metric == "accuracy" else ""
            row = {"aggregator": aggregator, "n": at.n, "drawn": at.n, "metric": metric, "value": values.mean()}
            rows.append({**run, **row, "ci_low": low, "ci_high": high, "questions": questions})
    return pd.DataFrame(rows, columns=store.METRIC_COLUMNS)


def metric_rows(
    rollouts: pd.DataFrame,
    *,
    drawn: int,
    reported: Sequence[int],
    aggregators: Sequence[Aggregator],
    diversity_Q: Sequence[float | None],
    gflops: Sequence[tuple[float, float]],
    run: Mapping[str, Any],
) -> pd.DataFrame:
    """The metrics table of a run.

    Args:
        rollouts: a rollouts table with the columns `store.MEASURED` beside its own.
        drawn: rollouts of each question in the table.
        reported: budgets n, each at most `drawn`; or one that is larger: as many were grown, and a search left `drawn`.
        aggregators: which picks to report.
        diversity_Q: each question's diversity over its drawn rollouts.
        gflops: per question what is paid once, and what each of its rollouts adds on average.
        run: values of the columns that all rows share.

    Returns:
        A frame with the columns of `store.METRIC_COLUMNS`.
    """
    arrays = arrays_of(rollouts, drawn)
    questions = len(arrays.correct_QD)
    rows: list[dict[str, Any]] = []

    def add(n: int, metric: str, values_Q: Any, aggregator: str = "", with_interval: bool = True) -> None:
        values = np.asarray(values_Q, dtype=np.float64)
        low, high = stats.interval(values, high=MAX_VALUE.get(metric, 1.0)) if with_interval else (None, None)
        row = {"aggregator": aggregator, "n": n, "drawn": max(n, drawn), "metric": metric, "value": values.mean()}
        rows.append({**run, **row, "ci_low": low, "ci_high": high, "questions": questions})

    def per_question(column: str) -> np.ndarray:
        return rollouts[column].to_numpy(dtype=np.float64).reshape(-1, drawn).mean(1)

    once, each = np.array(gflops, dtype=np.float64).T
    measured = rollouts[list(store.MEASURED_SUMS)].sum(skipna=False)
    sizes = [min(n, drawn) for n in reported]
    accuracies = [stats.picked_accuracies(aggregator, arrays, sizes) for aggregator in aggregators]
    for place, (n, size) in enumerate(zip(reported, sizes, strict=True)):
        for aggregator, accuracy_BQ in zip(aggregators, accuracies, strict=True):
            add(n, "accuracy", accuracy_BQ[place], aggregator.name)
        add(n, "coverage", stats.coverage(arrays.correct_QD, size))
        add(n, "invalid_rate", (arrays.prediction_QD < 0).mean(1))
        if size > 1 and all(value is not None for value in diversity_Q):
            add(n, "diversity", diversity_Q)
        add(n, "latent_steps", n * per_question("latent_steps"), with_interval=False)
        add(n, "answer_tokens", size * per_question("answer_tokens"), with_interval=False)
        add(n, "gflops", once + n * each, with_interval=False)
        if n >= drawn:  # measured for the whole budget alone
            for metric, value in _costs(measured / questions, n, rollouts["peak_memory_bytes"].max()).items():
                add(n, metric, [value] * questions, with_interval=False)
    return pd.DataFrame(rows, columns=store.METRIC_COLUMNS)


def _costs(each: pd.Series, n: int, peak_memory_bytes: float) -> dict[str, float]:
    """What was measured when rollouts were drawn, from its sums for one question's n rollouts."""
    return {
        "seconds": each["seconds"],
        "floor_seconds": each["floor_seconds"],
        "gbytes": each["bytes"] / 1e9,
        "rollouts_per_second": n / each["seconds"],
        "peak_memory_bytes": peak_memory_bytes,
    }
