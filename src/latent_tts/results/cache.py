"""The cache: rollouts and step scores kept across runs, a folder per key, a parquet file per part."""

from __future__ import annotations

import json
import logging
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from latent_tts.errors import RunError, bad_value
from latent_tts.results.files import (
    bytes_digest,
    digest_in_name,
    digest_named_file,
    set_aside,
    settings_digest,
    whole_file,
)

NOT_DECODED = "not_decoded"  # the stop reason of a rollout whose answer nobody needed
KEY_JSON, SCORES_FOLDER, PART_SUFFIX = "key.json", "scores", ".parquet"
ENTRY_NAME = re.compile(r"[0-9a-f]{16}")
PART_NAME = re.compile(r"[0-9a-f]{32}-[0-9a-f]{16}\.parquet")

MODES = ("on", "refresh", "off")
log = logging.getLogger(__name__)
MEASURED_SUMS = {
    "seconds": pa.float64(),  # the row's share of its batch's wall-clock time
    "floor_seconds": pa.float64(),  # of the least time that the device needs for the batch: see cost.py
    "bytes": pa.float64(),  # of the bytes that the batch cannot but read or write
}


MEASURED = MEASURED_SUMS | {"peak_memory_bytes": pa.int64()}


ROLLOUT_SCHEMA = pa.schema(
    [
        ("row_key", pa.string()),
        ("rollout", pa.int32()),
        ("answer_ids", pa.list_(pa.int32())),
        ("answer_logprob", pa.float32()),
        ("answer_margin", pa.float32()),
        ("stop_reason", pa.string()),
        ("latent_steps", pa.int32()),
        ("sweeps", pa.int32()),
        ("commits", pa.int32()),
        ("conflicts", pa.int32()),
        ("latents", pa.binary()),  # float32, latent_steps x D, little-endian
        *MEASURED.items(),
        ("device", pa.string()),
        ("rows", pa.int32()),
    ]
)


SCORE_SCHEMA = pa.schema(
    [
        ("row_key", pa.string()),
        ("rollout", pa.int32()),
        ("step_scores", pa.list_(pa.float32())),  # one a latent
        *MEASURED.items(),
    ]
)


class PartCache:
    """Rows (row key, rollout, ...) kept across runs; one folder for each thing that determines them.

    A folder holds `key.json` and parts. The parts are their own manifest: each is a parquet file that is there whole
    or not at all, says which rollouts it has, and has the digest of its bytes in its name. A part whose bytes are
    others is damaged: it is named, set aside and counts as not there.
    """

    schema: ClassVar[pa.Schema]
    holds: ClassVar[str]  # how the log says that rollouts are there

    def __init__(self, root: Path, key: Mapping[str, Any], about: Mapping[str, Any] | None = None) -> None:
        """Open (or make) the folder of a key.

        Args:
            root: of the cache.
            key: everything that determines the rows.
            about: what else `key.json` says, for people.

        Raises:
            UsageError: the folder cannot be made.
        """
        self.folder = root / settings_digest(key)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with whole_file(self.folder / KEY_JSON) as path:
                path.write_text(json.dumps({**key, **(about or {})}, indent=1, sort_keys=True) + "\n")
        except OSError as error:
            raise bad_value("paths.cache", root, f"cannot be written to ({error.strerror})") from error

    def present(self) -> set[tuple[str, int]]:
        """The (row key, rollout) pairs that are there, in parts that are whole.

        Raises:
            RunError: a part cannot be read, or is damaged and cannot be set aside.
        """
        present: set[tuple[str, int]] = set()
        for _, table in whole_parts(self.folder, ["row_key", "rollout"]):
            present.update(zip(table["row_key"].to_pylist(), table["rollout"].to_pylist(), strict=True))
        return present

    def missing(self, wanted: pd.DataFrame) -> dict[str, list[int]]:
        """Rollout numbers, by row key, of the rows of `wanted` (columns `row_key`, `rollout`) that are not there.

        Raises what `present` raises.
        """
        present = self.present()
        lacking: dict[str, list[int]] = {}
        for key, rollout in wanted.itertuples(index=False):
            if (key, rollout) not in present:
                lacking.setdefault(key, []).append(rollout)
        there = len(wanted) - sum(map(len, lacking.values()))
        if there:
            log.info("%d of %d rollouts are %s the cache %s", there, len(wanted), self.holds, self.folder)
        return lacking

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Write one part."""
        _write_part(self.folder, pa.Table.from_pylist(rows, schema=self.schema))

    def read(self, wanted: pd.DataFrame) -> pd.DataFrame:
        """The rows of `wanted` (columns `row_key`, `rollout`), in its order, with every other column of a part.

        Raises:
            RunError: a row is not there, or what `present` raises.
        """
        keys = set(wanted["row_key"])
        frames = []
        for _, table in whole_parts(self.folder, self.schema.names):
            frame = table.to_pandas()
            frames.append(frame[frame["row_key"].isin(keys)])
        rows = pd.concat(frames) if frames else self.schema.empty_table().to_pandas()
        rows = rows.drop_duplicates(["row_key", "rollout"])  # two runs at once may have made the same row
        found = wanted.merge(rows, on=["row_key", "rollout"], how="left", validate="one_to_one", indicator="_found")
        missing = int((found.pop("_found") != "both").sum())
        if missing:
            raise RunError(
                f"{missing} rollouts are missing from the cache {self.folder}; re-run the command to draw them"
            )
        return found

    def discard(self, wanted: pd.DataFrame) -> None:
        """Remove rows (columns `row_key`, `rollout`), so that they are made again.

        Raises what `present` raises.
        """
        _discard(self.folder, self.schema, wanted)


def whole_parts(folder: Path, columns: list[str]) -> Iterator[tuple[Path, pa.Table]]:
    """Columns of the parts of a folder that are whole; the others are set aside with a warning.

    Raises:
        RunError: a part cannot be read, or is damaged and cannot be set aside.
    """
    for path in part_files(folder):
        try:
            table = _read_part(path, columns)
            if table is None:
                log.warning("%s is damaged: it is now %s, and its rollouts are missing", path, set_aside(path).name)
                continue
        except FileNotFoundError:  # pruned, or set aside by another process
            continue
        except OSError as error:
            raise RunError(f"{path} cannot be read ({error.strerror})") from error
        yield path, table


def _write_part(folder: Path, table: pa.Table) -> None:
    with digest_named_file(folder, uuid.uuid4().hex, PART_SUFFIX) as path:
        pq.write_table(table, path, compression="zstd", compression_level=1)


def _discard(folder: Path, schema: pa.Schema, wanted: pd.DataFrame) -> None:
    """Remove rows from the parts of a folder; rows that stay are written before their old part goes."""
    gone = pd.MultiIndex.from_frame(wanted[["row_key", "rollout"]])
    for path, table in whole_parts(folder, schema.names):
        rows = pd.MultiIndex.from_arrays([table["row_key"].to_pylist(), table["rollout"].to_pylist()])
        stays = ~rows.isin(gone)
        if stays.all():
            continue
        if stays.any():
            _write_part(folder, table.filter(pa.array(stays)))
        path.unlink(missing_ok=True)


def _read_part(path: Path, columns: list[str]) -> pa.Table | None:
    """Columns of a part; None for one whose bytes are not those that were written."""
    content = path.read_bytes()
    if bytes_digest(content) != digest_in_name(path):
        return None
    try:
        table = pq.read_table(pa.BufferReader(content), columns=columns)
    except pa.ArrowException:
        return None
    return table if set(columns) <= set(table.column_names) else None


class RolloutCache(PartCache):
    """Rollouts with their latents."""

    schema = ROLLOUT_SCHEMA
    holds = "in"

    def discard(self, wanted: pd.DataFrame) -> None:
        """Remove rows, and every scorer's scores of them."""
        super().discard(wanted)
        for scores in self.folder.glob(f"{SCORES_FOLDER}/*/"):
            _discard(scores, SCORE_SCHEMA, wanted)


class ScoreCache(PartCache):
    """Step scores of the rollouts of one `RolloutCache`, in its folder; how they are reduced is no part of them."""

    schema = SCORE_SCHEMA
    holds = "scored in"

    def __init__(self, rollouts: Path, key: Mapping[str, Any]) -> None:
        """Open (or make) the folder of a scorer's key below the rollouts' own folder."""
        super().__init__(rollouts / SCORES_FOLDER, key)


@contextmanager
def cache_root(root: Path, mode: str) -> Iterator[Path]:
    """The folder of the cache; with `off` one that is gone afterwards."""
    if mode != "off":
        yield root
        return
    with TemporaryDirectory(prefix="latent_tts_") as folder:
        yield Path(folder)


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
    folders = [path for path in root.glob("*/") if ENTRY_NAME.fullmatch(path.name) and (path / KEY_JSON).is_file()]
    return sorted(map(_entry, folders), key=lambda entry: (-entry.used, entry.folder.name))


def _entry(folder: Path) -> CacheEntry:
    files = [(path, path.stat()) for path in folder.rglob("*") if path.is_file()]
    rollouts = 0
    for path in part_files(folder):
        with suppress(OSError, pa.ArrowException):  # damaged: what reads its rows says so
            rollouts += pq.read_metadata(path).num_rows
    key: Any = {}
    with suppress(ValueError):
        key = json.loads((folder / KEY_JSON).read_text())
    sizes, times = [stat.st_size for _, stat in files], [stat.st_mtime for _, stat in files]
    return CacheEntry(folder, key if isinstance(key, dict) else {}, rollouts, sum(sizes), max(times))


def part_files(folder: Path) -> list[Path]:
    """The parts of a cache folder, damaged or not."""
    return sorted(path for path in folder.glob(f"*{PART_SUFFIX}") if PART_NAME.fullmatch(path.name))


def unpack_latents(blobs: Iterable[bytes], width: int) -> list[np.ndarray]:
    """Latents (steps, D) of cached rows."""
    return [np.frombuffer(blob, dtype="<f4").reshape(-1, width) for blob in blobs]
