"""The cache: rollouts and step scores kept across runs, a folder per key; without latents (see `pipeline.worker`)."""

from __future__ import annotations

import errno
import functools
import json
import logging
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from latent_tts.errors import UsageError, bad_value, require
from latent_tts.results.files import read_record, set_aside, settings_digest, whole_file, write_record, write_text
from latent_tts.results.parts import (
    MAX_PART_BYTES,
    PLACE,
    GatheredRows,
    part_files,
    tables_holding,
    whole_parts,
    whole_table,
    write_part,
)
from latent_tts.types import Computation, Floats, read_object

NOT_DECODED = "not_decoded"  # the stop reason of a rollout whose answer was not needed
KEY_JSON, SCORES_FOLDER = "key.json", "scores"
COMPUTATION = "computation.json"  # beside the rollouts: how they were computed
MEMORY_JSON = "memory.json"  # beside the entries
ENTRY_NAME = re.compile(r"[0-9a-f]{16}")

NOT_WRITABLE = {errno.EROFS, errno.EACCES, errno.EPERM}
MODES = ("on", "refresh", "off")
log = logging.getLogger(__name__)
MEASURED_SUMS = {
    "seconds": pa.float64(),  # the row's share of its batch's wall-clock time
    "floor_seconds": pa.float64(),  # of the least time that the device needs for the batch: see cost.py
    "bytes": pa.float64(),  # of the bytes that the batch cannot but read or write
}


MEASURED = MEASURED_SUMS | {"peak_memory_bytes": pa.int64()}


ROLLOUT_FIELDS = pa.schema(
    [
        ("answer_ids", pa.list_(pa.int32())),
        ("answer_logprob", pa.float32()),
        ("answer_margin", pa.float32()),
        ("stop_reason", pa.string()),
        ("latent_steps", pa.int32()),
        ("sweeps", pa.int32()),
        ("commits", pa.int32()),
        ("conflicts", pa.int32()),
        # one per latent: 1 - cosine with the latent of the same step of each rollout before, summed
        ("dissimilarity", pa.list_(pa.float32())),
        *MEASURED.items(),
        ("device", pa.string()),
        ("rows", pa.int32()),
    ]
)
SCORE_FIELDS = pa.schema([("step_scores", pa.list_(pa.float32())), *MEASURED.items()])  # one score per latent


PLACE_FIELDS = [pa.field("row_key", pa.string()), pa.field("rollout", pa.int32())]
SUMS_SUFFIX = ".sums"  # of the sums of directions beside rollouts
SUMS_SCHEMA = pa.schema(
    [("row_key", pa.string()), ("count", pa.int32()), ("latents", pa.int32()), ("directions", pa.binary())]
)
SCORED_BY = "scored_by"  # the digest of a scorer's key; null where rollouts were drawn without one
SCORING = "scoring_"  # how score columns begin in a part of rollouts
SCORE_SCHEMA = pa.schema([*PLACE_FIELDS, *SCORE_FIELDS])
ROLLOUT_SCHEMA = pa.schema(
    [
        *PLACE_FIELDS,
        *ROLLOUT_FIELDS,
        (SCORED_BY, pa.string()),
        *(field.with_name(SCORING + field.name) for field in SCORE_FIELDS),
    ]
)


class PartCache:
    """Rows (row key, rollout, ...) kept across runs: a folder with `key.json` and parts.

    One that cannot be written to is read all the same, as far as it is there.
    """

    def __init__(
        self, root: Path, key: Mapping[str, Any], about: Mapping[str, Any] | None = None, below: str = ""
    ) -> None:
        """Open (or make) the folder of a key.

        Args:
            root: of the cache.
            key: everything that determines the rows.
            about: what else `key.json` says, for people.
            below: the folder within the cache that the key's folder is in.

        Raises:
            UsageError: the folder cannot be made.
        """
        self.folder = root / below / settings_digest(key)
        self._read_only: UsageError | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # its time is when the entry was used last
            write_record(self.folder / KEY_JSON, {**key, **(about or {})})
        except OSError as error:
            refusal = bad_value("paths.cache", root, f"cannot be written to ({error.strerror})")
            if error.errno not in NOT_WRITABLE or not (self.folder / KEY_JSON).is_file():
                raise refusal from error
            self._read_only = refusal
            _warn_read_only(root.resolve(), error.strerror)

    def require_writable(self, what: str) -> None:
        """Raise UsageError if the folder cannot be written to, which `what` says that something needs."""
        if self._read_only is not None:
            raise UsageError(f"{self._read_only}, and {what}")


@functools.cache
def _warn_read_only(root: Path, why: str) -> None:
    log.warning("the cache %s cannot be written to (%s): what it has is read", root, why)


class RolloutCache(PartCache):
    """Rollouts, and the step scores of the scorer that read their latents where they were made."""

    def gather(self, rows: GatheredRows, scores: Mapping[str, GatheredRows]) -> None:
        """Gather the missing ones of some rows, and of those the step scores that were made with them.

        Args:
            rows: with columns of `ROLLOUT_FIELDS`.
            scores: with columns of `SCORE_FIELDS`, by the digest of the scorer's key.

        Raises:
            RunError: a part cannot be read, or is damaged and cannot be set aside.
        """
        for table in tables_holding(self.folder, rows, ROLLOUT_SCHEMA.names):
            rows.take(table)
            taken = table.select([*PLACE, *(SCORING + name for name in SCORE_FIELDS.names)])
            by = table[SCORED_BY].to_numpy()
            for digest, scored in scores.items():
                scored.take(taken.rename_columns(SCORE_SCHEMA.names), by == digest)

    def discard(self, wanted: pd.DataFrame) -> None:
        """Remove rows (columns `row_key`, `rollout`), so that they are drawn again, and every scorer's scores of them.

        Raises:
            RunError: a part cannot be read, or is damaged and cannot be set aside.
        """
        _discard(self.folder, ROLLOUT_SCHEMA, wanted)
        for scores in self.folder.glob(f"{SCORES_FOLDER}/*/"):
            _discard(scores, SCORE_SCHEMA, wanted)

    def write_computation(self, computation: Computation) -> None:
        """Write down, beside the rollouts, how they were computed."""
        write_record(self.folder / COMPUTATION, asdict(computation))

    def read_computation(self) -> Computation | None:
        """How the rollouts were computed; None where that is not known. A damaged file is set aside."""
        path = self.folder / COMPUTATION
        if (said := read_record(path)) is not None:
            return Computation(**said)
        if path.is_file():
            log.warning("%s is damaged: it is now %s", path, set_aside(path).name)
        return None


class ScoreCache(PartCache):
    """Step scores made after drawing, in the folder of their `RolloutCache`; they are reduced when they are read."""

    def __init__(self, rollouts: Path, key: Mapping[str, Any]) -> None:
        """Open (or make) the folder of a scorer's key below the rollouts' own folder."""
        super().__init__(rollouts.parent, key, below=f"{rollouts.name}/{SCORES_FOLDER}")

    def gather(self, scores: GatheredRows) -> None:
        """Gather the missing ones of some rows, with columns of `SCORE_FIELDS`; see `RolloutCache.gather`."""
        for table in tables_holding(self.folder, scores, SCORE_SCHEMA.names):
            scores.take(table)


def _discard(folder: Path, schema: pa.Schema, wanted: pd.DataFrame) -> None:
    """Remove rows from the parts of a folder; those that stay are in a new part before the old one is removed."""
    gone = GatheredRows(wanted, schema)
    for path, table in whole_parts(part_files(folder), schema.names):
        stays = ~gone.contains(table)
        if stays.all():
            continue
        if stays.any():
            write_part(folder, table.filter(pa.array(stays)))
        path.unlink(missing_ok=True)


def read_direction_sums(folder: Path, counts: Mapping[str, int]) -> dict[str, Floats]:
    """The sums (T, D) of questions, by their row keys, of which those of as many rollouts as `counts` says are kept."""
    rows = [row for path in sorted(folder.glob(f"*{SUMS_SUFFIX}")) for row in _sums(path)]
    return {
        row["row_key"]: np.frombuffer(row["directions"], "<f8").reshape(row["latents"], -1).copy()
        for row in rows
        if counts.get(row["row_key"]) == row["count"]
    }


def write_direction_sums(folder: Path, sums: Mapping[str, tuple[int, np.ndarray]]) -> None:
    """Keep sums, and as many of other questions' as there is room for; none where the folder cannot be written to.

    They are what later rollouts of a question are compared with. Without them, latents of rollouts that are in the
    cache are recomputed; so what is missing or damaged only costs time.

    Args:
        folder: of the rollouts.
        sums: by row key: of how many rollouts, and the sums (T, D).
    """
    before = sorted(folder.glob(f"*{SUMS_SUFFIX}"))
    rows = [
        {"row_key": key, "count": count, "latents": len(sums_TD), "directions": sums_TD.astype("<f8").tobytes()}
        for key, (count, sums_TD) in sums.items()
    ]
    rows += [row for path in before for row in _sums(path) if row["row_key"] not in sums]
    fitting = np.cumsum([len(row["directions"]) for row in rows]) <= MAX_PART_BYTES
    table = pa.Table.from_pylist(rows[: int(fitting.sum())], SUMS_SCHEMA)
    with suppress(OSError):
        with whole_file(folder / f"{uuid.uuid4().hex}{SUMS_SUFFIX}", add_digest=True) as path:
            pq.write_table(table, path.absolute(), compression="zstd", compression_level=1)
        for path in before:
            path.unlink(missing_ok=True)


def _sums(path: Path) -> list[dict[str, Any]]:
    table = None
    with suppress(OSError):
        table = whole_table(path, SUMS_SCHEMA.names)
    return [] if table is None else table.to_pylist()


@contextmanager
def cache_root(root: Path, mode: str) -> Iterator[Path]:
    """The folder of the cache; with `off` one that is gone afterwards."""
    if mode != "off":
        yield root
        return
    with TemporaryDirectory(prefix="latent_tts_") as folder:
        try:
            yield Path(folder)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("nothing is kept, because of cache=off") from None


def check_writable(root: Path) -> None:
    """Raise UsageError if a cache cannot be made or written to, as far as that is known without a try."""
    there = next(path for path in (root, *root.absolute().parents) if os.path.exists(path))
    denied = there.is_dir() and not os.access(there, os.W_OK | os.X_OK)
    require("paths.cache", root, not denied, "cannot be written to, and lacks rollouts of this run")


def known_to_fit(root: Path) -> dict[str, int]:
    """Estimated bytes of the largest batches that fit, by model, dtype and device, where larger ones did not."""
    return {key: size for key, size in read_object(root / MEMORY_JSON).items() if isinstance(size, int)}


def remember_what_fits(root: Path, key: str, size: int) -> None:
    """Remember for later commands what fits, if the folder can be written to."""
    known = known_to_fit(root)
    if known.get(key) == size:
        return
    with suppress(OSError):
        write_text(root / MEMORY_JSON, json.dumps(known | {key: size}, indent=1) + "\n")


@dataclass(frozen=True)
class CacheEntry:
    """A cache folder as `ltts cache` lists it.

    Attributes:
        folder: of the entry, with the scores below it.
        key: what `key.json` says; empty where it cannot be read.
        rollouts: how many there are.
        size: bytes of everything in the folder.
        used: when a run last opened it, in seconds since the epoch.
    """

    folder: Path
    key: Mapping[str, Any]
    rollouts: int
    size: int
    used: float


def cache_entries(root: Path) -> list[CacheEntry]:
    """The entries of a cache, the one used last first; other folders and files are left out."""
    own = (path for path in root.glob("*/") if ENTRY_NAME.fullmatch(path.name) and not path.is_symlink())
    folders = [path for path in own if (path / KEY_JSON).is_file()]
    return sorted(map(_entry, folders), key=lambda entry: (-entry.used, entry.folder.name))


def _entry(folder: Path) -> CacheEntry:
    files = [path.stat() for path in folder.rglob("*") if path.is_file()]
    rollouts = 0
    for path in part_files(folder):
        with suppress(OSError, pa.ArrowException):  # damaged: what reads its rows says so
            rollouts += pq.read_metadata(path).num_rows
    key, size = read_record(folder / KEY_JSON) or {}, sum(file.st_size for file in files)
    return CacheEntry(folder, key, rollouts, size, max(file.st_mtime for file in files))
