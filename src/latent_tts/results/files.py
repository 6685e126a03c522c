"""Files written whole: under another name, then renamed, so that a file that is there is complete."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

SECONDS_BETWEEN_PARTS = 2.0
FORMULA = re.compile("'*[=+\\-@\t\r]")


T = TypeVar("T")


@contextmanager
def written_in_parts(write: Callable[[list[T]], None]) -> Iterator[Callable[[Iterable[T]], None]]:
    """A function that takes results; `write` gets them two seconds' worth at a time, and the rest at the end.

    However it ends: an interruption loses nothing that was handed over.
    """
    pending: list[T] = []
    written = time.perf_counter()

    def take(results: Iterable[T]) -> None:
        nonlocal pending, written
        pending += results
        if pending and time.perf_counter() - written > SECONDS_BETWEEN_PARTS:
            done, pending = pending, []
            write(done)
            written = time.perf_counter()

    try:
        yield take
    finally:
        if pending:
            write(pending)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to, renamed to `path` when the block ends well."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def spreadsheet_cells(frame: pd.DataFrame) -> pd.DataFrame:
    """A table whose texts no spreadsheet takes for a formula: those that could be one begin with an apostrophe."""
    return frame.map(lambda cell: f"'{cell}" if isinstance(cell, str) and _is_formula(cell) else cell)


def plain_cells(frame: pd.DataFrame) -> pd.DataFrame:
    """The table that `spreadsheet_cells` was given."""
    return frame.map(
        lambda cell: cell[1:] if isinstance(cell, str) and cell[:1] == "'" and _is_formula(cell[1:]) else cell
    )


def _is_formula(cell: str) -> bool:
    if FORMULA.match(cell) is None:
        return False
    try:
        float(cell)
    except ValueError:
        return True
    return False


def settings_digest(settings: Mapping[str, Any]) -> str:
    """16 hex digits of a JSON-able mapping."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
