"""The end of a sweep: its jobs' tables joined, shown as one table, and their curves drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from latent_tts.pipeline.seeds import write_joined
from latent_tts.results import plot, report
from latent_tts.results.completed_run import AggregatorBuilder
from latent_tts.results.run_folder import (
    CURVE_COLUMNS,
    FIGURE,
    METRICS,
    has_curve,
    is_complete,
    read_metrics,
    read_run_metrics,
)

NOT_IN_LABELS = ("n", "seed", "budget")  # the table has a column or a mean for them


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
    label_of_run = {read_run_metrics(path)["run_id"].iloc[0]: job.label for path, job in completed.items()}
    curves, runs = joined[CURVE_COLUMNS].itertuples(index=False), joined["run_id"]
    label_of_curve = {tuple(curve): label_of_run[run] for curve, run in zip(curves, runs, strict=True)}
    labels = [label_of_curve[tuple(curve)] for curve in table[CURVE_COLUMNS].itertuples(index=False)]
    report.print_metrics(table, labels, [job.row for job in jobs if job.folder not in completed])
    if means is not None:
        print(means)
    if has_curve(table):
        plot.scaling_curve(table, folder / FIGURE)
        print(folder / FIGURE)
    print(folder / METRICS)
