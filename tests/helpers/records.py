"""Changes to run folders whose `run.json` fits them afterwards, as someone else could make them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from latent_tts.results.run_folder import write_run_json
from latent_tts.types import file_digest


def change_record(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a `run.json` in place, and its digest with it."""
    record = json.loads((folder / "run.json").read_text())
    change(record)
    write_run_json(folder, {key: value for key, value in record.items() if key != "digest"})


def sign(folder: Path, name: str) -> None:
    """Make `run.json` hold the digest of a changed file."""
    change_record(folder, lambda record: record["files"].update({name: file_digest(folder / name)}))
