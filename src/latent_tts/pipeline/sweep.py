"""The end of a sweep: its jobs' tables joined, means over seeds shown, curves drawn."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from latent_tts.pipeline.seeds import write_joined
from latent_tts.results import plot, report
from latent_tts.results.completed_run import AggregatorBuilder
from latent_tts.results.run_folder import FIGURE, METRICS, has_curve, read_metrics

log = logging.getLogger(__name__)


def finish(folder: Path, jobs: Sequence[Path], build_aggregator: AggregatorBuilder) -> None:
    """Write the joined table and its curve into a sweep's folder; print the means over seeds and the paths.

    Args:
        folder: of the sweep.
        jobs: folders of its jobs.
        build_aggregator: see `CompletedRun.read`.
    """
    joined, left_out, means = write_joined(folder / METRICS, jobs, build_aggregator)
    for path in left_out:
        log.warning("%s did not complete and is not in the joined table", path)
    if joined.empty:
        return
    table = read_metrics(means or folder / METRICS)
    if means is not None:
        report.print_metrics(table[table["seeds"] > 1])
        print(means)
    if has_curve(table):
        plot.scaling_curve(table, folder / FIGURE)
        print(folder / FIGURE)
    print(folder / METRICS)
