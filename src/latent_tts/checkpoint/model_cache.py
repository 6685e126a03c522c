"""Models that were made from others and are kept in `models` in the cache folder: from GGUF files, and joined ones.

The folder's name holds the digest of what a model is made of: a second start finds it, and a changed source is another
model.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from latent_tts.types import file_digest, read_object

log = logging.getLogger(__name__)
# how a model was made, and the version of what that writes; both are in the folder's name
KINDS = {"gguf": ("converted from GGUF", 4), "joined": ("adapter joined with its base", 3)}
PARTIAL, SOURCE = "partial-", "source.json"  # a folder that is being written; what a model was made from
NAME = re.compile(rf"({'|'.join(KINDS)})(\d+)-[0-9a-f]{{16}}")
UNFINISHED_SECONDS = 86400.0  # since a model was begun; then its writer is gone


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
    """

    folder: Path
    kind: str
    source: str
    size: int
    used: float
    stale: bool


def models_folder() -> Path:
    """Where fetched and converted models are kept: `models` in the cache folder."""
    return Path(os.environ.get("LTTS_CACHE") or ".cache/latent_tts").expanduser() / "models"


def make_once(kind: str, digest: str, source: str, make: Callable[[Path], None]) -> Path:
    """The folder of a kept model, which is made unless it is there, and made anew if a file of it is damaged.

    Args:
        kind: how it is made, one of `KINDS`.
        digest: of all that it is made of.
        source: what it is made of, for `ltts cache`.
        make: writes it to a folder; if it fails, nothing is left.
    """
    folder = models_folder() / f"{kind}{KINDS[kind][1]}-{digest}"
    written = read_object(folder / SOURCE).get("files") or {}
    damaged = [
        name
        for name, wanted in written.items()
        if not (folder / name).is_file() or file_digest(folder / name) != wanted
    ]
    if damaged:
        log.warning("%s is damaged: its folder is removed, and made anew", folder / damaged[0])
        shutil.rmtree(folder, ignore_errors=True)
    if not folder.is_dir():
        log.info("%s: converting it, once, to %s", source, folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        for left in folder.parent.glob(f"{PARTIAL}*"):
            with contextlib.suppress(OSError):  # another process was first
                if time.time() - left.stat().st_mtime > UNFINISHED_SECONDS:
                    shutil.rmtree(left)
        partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=PARTIAL))
        try:
            make(partial)
            digests = {path.name: file_digest(path) for path in sorted(partial.iterdir()) if path.is_file()}
            (partial / SOURCE).write_text(json.dumps({"from": source, "files": digests}) + "\n")
            partial.chmod(0o755)
            with contextlib.suppress(OSError):  # another process was first
                partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    with contextlib.suppress(OSError):  # a cache that others own
        os.utime(folder)  # when it was last used
    return folder


def kept_models(cache: Path) -> list[KeptModel]:
    """The models in a cache folder, the one used last first; fetched files are left out, and unfinished models."""
    models = []
    for folder in (cache / "models").glob("*/"):
        if parts := NAME.fullmatch(folder.name):
            kind, version = KINDS[parts[1]]
            source = str(read_object(folder / SOURCE).get("from", "?"))
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            models.append(KeptModel(folder, kind, source, size, folder.stat().st_mtime, int(parts[2]) != version))
    return sorted(models, key=lambda each: (-each.used, each.folder.name))
