"""Joined tables of runs, and their means over seeds: how far a figure moves from one seed to another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from latent_tts.results import statistics
from latent_tts.results.completed_run import AggregatorBuilder, CompletedRun
from latent_tts.results.files import settings_digest
from latent_tts.results.run_folder import (
    CURVE_COLUMNS,
    METRIC_COLUMNS,
    SEED_COLUMNS,
    join_metrics,
    name_weights_once,
    write_metrics,
)

# metrics that a rollouts table has for each question
PER_QUESTION = ("accuracy", "coverage", "invalid_rate", "agreement")


def write_joined(
    path: Path, folders: Sequence[Path], build_aggregator: AggregatorBuilder
) -> tuple[pd.DataFrame, list[Path], Path | None]:
    """Join the complete runs among some folders into a table; with several seeds write their means beside it.

    Args:
        path: of the table; the means are `<its stem>_over_seeds.csv`.
        folders: of runs.
        build_aggregator: see `CompletedRun.read`.

    Returns:
        The table, the folders left out, and where the means are; nothing is written if no run is complete.

    Raises:
        UsageError: a run folder is damaged.
    """
    joined, left_out = join_metrics(list(folders))
    if joined.empty:
        return joined, left_out, None
    path.parent.mkdir(parents=True, exist_ok=True)
    write_metrics(path, joined)
    means = path.with_name(f"{path.stem}_over_seeds.csv")
    if joined.groupby(CURVE_COLUMNS, dropna=False)["seed"].nunique().max() == 1:
        means.unlink(missing_ok=True)
        return joined, left_out, None
    runs = [CompletedRun.read(folder, build_aggregator) for folder in folders if folder not in left_out]
    write_metrics(means, means_over_seeds(runs))
    return joined, left_out, means


def means_over_seeds(runs: Sequence[CompletedRun]) -> pd.DataFrame:
    """One row for all runs that differ only in the seed, at each n, metric and aggregator.

    Returns:
        A metrics table with two more columns. `value` is the mean over seeds, `seed_sd` their sample standard deviation
        (NaN for one), `seed` names them and `seeds` is their number. The interval is over questions, each with all its
        seeds; NaN where a rollouts table does not have the figure of each question, as with diversity.
    """
    rows = pd.concat([run.metrics.assign(run=place) for place, run in enumerate(runs)], ignore_index=True)
    rows = name_weights_once(rows)
    means = []
    for _, same in rows.groupby([*CURVE_COLUMNS, "aggregator", "n", "drawn", "metric"], sort=False, dropna=False):
        same = same.drop_duplicates("seed")
        row = same.iloc[0].to_dict() | {"seeds": len(same), "seed_sd": same["value"].std()}
        if len(same) > 1:
            members = [runs[place] for place in same["run"]]
            low, high = _interval(members, row["metric"], row["aggregator"], int(row["n"]))
            row |= {"value": same["value"].mean(), "ci_low": low, "ci_high": high, "seed": ",".join(same["seed"])}
            row["run_id"] = settings_digest({"runs": sorted(same["run_id"])})[: len(row["run_id"])]
        means.append(row)
    return pd.DataFrame(means, columns=[*METRIC_COLUMNS, *SEED_COLUMNS])


def _interval(runs: Sequence[CompletedRun], metric: str, aggregator: str, n: int) -> tuple[float, float]:
    figure = aggregator if metric == "accuracy" else metric
    if metric not in PER_QUESTION or not all(run.all_decoded for run in runs):
        return np.nan, np.nan
    if figure != "agreement" and any(run.budget is not None and figure not in run.figures for run in runs):
        return np.nan, np.nan
    seeds = pd.concat([run.per_question(figure, n) for run in runs], axis=1)
    return statistics.interval(seeds.mean(axis=1).to_numpy())
