"""Folders to run commands in, and the line of a small run."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def place_of_its_own(folder: Path) -> Iterator[None]:
    """An empty folder to run commands in, with a cache and a config folder of its own, and no narrow terminal."""
    handlers = logging.getLogger().handlers[:]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("LTTS_CACHE", str(folder / "cache"))
        patch.setenv("XDG_CONFIG_HOME", str(folder / "config"))
        patch.delenv("COLUMNS", raising=False)  # of the terminal that the tests run in
        yield
    for handler in set(logging.getLogger().handlers) - set(handlers):
        handler.close()
        logging.getLogger().removeHandler(handler)


def run_line(checkpoint: Path, *arguments: object) -> list[str]:
    """`ltts run` on the tiny reasoner and a few questions; without a ladder of budgets, it draws no figure."""
    budget = [] if any(str(argument).startswith("budget") for argument in arguments) else ["budget=fixed"]
    few = ["task.limit=6", "n=4", "max_answer_tokens=4"]
    return ["run", "model=demo_coconut", f"model.checkpoint={checkpoint}", *few, *budget, *map(str, arguments)]
