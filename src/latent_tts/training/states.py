"""The output folder of a training run: its settings and its saved states. Imports no torch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latent_tts.errors import bad_value
from latent_tts.results.files import whole_file

SETTINGS, STATES, FINISHED = "settings.json", "states", "checkpoint"


def claim(output: Path, settings: Mapping[str, Any]) -> None:
    """Create the output folder of a run, or check that it contains a run with the same settings.

    Args:
        output: the folder.
        settings: the JSON-able settings that a resumed run must share with the stopped one.

    Raises:
        UsageError: the folder contains a run with other settings.
    """
    path, wanted = output / SETTINGS, json.loads(json.dumps(settings))
    if path.is_file():
        found = json.loads(path.read_text())
        for key in [*wanted, *found]:
            if found.get(key) != wanted.get(key):
                raise bad_value(
                    "output", output, f"contains a run with another {key}; choose another folder or remove this one"
                )
        return
    output.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        partial.write_text(json.dumps(wanted, indent=1) + "\n")


def read_state(folder: Path) -> dict[str, Any]:
    """The `trainer_state.json` of a saved state; empty if the state is incomplete, since this file is written last."""
    try:
        return json.loads((folder / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return {}


def last_state(states: Path) -> Path | None:
    """The folder of the latest complete state, `checkpoint-UPDATES`; None if there is none."""
    complete = [path for path in states.glob("checkpoint-*") if read_state(path)]
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def remove_incomplete_states(states: Path) -> None:
    """Remove states that were not written completely; the Trainer would count them as saved ones."""
    for path in states.glob("checkpoint-*"):
        if not read_state(path):
            shutil.rmtree(path, ignore_errors=True)  # every process of a launch does this at the same time
