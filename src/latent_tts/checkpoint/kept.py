"""Models that were made from others and are kept in `models` in the cache folder: from GGUF files, and joined ones."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from latent_tts.checkpoint import gguf, joining
from latent_tts.types import read_object

KINDS: Mapping[str, tuple[str, int]] = {
    "gguf": ("converted from GGUF", gguf.VERSION),
    "joined": ("adapter joined with its base", joining.VERSION),
}
NAME = re.compile(rf"({'|'.join(KINDS)})(\d+)-[0-9a-f]{{16}}")
UNFINISHED_SECONDS = 3600.0  # since the last change of a model that is being written; then its writer is gone


@dataclass(frozen=True)
class KeptModel:
    """A model as `ltts cache` lists it.

    Attributes:
        folder: of the model.
        kind: how it was made.
        source: what of, as the user named it; `?` where it was not written down.
        size: bytes.
        used: when it was last loaded, in seconds since the epoch.
        stale: whether this version does not read it.
        being_written: whether another process may be making it.
    """

    folder: Path
    kind: str
    source: str
    size: int
    used: float
    stale: bool
    being_written: bool


def kept_models(cache: Path) -> list[KeptModel]:
    """The models in a cache folder, the one used last first; fetched files are left out."""
    found = [_kept(folder) for folder in (cache / "models").glob("*/")]
    return sorted((each for each in found if each is not None), key=lambda each: (-each.used, each.folder.name))


def _kept(folder: Path) -> KeptModel | None:
    kind, stale, being_written = "damaged", True, False
    if parts := NAME.fullmatch(folder.name):
        kind, version = KINDS[parts[1]]
        stale = int(parts[2]) != version
    elif folder.name.startswith(gguf.PARTIAL):
        newest = max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))
        being_written = time.time() - newest <= UNFINISHED_SECONDS
        kind, stale = "unfinished", not being_written
    elif not folder.name.endswith(gguf.DAMAGED):
        return None
    source = str(read_object(folder / gguf.SOURCE).get("from", "?"))
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return KeptModel(folder, kind, source, size, folder.stat().st_mtime, stale, being_written)
