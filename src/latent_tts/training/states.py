"""The output folder of a training run: its settings and its saved states. Imports no torch."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latent_tts.errors import is_whole, require
from latent_tts.results.files import launch_rank, write_text
from latent_tts.types import file_digest, read_object

SETTINGS, STATES, FINISHED = "settings.json", "states", "checkpoint"
DIGESTS = "digests.json"  # of a state's files
FORMAT = 2  # of the folder
PACKAGE = __name__.partition(".")[0]
log = logging.getLogger(__name__)


def log_once_per_launch() -> None:
    """Let all processes of a launch but the first log nothing but warnings."""
    if launch_rank() > 0:
        logging.getLogger(PACKAGE).setLevel(logging.WARNING)


def claim(output: Path, settings: Mapping[str, Any]) -> None:
    """Create the output folder of a run, or check that it contains a run with the same settings.

    Args:
        output: the folder.
        settings: the JSON-able settings that a resumed run must share with the stopped one.

    Raises:
        UsageError: the folder contains a run with other settings.
    """
    path, wanted = output / SETTINGS, json.loads(json.dumps({"format": FORMAT, **settings}))
    if path.is_file():
        found = read_object(path)
        for key in [*wanted, *found]:
            require(
                "output",
                output,
                found.get(key) == wanted.get(key),
                f"contains a run with another {key}; choose another folder or remove this one",
            )
        return
    output.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(wanted, indent=1) + "\n")


def read_state(folder: Path) -> dict[str, Any]:
    """The `trainer_state.json` of a saved state; empty if the state is incomplete, since this file is written last."""
    state = read_object(folder / "trainer_state.json")
    return state if is_whole(state.get("global_step")) else {}


def last_state(states: Path) -> Path | None:
    """The folder of the latest complete state, `checkpoint-UPDATES`; None if there is none."""
    complete = [path for path in _saved(states) if read_state(path)]
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def write_digests(state: Path) -> None:
    """Write the digests of a state's files beside them, as the last of its files."""
    names = sorted(path.name for path in state.iterdir() if path.is_file() and path.name != DIGESTS)
    write_text(state / DIGESTS, json.dumps({name: file_digest(state / name) for name in names}, indent=1) + "\n")


def best_state(state: Path) -> Path:
    """The best state so far when a state was saved; that state itself if none was chosen."""
    best = read_state(state).get("best_global_step")
    return state if best is None else state.with_name(f"checkpoint-{best}")


def resumable_state(states: Path) -> Path | None:
    """The latest complete state; None if there is none.

    States that were not written completely are removed, since the Trainer would count them. Damaged ones, and those
    whose best state is missing, are set aside. Processes of a launch call it in turn.
    """
    for path in _saved(states):
        if not read_state(path):
            shutil.rmtree(path, ignore_errors=True)
        elif _is_damaged(path):
            _set_aside(path, "is damaged")
    while (last := last_state(states)) is not None and not best_state(last).is_dir():
        _set_aside(last, f"needs {best_state(last).name}, the best state so far, which is missing")
    return last


def _set_aside(state: Path, why: str) -> None:
    """Rename a state, so that training does not resume from it."""
    aside = state.with_name(f"damaged-{state.name}")
    log.warning("%s %s: it is now %s, and training resumes from an earlier state or anew", state, why, aside.name)
    shutil.rmtree(aside, ignore_errors=True)
    state.rename(aside)


def _saved(states: Path) -> list[Path]:
    return [path for path in states.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]


def _is_damaged(state: Path) -> bool:
    """Whether a file of a state is not as it was written; digests are missing if the process was killed before."""
    if not (state / DIGESTS).is_file():
        return False
    digests = read_object(state / DIGESTS)
    present = all((state / name).is_file() for name in digests)
    return not (digests and present) or any(file_digest(state / name) != digests[name] for name in digests)
