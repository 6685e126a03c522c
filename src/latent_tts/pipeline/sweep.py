"""Tables of several runs joined, with means over seeds: how far a figure moves from one seed to another."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
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
    PLAIN_BUDGETS,
    SEED_COLUMNS,
    has_curve,
    join_tables,
    name_once,
    read_tables,
    write_metrics,
)

log = logging.getLogger(__name__)
NOT_IN_LABELS = ("n", "seed")  # the table has a column or a mean for them
# metrics that a rollouts table has for each question
PER_QUESTION = ("accuracy", "coverage", "invalid_rate", "agreement")


def write_joined(
    path: Path, tables: Mapping[Path, pd.DataFrame], build_aggregator: AggregatorBuilder
) -> tuple[pd.DataFrame, pd.DataFrame | None]:
    """Join the tables of runs; with several seeds write their means beside the joined table.

    Args:
        path: of the joined table; the means are at `means_path`.
        tables: at least one, by run folder; see `read_tables`.
        build_aggregator: see `CompletedRun.read`.

    Returns:
        The joined table, and the means; None where there is one seed.

    Raises:
        UsageError: a run folder is damaged.
    """
    joined, first = join_tables(tables.values()), dict[str, Path]()
    for folder, table in tables.items():
        same = first.setdefault(table["run_id"].iloc[0], folder)
        if same != folder:
            log.info("%s: the same run as %s, but for what it cost; %s has the rows of that one", folder, same, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_metrics(path, joined)
    if joined.groupby(CURVE_COLUMNS, dropna=False)["seed"].nunique().max() == 1:
        means_path(path).unlink(missing_ok=True)
        return joined, None
    means = means_over_seeds([CompletedRun.read(*each, build_aggregator) for each in tables.items()])
    write_metrics(means_path(path), means)
    return joined, means


def means_path(path: Path) -> Path:
    """Where the means over seeds of a joined table are."""
    return path.with_name(f"{path.stem}_over_seeds.csv")


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
            low, high = _interval([runs[place] for place in same["run"]], row["metric"], row["aggregator"], row["n"])
            row |= {"value": same["value"].mean(), "ci_low": low, "ci_high": high, "seed": ",".join(same["seed"])}
            row["run_id"] = settings_digest({"runs": sorted(same["run_id"])})[: len(row["run_id"])]
        means.append(row)
    return pd.DataFrame(means, columns=[*METRIC_COLUMNS, *SEED_COLUMNS])


def _interval(runs: Sequence[CompletedRun], metric: str, aggregator: str, n: int) -> tuple[float, float]:
    figure = aggregator if metric == "accuracy" else metric
    if (
        metric not in PER_QUESTION
        or not all(run.all_decoded for run in runs)
        or any(run.budget is not None and figure not in ("agreement", *run.figures) for run in runs)
    ):
        return np.nan, np.nan
    return statistics.interval(pd.concat([run.per_question(figure, n) for run in runs], axis=1).mean(axis=1).to_numpy())


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
        usual = {f"budget={name}" for name in PLAIN_BUDGETS}
        parts = [override.partition("=")[::2] for override in self.overrides if override not in usual]
        return " ".join(f"{key.rpartition('.')[2]}={value}" for key, value in parts if key not in NOT_IN_LABELS)

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
    tables = read_tables([job.folder for job in jobs if job.folder is not None])
    if not tables:
        return
    path = folder / METRICS
    joined, means = write_joined(path, tables, build_aggregator)
    label_of = {job.folder: job.label for job in jobs}
    # jobs that are one run, but for what it costs, have a row each
    shown = name_once(
        pd.concat([tables[folder].assign(label=label_of[folder]) for folder in tables], ignore_index=True)
    )
    if means is not None:
        shown = means.merge(shown.drop_duplicates(CURVE_COLUMNS)[[*CURVE_COLUMNS, "label"]], "left", CURVE_COLUMNS)
    report.print_metrics(shown, shown["label"].tolist(), [job.row for job in jobs if job.folder not in tables])
    if means is not None:
        print(means_path(path))
    table = joined if means is None else means
    if has_curve(table):
        print(plot.scaling_curve(table, folder / FIGURE))
    print(path)
