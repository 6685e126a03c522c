"""What a person sees: the log handler and progress on stderr, tables on stdout."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pandas as pd
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from latent_tts.errors import printable
from latent_tts.results.run_folder import DIGEST_COLUMNS, digest_label


def log_handler() -> logging.Handler:
    """The console handler of Hydra's logging configs: rich on a terminal's stderr, plain unbroken lines on a pipe's."""
    console = Console(stderr=True)
    if console.is_terminal:
        handler: logging.Handler = RichHandler(console=console, show_path=False, show_time=False, markup=False)
        handler.setFormatter(PrintableFormatter("%(message)s"))
        return handler
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter("%(levelname)s %(message)s"))
    return handler


class PrintableFormatter(logging.Formatter):
    """Writes control characters out."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        return printable(super().format(record))


class ProgressBar:
    """A bar on stderr with rate, time spent and time left; silent where stderr is no terminal."""

    def __init__(self, progress: Progress, total: int, unit: str) -> None:
        """Add the bar to a display."""
        self._progress = progress
        self._task = progress.add_task(unit, total=total, note="")
        self._done = 0

    @property
    def visible(self) -> bool:
        """Whether anybody sees it."""
        return not self._progress.disable

    def advance(self, count: int) -> None:
        """Some more are done."""
        self._done += count
        self.show_part(0)

    def show_part(self, count: float) -> None:
        """Beside those that are done, others have come as far as `count` whole ones."""
        completed = self._done + count
        elapsed = self._progress.tasks[0].elapsed or 0
        rate = completed / max(elapsed, 1e-9)
        self.show(completed, f"{rate:.0f}/s" if rate >= 10 else f"{rate:.2g}/s" if completed else "")

    def show(self, done: float, note: str) -> None:
        """Set the bar to `done` with a note beside it."""
        self._progress.update(self._task, completed=done, note=note)


@contextmanager
def progress_bar(total: int, unit: str) -> Iterator[ProgressBar]:
    """A bar that is on the screen within the block."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("left"),
    )
    # a forward pass may take long: the rate is taken over minutes
    with Progress(*columns, console=console, disable=not console.is_terminal, speed_estimate_period=300) as progress:
        yield ProgressBar(progress, total, unit)


def print_table(title: str, columns: list[str], rows: list[list[Any]]) -> None:
    """A table on stdout: the first column to the left, the others to the right; text is shown as it is, markup too."""
    table = Table(title=_text(title.replace("\n", "\\n")), title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        table.add_column(_text(column), justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(_text(str(cell)) for cell in row))
    console = Console()
    if not console.is_terminal:  # a pipe has no width of its own: never cut results there
        console = Console(width=160)
    console.print(table)


def _text(text: str) -> Text:
    return Text(printable(text))


def percent(row: pd.Series) -> str:
    """A fraction in percent with its interval, and its standard deviation over seeds if it has one; empty for none."""
    if pd.isna(row["value"]):
        return ""
    # beside a spread there is no room in a row of a terminal
    spread = f" ± {100 * row['seed_sd']:.1f}\n" if pd.notna(row.get("seed_sd")) else " "
    interval = "" if pd.isna(row["ci_low"]) else f"[{100 * row['ci_low']:.1f}, {100 * row['ci_high']:.1f}]"
    return f"{100 * row['value']:.1f}{spread}{interval}".rstrip()


def print_metrics(metrics: pd.DataFrame) -> None:
    """Accuracy, coverage and costs of each curve, a row for each n; of means over seeds with their spread (±)."""
    named = ["model", "task", "split", "sampler", "sampler_param", "sampler_value", "settings", "scorer", "seed"]
    curve = [*named, *DIGEST_COLUMNS]
    several = {column: metrics.groupby(named, dropna=False)[column].transform("nunique") for column in DIGEST_COLUMNS}
    for values, rows in metrics.groupby(curve, sort=False, dropna=False):
        part = dict(zip(curve, values, strict=True))
        parameter = f" {part['sampler_param']}={part['sampler_value']}" if part["sampler_param"] else ""
        title = f"{part['model']} on {part['task']}/{part['split']}: {part['sampler']}{parameter}, "
        title += f"{'mean ± sd of seeds' if ',' in str(part['seed']) else 'seed'} {part['seed']}"
        title += f", {int(rows['questions'].iloc[0])} questions" + (
            f" ({part['settings']})" if part["settings"] else ""
        )
        title += f", scored by {part['scorer']}" if part["scorer"] else ""
        for column, counts in several.items():
            title += f", {digest_label(column, str(part[column]))}" if counts[rows.index[0]] > 1 else ""
        accuracy = rows[rows["metric"] == "accuracy"]
        names = list(dict.fromkeys(accuracy["aggregator"]))
        lines = []
        for (n, drawn), at in rows.groupby(["n", "drawn"], sort=True):
            by_metric = {row["metric"]: row for _, row in at.iterrows() if row["metric"] != "accuracy"}
            by_name = {row["aggregator"]: row for _, row in at.iterrows() if row["metric"] == "accuracy"}
            rate = by_metric.get("rollouts_per_second")
            lines.append(
                [n, _drawn(drawn, by_metric)]
                + [percent(by_name[name]) if name in by_name else "" for name in names]
                + [percent(by_metric["coverage"]) if "coverage" in by_metric else ""]
                + [f"{by_metric['gflops']['value']:.3g}"]
                + ["" if rate is None else f"{rate['value']:.0f}"]
            )
        print_table(
            title, ["n", "drawn", *[f"{name} %" for name in names], "coverage %", "GFLOP/question", "rollouts/s"], lines
        )


def print_line(text: str) -> None:
    """A line on stdout, control characters written out."""
    print(printable(text))


def _drawn(drawn: object, by_metric: Mapping[str, pd.Series]) -> str:
    """Rollouts per question; where they are unequally many the mean, and how many of them were used."""
    if "rollouts_drawn" not in by_metric:
        return str(drawn)
    mean, used = (by_metric[name]["value"] for name in ("rollouts_drawn", "rollouts_used"))
    return f"{mean:.1f} ({used:.1f} used)"


def counted(count: int, noun: str, plural: str = "") -> str:
    """A number with its noun: `1 entry`, `2 entries`."""
    return f"{count} {noun if count == 1 else plural or noun + 's'}"


def age(seconds: float) -> str:
    """Seconds in the largest unit of which there is one: minutes, hours or days."""
    unit, length = next((each for each in (("d", 86400), ("h", 3600)) if seconds >= each[1]), ("m", 60))
    return f"{max(seconds, 0) / length:.0f} {unit}"
