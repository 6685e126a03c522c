"""Tables of several runs joined, with means over seeds: how far a figure moves from one seed to another."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from latent_tts.results import plot, report, statistics
from latent_tts.results.completed_run import AggregatorBuilder, CompletedRun
from latent_tts.results.files import settings_digest
from latent_tts.results.run_folder import (
    CURVE_COLUMNS,
    FIGURE,
    METRIC_COLUMNS,
    METRICS,
    SEED_COLUMNS,
    has_curve,
    is_complete,
    join_metrics,
    name_once,
    read_metrics,
    read_run_metrics,
    write_metrics,
)

log = logging.getLogger(__name__)
NOT_IN_LABELS = ("n", "seed", "budget")  # the table has a column or a mean for them
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
    of_run = pd.Series({each: read_run_metrics(each)["run_id"].iloc[0] for each in folders if each not in left_out})
    for repeat in of_run.index[of_run.duplicated()]:
        first = of_run.index[of_run == of_run[repeat]][0]
        log.info("%s: the same run as %s, but for what it cost; %s has the rows of that one", repeat, first, path)
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
    rows = name_once(rows)
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


@dataclass(frozen=True)
class SweepJob:
    """A job of a sweep.

    Attributes:
        overrides: those that not all jobs have.
        folder: its run folder; None if its config was refused.
    """

    overrides: Sequence[str]
    folder: Path | None

    @property
    def label(self) -> str:
        """What its curve is called in the sweep's table: its overrides, without the names of groups."""
        parts = [override.partition("=") for override in self.overrides]
        return " ".join(f"{key.rpartition('.')[2]}={value}" for key, _, value in parts if key not in NOT_IN_LABELS)

    @property
    def row(self) -> dict[str, str]:
        """What the sweep's table shows of it if it failed."""
        given = dict(override.split("=", 1) for override in self.overrides if "=" in override)
        seed = f"seed={given['seed']}" if "seed" in given else ""
        return {"label": " ".join(filter(None, [self.label, seed])), "n": given.get("n", "")}


def finish(folder: Path, jobs: Sequence[SweepJob], build_aggregator: AggregatorBuilder) -> None:
    """Write the joined table and its curve into a sweep's folder; print one table over all jobs, and the paths.

    Args:
        folder: of the sweep.
        jobs: in their order.
        build_aggregator: see `CompletedRun.read`.
    """
    completed = {job.folder: job for job in jobs if job.folder is not None and is_complete(job.folder)}
    joined, _, means = write_joined(folder / METRICS, list(completed), build_aggregator)
    if joined.empty:
        return
    table = read_metrics(means or folder / METRICS)
    own = [(job.label, read_run_metrics(path)) for path, job in completed.items()]
    if means is None:  # jobs that are one run, but for what it costs, have a row each
        shown = name_once(pd.concat([rows for _, rows in own], ignore_index=True))
        labels = [label for label, rows in own for _ in rows.index]
    else:
        label_of_run = {rows["run_id"].iloc[0]: label for label, rows in reversed(own)}
        curves, runs = joined[CURVE_COLUMNS].itertuples(index=False), joined["run_id"]
        label_of_curve = {tuple(curve): label_of_run[run] for curve, run in zip(curves, runs, strict=True)}
        shown, labels = table, [label_of_curve[tuple(curve)] for curve in table[CURVE_COLUMNS].itertuples(index=False)]
    report.print_metrics(shown, labels, [job.row for job in jobs if job.folder not in completed])
    if means is not None:
        print(means)
    if has_curve(table):
        plot.scaling_curve(table, folder / FIGURE)
        print(folder / FIGURE)
    print(folder / METRICS)
