"""`ltts list runs`: what runs there are, and how far they came."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from latent_tts.errors import UsageError
from latent_tts.results import report
from latent_tts.results.run_folder import OUTPUT_FOLDERS, is_complete, read_run_metrics, run_folders

COLUMNS = ["folder", "model", "task", "sampler", "seed", "questions", "n", "age"]
TEXTS = ("folder", "model", "task", "sampler")  # aligned to the left
SPARE = {"task": 1, "age": 2, "seed": 3, "questions": 4}  # see `report.Column`; names of folders begin with the time


def print_runs(paths: Sequence[Path]) -> None:
    """Print a table of the run folders at or below some folders, the newest last.

    Args:
        paths: the folders; none for those that commands write to by default.

    Raises:
        UsageError: there are none.
    """
    chosen = list(paths) or [Path(name) for name in OUTPUT_FOLDERS if Path(name).is_dir()]
    folders = []
    for path in chosen:
        try:
            folders += run_folders(path, "runs")
        except UsageError:
            if paths:
                raise
    if not folders:
        raise UsageError(f"no run in {' or '.join(OUTPUT_FOLDERS)}; `ltts list runs FOLDER` looks in FOLDER")
    ages = {folder: time.time() - folder.stat().st_mtime for folder in dict.fromkeys(folders)}
    rows = [_row(folder, age) for folder, age in sorted(ages.items(), key=lambda item: -item[1])]
    cells = dict(zip(COLUMNS, zip(*rows, strict=True), strict=True))
    folder, *columns = [report.Column(name, own, SPARE.get(name, 0), name in TEXTS) for name, own in cells.items()]
    report.print_columns(report.counted(len(rows), "run"), [folder], columns)


def _row(folder: Path, age: float) -> list[str]:
    """A run's cells; those of a run that did not complete say so."""
    if not is_complete(folder):
        return [str(folder), "incomplete", "", "", "", "", "", report.age(age)]
    try:
        table = read_run_metrics(folder)
    except UsageError:
        return [str(folder), "damaged", "", "", "", "", "", report.age(age)]
    first = table.iloc[0]
    sampler = f"{first['sampler']} {first['sampler_value']}".strip()
    questions, n = str(int(first["questions"])), str(int(table["n"].max()))
    task = f"{first['task']}/{first['split']}".rstrip("/")
    return [str(folder), first["model"], task, sampler, first["seed"], questions, n, report.age(age)]
