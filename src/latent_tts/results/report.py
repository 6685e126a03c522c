"""What a person sees: log lines and progress on stderr, tables on stdout."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from latent_tts.errors import UsageError, printable
from latent_tts.results.run_folder import (
    CURVE_COLUMNS,
    OUTPUT_FOLDERS,
    is_complete,
    read_run_metrics,
    run_folders,
    sampler_label,
)
from latent_tts.types import text_digest

STATISTICS = "docs/statistics.md"
GAP = 2  # spaces between columns
UNLIMITED = 100_000  # columns of a pipe
_round: ContextVar[int] = ContextVar("round", default=0)  # 0 outside of rounds
SEEN_WARNINGS = "LTTS_SEEN_WARNINGS"  # environment variable of a sweep and its processes: a folder with a file for each
RUN_LIST = {  # columns of `ltts list runs`: `Column.spare` (names of folders begin with the time) and `Column.left`
    "folder": (0, True), "model": (0, True), "task": (1, True), "sampler": (0, True),
    "seed": (3, False), "questions": (4, False), "n": (0, False), "age": (2, False),
}  # fmt: skip
JOB_LINE = re.compile(r"(?<=^INFO )\t#(\d+) : ")  # of Hydra's launchers


# Log lines and progress


@cache
def stderr_console() -> Console:
    """The console that log lines and progress bars share, so that lines appear above a bar."""
    return Console(stderr=True)


def log_handler() -> logging.Handler:
    """The console handler of Hydra's logging configs."""
    handler = LineHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    handler.addFilter(is_new_in_sweep)
    return handler


class LineHandler(logging.Handler):
    """Writes records to stderr: no line is broken, and nothing but the level of a warning has a colour.

    Control characters are written out. Jobs of a sweep, which Hydra sets off by a tab, are named.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        text = Text(printable(JOB_LINE.sub(r"job \1: ", self.format(record))))
        if record.levelno >= logging.WARNING:
            text.stylize("yellow", 0, len(record.levelname))
        stderr_console().print(text, soft_wrap=True)


def is_new_in_sweep(record: logging.LogRecord) -> bool:
    """Whether a record is no warning that a job of the sweep has written; one that differs only in numbers is the same.

    A record with the attribute `once` is treated like a warning.
    """
    seen = os.environ.get(SEEN_WARNINGS)
    if seen is None or not (record.levelno >= logging.WARNING or getattr(record, "once", False)):
        return True
    words = re.sub(r"[0-9][0-9.e+-]*", "#", record.getMessage())
    try:
        Path(seen, text_digest(words)).touch(exist_ok=False)
    except OSError as error:  # others than this one where a job on another machine does not see the folder
        return not isinstance(error, FileExistsError)
    return True


@contextmanager
def warnings_once() -> Iterator[None]:
    """Within this context each warning is written once, by whichever process comes first; see `is_new_in_sweep`."""
    with TemporaryDirectory(prefix="latent_tts_") as folder:
        os.environ[SEEN_WARNINGS] = folder
        try:
            yield
        finally:
            del os.environ[SEEN_WARNINGS]


def print_status(text: str) -> None:
    """A line on stderr, above a bar."""
    stderr_console().print(Text(printable(text)), soft_wrap=True)


@contextmanager
def in_round(number: int) -> Iterator[None]:
    """Name bars after a round, remove each at its end, and log no more than warnings after the first round.

    Args:
        number: of the round, from 1.
    """
    logger = logging.getLogger("latent_tts")
    level, token = logger.level, _round.set(number)
    if number > 1:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
        _round.reset(token)


class ProgressBar:
    """A bar on stderr with rate, time spent and time left; silent where stderr is no terminal."""

    def __init__(self, progress: Progress, total: int, unit: str) -> None:
        self._progress = progress
        self._task = progress.add_task(unit, total=total, note="")
        self._done = 0

    @property
    def visible(self) -> bool:
        """Whether it is shown."""
        return not self._progress.disable

    def advance(self, count: int) -> None:
        """Count some more as done."""
        self._done += count
        self.show_part(0)

    def show_part(self, count: float) -> None:
        """Show progress within a batch: as much as `count` whole ones beyond those that are done."""
        completed = self._done + count
        rate = completed / max(self._progress.tasks[0].elapsed or 0, 1e-9)
        self.show(completed, f"{rate:.0f}/s" if rate >= 10 else f"{rate:.2g}/s" if completed else "")

    def show(self, done: float, note: str) -> None:
        """Set the bar to `done` with a note beside it."""
        self._progress.update(self._task, completed=done, note=note)


@contextmanager
def progress_bar(total: int, unit: str) -> Iterator[ProgressBar]:
    """A bar that is on the screen within the block."""
    console = stderr_console()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("left"),
    )
    number = _round.get()
    # a forward pass may take long: the rate is taken over minutes
    with Progress(
        *columns, console=console, disable=not console.is_terminal, speed_estimate_period=300, transient=number > 0
    ) as progress:
        yield ProgressBar(progress, total, f"round {number}: {unit}" if number else unit)


# Tables


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        name: its heading.
        cells: one per row.
        spare: 0 for a column that every table shows; of the others, the one with the highest number is left out first
            where the terminal is too narrow.
        left: whether cells are aligned to the left.
        breaks: a space, and what follows it: where the table is narrow, cells are broken at such a space. By default
            an interval goes below its figure.
    """

    name: str
    cells: Sequence[str]
    spare: int = 0
    left: bool = False
    breaks: str = " ["

    def lines(self, *, narrow: bool) -> list[str]:
        """The heading and the cells, as they are shown."""
        return [
            self.name,
            *(cell.replace(self.breaks, "\n" + self.breaks[1:]) if narrow else cell for cell in self.cells),
        ]

    def width(self, *, narrow: bool) -> int:
        """Characters of the longest line."""
        lines = "\n".join(printable(text) for text in self.lines(narrow=narrow)).split("\n")
        return max(Text(line).cell_len for line in lines)


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], spare: Mapping[str, int] | None = None
) -> None:
    """A table on stdout: the first column aligned to the left, the others to the right.

    Args:
        title: printed above.
        columns: their headings.
        rows: a cell per column.
        spare: see `Column.spare`; by default every column is shown.
    """
    cells = [[str(row[place]) for row in rows] for place in range(len(columns))]
    first, *others = (Column(name, own, (spare or {}).get(name, 0)) for name, own in zip(columns, cells, strict=True))
    print_columns(title, [Column(first.name, first.cells, left=True)], others)


def print_columns(title: str, keys: Sequence[Column], columns: Sequence[Column], notes: Sequence[str] = ()) -> None:
    """A table on stdout that fits the terminal; texts are shown as they are, markup too.

    On a terminal, intervals go below their figures where it is narrow, then spare columns are left out, then columns
    that still do not fit make further tables. A pipe gets aligned text of any width.

    Args:
        title: printed above.
        keys: the columns that begin every table.
        columns: the others, in order.
        notes: printed below, a line each.
    """
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=UNLIMITED)
    ruled = console.is_terminal and not console.options.ascii_only
    tables, narrow = fitting_tables(keys, columns, console.width)
    console.print(_text(title.replace("\n", "\\n"), console, "bold"))
    for table in tables:
        grid = Table(
            box=box.SIMPLE_HEAD if ruled else None, show_edge=False, pad_edge=False,
            padding=(0, GAP - 1 if ruled else GAP, 0, 0), header_style="bold",
        )  # fmt: skip
        for column in table:
            grid.add_column(_text(column.name, console), justify="left" if column.left else "right", overflow="fold")
        for row in zip(*(column.lines(narrow=narrow)[1:] for column in table), strict=True):
            if any(row[len(keys) :]) or len(table) == len(keys):
                grid.add_row(*(_text(cell, console) for cell in row))
        with console.capture() as captured:
            console.print(grid)
        print("\n".join(line.rstrip() for line in captured.get().splitlines()), flush=True)
    for note in notes:
        console.print(_text(note, console, "dim"), soft_wrap=True)


def fitting_tables(keys: Sequence[Column], columns: Sequence[Column], width: int) -> tuple[list[list[Column]], bool]:
    """The tables that columns make on a terminal of some width, and whether intervals go below their figures."""

    def fits(others: Sequence[Column], *, narrow: bool) -> bool:
        shown = [*keys, *others]
        return sum(column.width(narrow=narrow) + GAP for column in shown) - GAP <= width

    left = list(columns)
    while not fits(left, narrow=True) and any(column.spare for column in left):
        left.remove(max(left, key=lambda column: column.spare))
    tables: list[list[Column]] = [[]]
    for column in left:
        if tables[-1] and not fits([*tables[-1], column], narrow=True):
            tables.append([])
        tables[-1].append(column)
    return [[*keys, *table] for table in tables], not fits(left, narrow=False)


def _text(text: str, console: Console, style: str = "") -> Text:
    """A text without control characters, its sign ± in ASCII where the console's encoding is not of Unicode."""
    return Text(printable(text.replace("±", "+-") if console.options.ascii_only else text), style)


def print_line(text: str) -> None:
    """A line on stdout, control characters written out."""
    print(printable(text))


def counted(count: int, noun: str, plural: str = "") -> str:
    """A number with its noun: `1 entry`, `2 entries`."""
    return f"{count} {noun if count == 1 else plural or noun + 's'}"


def age(seconds: float) -> str:
    """Seconds in the largest unit of which there is one: minutes, hours or days."""
    unit, length = next((each for each in (("d", 86400), ("h", 3600)) if seconds >= each[1]), ("m", 60))
    return f"{max(seconds, 0) / length:.0f} {unit}"


def percent(row: Mapping[Any, Any]) -> str:
    """A fraction in percent with its standard deviation over seeds, if it has one, and its interval; empty for none."""
    if pd.isna(row["value"]):
        return ""
    spread = f" ± {100 * row['seed_sd']:.1f}" if pd.notna(row.get("seed_sd")) else ""
    interval = "" if pd.isna(row["ci_low"]) else f" [{100 * row['ci_low']:.1f}, {100 * row['ci_high']:.1f}]"
    return f"{100 * row['value']:.1f}{spread}{interval}"


# The table of a run or a sweep


def print_metrics(
    metrics: pd.DataFrame, labels: Sequence[str] | None = None, failed: Sequence[Mapping[str, str]] = ()
) -> None:
    """One table of accuracy, coverage and costs: a row for each curve and n.

    Args:
        metrics: a metrics table, or one of means over seeds.
        labels: for each of its rows what its curve is called; None for the columns in which curves differ.
        failed: `label` and `n` of jobs that failed; each is a row that says so.
    """
    if labels is None:
        differing = [name for name in CURVE_COLUMNS if metrics[name].nunique() > 1]
        labels = [" ".join(f"{name}={row[name]}" for name in differing) for row in metrics.to_dict("records")]
    if metrics["seed"].nunique() > 1:
        labels = [f"{label} seed={seed}".lstrip() for label, seed in zip(labels, metrics["seed"], strict=True)]
    named = pd.Series(pd.Categorical(list(labels), list(dict.fromkeys(labels))), metrics.index)
    groups = metrics.groupby([named, "n", "drawn"], observed=True)
    lines = [{"label": str(label), "n": f"{n:g}", **figures_of(rows)} for (label, n, _), rows in groups]
    spare = {"drawn": 1, "GFLOP/question": 2, "rollouts/s": 3}
    shown = dict.fromkeys(name for line in lines for name, cell in line.items() if cell)
    quality = [name for name in shown if name.endswith(" %")]
    lines += [{**job, quality[0]: "failed"} for job in failed]
    keys = [Column("n", [line["n"] for line in lines])]
    if any(line["label"] for line in lines):
        keys.insert(0, Column("", [line["label"] for line in lines], left=True, breaks=" "))
    names = ["drawn", *quality, "GFLOP/question", "rollouts/s"]
    columns = [Column(name, [line.get(name, "") for line in lines], spare.get(name, 0)) for name in names]
    print_columns(curve_title(metrics), keys, columns, list(table_notes(metrics)))


def figures_of(rows: pd.DataFrame) -> dict[str, str]:
    """The figures of a curve at one n, by the headings of their columns."""
    records = rows.to_dict("records")
    value = {row["metric"]: row["value"] for row in records}
    figures = {"drawn": f"{records[0]['drawn']:g}"}
    if "rollouts_drawn" in value:  # unequally many: the mean, and how many of them were used
        figures["drawn"] = f"{value['rollouts_drawn']:.1f} ({value['rollouts_used']:.1f} used)"
    for metric in ("accuracy", "coverage" if "coverage" in value else "agreement"):
        figures |= {f"{row['aggregator'] or metric} %": percent(row) for row in records if row["metric"] == metric}
    for metric, name, form in (("gflops", "GFLOP/question", ".3g"), ("rollouts_per_second", "rollouts/s", ".0f")):
        if metric in value:
            figures[name] = format(value[metric], form)
    return figures


def curve_title(metrics: pd.DataFrame) -> str:
    """What all rows of a table have in common."""

    def common(column: str) -> str:
        values = metrics[column].unique()
        return str(values[0]) if len(values) == 1 and pd.notna(values[0]) else ""

    place = "/".join(filter(None, [common("task"), common("split")]))
    where = " on ".join(filter(None, [common("model"), place]))
    sampler = {name: common(name) for name in ("sampler", "sampler_param", "sampler_value")}
    what = sampler_label(sampler) if sampler["sampler"] else ""
    seeds = f"{'mean ± sd of seeds' if ',' in common('seed') else 'seed'} {common('seed')}" if common("seed") else ""
    questions = f"{float(common('questions')):g} questions" if common("questions") else ""
    if questions and common("settings"):
        questions += f" ({common('settings')})"
    scorer = f"scored by {common('scorer')}" if common("scorer") else ""
    described = ", ".join(filter(None, [what, seeds, questions, scorer]))
    return ": ".join(filter(None, [where, described]))


def table_notes(metrics: pd.DataFrame) -> Iterator[str]:
    """What a reader of a table has to know."""
    if not metrics["metric"].isin(["accuracy", "coverage"]).any():
        yield "no gold answers; agreement: share of rollouts with the most frequent answer"
    if (metrics["n"] < metrics["drawn"]).any():
        drawn = sorted(set(metrics["drawn"]))
        number = f"the {drawn[0]:g}" if len(drawn) == 1 else "the"
        yield f"n: mean over choices of n of {number} rollouts drawn ({STATISTICS})"


# The list of runs


def print_runs(paths: Sequence[Path]) -> None:
    """Print a table of the run folders at or below some folders, the newest last.

    Args:
        paths: the folders; none for those that commands write to by default.

    Raises:
        UsageError: there are none.
    """
    folders = []
    for path in paths or map(Path, OUTPUT_FOLDERS):
        with nullcontext() if paths else suppress(UsageError):
            folders += run_folders(path)
    if not folders:
        raise UsageError(f"no run in {' or '.join(OUTPUT_FOLDERS)}; `ltts list runs FOLDER` looks in FOLDER")
    written = {folder: folder.stat().st_mtime for folder in folders}
    rows = [
        {"folder": str(folder), "age": age(time.time() - written[folder])} | _described_run(folder)
        for folder in sorted(written, key=lambda folder: written[folder])
    ]
    first, *others = [Column(name, [row.get(name, "") for row in rows], *look) for name, look in RUN_LIST.items()]
    print_columns(counted(len(rows), "run"), [first], others)


def _described_run(folder: Path) -> dict[str, str]:
    """A run's cells; those of a run that did not complete say so."""
    if not is_complete(folder):
        return {"model": "incomplete"}
    try:
        table = read_run_metrics(folder)
    except UsageError:
        return {"model": "damaged"}
    first = table.iloc[0]
    return {
        "model": first["model"],
        "task": f"{first['task']}/{first['split']}".rstrip("/"),
        "sampler": f"{first['sampler']} {first['sampler_value']}".strip(),
        "seed": first["seed"],
        "questions": str(int(first["questions"])),
        "n": str(int(table["n"].max())),
    }
