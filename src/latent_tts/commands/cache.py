"""`ltts cache`: list what the cache folder holds, rollouts and models; `ltts cache prune` removes some."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from omegaconf import DictConfig

from latent_tts.checkpoint.model_cache import KeptModel, kept_models
from latent_tts.errors import bad_value, is_number, require
from latent_tts.pipeline.keys import is_current
from latent_tts.results import report
from latent_tts.results.cache import CacheEntry, cache_entries

SECONDS = {"m": 60, "h": 3600, "d": 86400}
BYTES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def main(cfg: DictConfig) -> None:
    """List the entries, or remove those that the keys choose and say what was freed.

    Raises:
        UsageError: a value is not usable, `prune` lacks a condition, or the cache cannot be written to.
    """
    require("action", cfg.action, cfg.action in ("list", "prune"), "must be list or prune")
    older_than = quantity("older_than", cfg.older_than, SECONDS, "must be an age, as in 30d, 12h or 90m")
    max_size = quantity("max_size", cfg.max_size, BYTES, "must be a size, as in 20GB or 500MB")
    root = Path(cfg.paths.cache).expanduser()
    entries, models = cache_entries(root), kept_models(root)
    chosen = older_than is not None or max_size is not None or cfg.stale
    if cfg.action == "list":
        require("action", "list", not chosen, "older_than, max_size and stale go with prune: ltts cache prune ...")
        show(root, entries)
        if models:
            show_models(root / "models", models)
        return
    require("action", "prune", chosen, "say what to remove: older_than=30d, max_size=20GB or stale=true")
    everything = sorted([*entries, *models], key=lambda each: -each.used)
    gone = to_prune(everything, older_than=older_than, max_size=max_size, stale=cfg.stale, now=time.time())
    for each in gone:
        try:
            shutil.rmtree(each.folder)
        except OSError as error:
            raise bad_value("paths.cache", root, f"cannot be written to ({error.strerror})") from error
    freed, total = (sum(each.size for each in every) for every in (gone, everything))
    count = sum(isinstance(each, KeptModel) for each in gone)
    removed = f"{len(gone) - count} of {report.counted(len(entries), 'entry', 'entries')}"
    removed += f" and {count} of {report.counted(len(models), 'model')}" if models else ""
    print(f"removed {removed}, freed {size(freed)} of {size(total)} in {root}")


Kept = TypeVar("Kept", bound=CacheEntry | KeptModel)


def to_prune(
    kept: Sequence[Kept], *, older_than: float | None, max_size: float | None, stale: bool, now: float
) -> list[Kept]:
    """The entries and models that any of the conditions chooses.

    Args:
        kept: what there is, the one used last first.
        older_than: seconds.
        max_size: bytes that those left may have together.
        stale: whether to choose those that this version of the code does not read.
        now: in seconds since the epoch.
    """
    gone, left, full = [], 0, False
    for each in kept:
        unread = each.stale if isinstance(each, KeptModel) else not is_current(each.key)
        chosen = (older_than is not None and now - each.used > older_than) or (stale and unread)
        full = full or (not chosen and max_size is not None and left + each.size > max_size)
        if chosen or full:
            gone.append(each)
        else:
            left += each.size
    return gone


def show_models(folder: Path, models: Sequence[KeptModel]) -> None:
    """The models as a table."""
    rows = []
    for model in models:
        used = report.age(time.time() - model.used) + (", stale" if model.stale else "")
        rows.append([model.folder.name, model.kind, model.source, size(model.size), used])
    title = f"{folder}: {report.counted(len(models), 'model')}, {size(sum(model.size for model in models))}"
    report.print_table(title, ["folder", "made", "from", "size", "last used"], rows)


def show(root: Path, entries: Sequence[CacheEntry]) -> None:
    """The entries as a table."""
    rows = []
    for entry in entries:
        key, sampler = entry.key, entry.key.get("sampler") or {}
        kind = str(sampler.get("_target_", "?")).rpartition(".")[2].lower()
        numbers = [f"{name}={value}" for name, value in sampler.items() if is_number(value)]
        used = report.age(time.time() - entry.used) + ("" if is_current(key) else ", stale")
        named = [entry.folder.name, key.get("name", "?"), " ".join([kind, *numbers])]
        settings = (key.get(column, "?") for column in ("latents", "seed", "dtype"))
        rows.append([*named, *settings, entry.rollouts, size(entry.size), used])
    columns = ["entry", "model", "sampler", "latents", "seed", "dtype", "rollouts", "size", "last used"]
    counted = report.counted(len(entries), "entry", "entries")
    title = f"{root}: {counted}, {size(sum(entry.size for entry in entries))}"
    report.print_table(title, columns, rows, {"seed": 1, "dtype": 2, "latents": 3})


def quantity(key: str, value: str | None, units: dict[str, int], allowed: str) -> float | None:
    """A number with a unit; None for none.

    Raises:
        UsageError: it is something else.
    """
    if value is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)", value)
    if found is None or found[2] not in units:
        raise bad_value(key, value, allowed)
    return float(found[1]) * units[found[2]]


def size(count: float) -> str:
    """Bytes in the largest unit of which there is one."""
    unit = next(name for name in reversed(BYTES) if count >= BYTES[name] or name == "B")
    return f"{count / BYTES[unit]:.3g} {unit}"
