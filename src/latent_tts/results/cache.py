"""The cache: rollouts and step scores kept across runs, a folder per key, a parquet file per part."""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from latent_tts.errors import RunError, bad_value
from latent_tts.results.files import settings_digest, whole_file

NOT_DECODED = "not_decoded"  # the stop reason of a rollout whose answer nobody needed


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
    or not at all, and says which rollouts it has.
    """

    schema: ClassVar[pa.Schema]
    holds: ClassVar[str]  # how the log says that rollouts are there

    def __init__(self, root: Path, key: Mapping[str, Any]) -> None:
        """Open (or make) the folder of a key.

        Raises:
            UsageError: the folder cannot be made.
        """
        self.folder = root / settings_digest(key)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with whole_file(self.folder / "key.json") as path:
                path.write_text(json.dumps(key, indent=1, sort_keys=True) + "\n")
        except OSError as error:
            raise bad_value("paths.cache", root, f"cannot be written to ({error.strerror})") from error

    def present(self) -> set[tuple[str, int]]:
        """The (row key, rollout) pairs that are there."""
        present: set[tuple[str, int]] = set()
        for part in self._parts():
            columns = _read_parquet(part, self.schema, ["row_key", "rollout"])
            present.update(zip(columns["row_key"].to_pylist(), columns["rollout"].to_pylist(), strict=True))
        return present

    def missing(self, wanted: pd.DataFrame) -> dict[str, list[int]]:
        """Rollout numbers, by row key, of the rows of `wanted` (columns `row_key`, `rollout`) that are not there."""
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
        table = pa.Table.from_pylist(rows, schema=self.schema)
        with whole_file(self.folder / f"{uuid.uuid4().hex}.parquet") as path:
            pq.write_table(table, path, compression="zstd", compression_level=1)

    def read(self, wanted: pd.DataFrame) -> pd.DataFrame:
        """The rows of `wanted` (columns `row_key`, `rollout`), in its order, with every other column of a part.

        Raises:
            RunError: a row is not there.
        """
        keys = set(wanted["row_key"])
        frames = []
        for part in self._parts():
            frame = _read_parquet(part, self.schema, self.schema.names).to_pandas()
            frames.append(frame[frame["row_key"].isin(keys)])
        rows = pd.concat(frames) if frames else self.schema.empty_table().to_pandas()
        rows = rows.drop_duplicates(["row_key", "rollout"])  # two runs at once may have made the same row
        found = wanted.merge(rows, on=["row_key", "rollout"], how="left", validate="one_to_one", indicator="_found")
        missing = int((found.pop("_found") != "both").sum())
        if missing:
            raise RunError(f"{missing} rollouts are missing from the cache {self.folder}")
        return found

    def _parts(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("*.parquet") if not path.name.startswith("."))


class RolloutCache(PartCache):
    """Rollouts with their latents."""

    schema = ROLLOUT_SCHEMA
    holds = "in"


class ScoreCache(PartCache):
    """Step scores of the rollouts of one `RolloutCache`, in its folder; how they are reduced is no part of them."""

    schema = SCORE_SCHEMA
    holds = "scored in"

    def __init__(self, rollouts: Path, key: Mapping[str, Any]) -> None:
        """Open (or make) the folder of a scorer's key below the rollouts' own folder."""
        super().__init__(rollouts / "scores", key)


def _read_parquet(path: Path, schema: pa.Schema, columns: list[str]) -> pa.Table:
    """Columns of a part; those that parts did not have yet when it was written are empty."""
    try:
        return pq.read_table(path, columns=columns, schema=schema)
    except (OSError, pa.ArrowException) as error:
        raise RunError(
            f"{path} cannot be read ({str(error).splitlines()[0]}); remove it to draw its rollouts again"
        ) from error


def unpack_latents(blobs: Iterable[bytes], width: int) -> list[np.ndarray]:
    """Latents (steps, D) of cached rows."""
    return [np.frombuffer(blob, dtype="<f4").reshape(-1, width) for blob in blobs]
