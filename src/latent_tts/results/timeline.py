"""Which worker of a run was busy when: a table, a picture, and what `run.json` says of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from latent_tts.results.files import write_csv
from latent_tts.results.plot import save_figure

TIMELINE, TIMELINE_FIGURE = "timeline.csv", "timeline.png"
MAX_DRAWN_WORKERS = 64  # the picture shows the first ones
MAX_HEIGHT = 12.0  # inches


@dataclass(frozen=True)
class Span:
    """A shard that a worker had.

    Attributes:
        worker: which one.
        started, ended: seconds by the driver's clock.
        rows: rollouts, or questions of an annotation; 0 for a shard that was lost with its worker.
    """

    worker: int
    started: float
    ended: float
    rows: int


def describe_timeline(spans: Sequence[Span]) -> dict[str, Any]:
    """What `run.json` says of a timeline.

    Returns:
        `workers` and `shards` (counts), `lost` (shards computed again), `seconds` (from the first shard's start to the
        last one's end), `busy` (share of them, by worker), `ended_apart` (seconds between the ends of the first and of
        the last worker).
    """
    table = pd.DataFrame(spans)
    seconds = float(table["ended"].max() - table["started"].min())
    ends = table.groupby("worker")["ended"].max()
    busy = (table["ended"] - table["started"]).groupby(table["worker"]).sum()
    return {
        "workers": len(ends),
        "shards": len(table),
        "lost": int((table["rows"] == 0).sum()),
        "seconds": seconds,
        "busy": (busy / max(seconds, 1e-9)).tolist(),
        "ended_apart": float(ends.max() - ends.min()),
    }


def write_timeline(folder: Path, spans: Sequence[Span], unit: str) -> None:
    """Write a row per shard, seconds counted from the first one's start, and the picture."""
    table = pd.DataFrame(spans).sort_values(["started", "worker"])
    start = table["started"].min()
    table = table.assign(started=table["started"] - start, ended=table["ended"] - start)
    write_csv(folder / TIMELINE, table.rename(columns={"rows": unit}), index=False, float_format="%.4f")
    _draw(folder / TIMELINE_FIGURE, table)


def _draw(path: Path, table: pd.DataFrame) -> None:
    """A row per worker, a bar per shard; a shard that was lost is hollow."""
    from matplotlib.figure import Figure

    workers = sorted(table["worker"].unique())[:MAX_DRAWN_WORKERS]
    drawn = table[table["worker"].isin(workers)]
    lost = drawn["rows"] == 0
    blue = np.where(drawn.groupby("worker").cumcount() % 2, "#56b4e9", "#0072b2")
    figure = Figure(figsize=(9, min(MAX_HEIGHT, 1.2 + 0.3 * len(workers))), layout="constrained")
    axes = figure.subplots()
    axes.barh(
        drawn["worker"].map(workers.index), drawn["ended"] - drawn["started"], left=drawn["started"],
        color=np.where(lost, "none", blue), edgecolor=np.where(lost, "#d55e00", "none"),
    )  # fmt: skip
    count = table["worker"].nunique()
    shown = "" if count == len(workers) else f", of which {len(workers)} are shown"
    axes.set_title(f"{len(table)} shards on {count} workers{shown}", fontsize=9)
    axes.set_yticks(range(len(workers)), workers)
    axes.set(xlabel="seconds", ylabel="worker", xlim=(0, table["ended"].max()), ylim=(len(workers) - 0.5, -0.5))
    save_figure(figure, [path])
