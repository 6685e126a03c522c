"""What later rollouts of a question are compared with, beside its rollouts in the cache: sums of directions of latents.

Without it, latents of rollouts that are in the cache are recomputed; so what is missing or damaged only costs time.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from latent_tts.results.files import whole_file
from latent_tts.results.parts import MAX_PART_BYTES, whole_table
from latent_tts.types import Floats

SUFFIX = ".sums"
SCHEMA = pa.schema(
    [("row_key", pa.string()), ("count", pa.int32()), ("latents", pa.int32()), ("directions", pa.binary())]
)


def read_direction_sums(folder: Path, counts: Mapping[str, int]) -> dict[str, Floats]:
    """The sums (T, D) of questions, by their row keys, of which those of as many rollouts as `counts` says are kept."""
    rows = [row for path in _files(folder) for row in _rows(path)]
    return {
        row["row_key"]: np.frombuffer(row["directions"], "<f8").reshape(row["latents"], -1).copy()
        for row in rows
        if counts.get(row["row_key"]) == row["count"]
    }


def write_direction_sums(folder: Path, sums: Mapping[str, tuple[int, np.ndarray]]) -> None:
    """Keep sums, and as many of other questions' as there is room for; none where the folder cannot be written to.

    Args:
        folder: of the rollouts.
        sums: by row key: of how many rollouts, and the sums (T, D).
    """
    before = _files(folder)
    rows = [
        {"row_key": key, "count": count, "latents": len(sums_TD), "directions": sums_TD.astype("<f8").tobytes()}
        for key, (count, sums_TD) in sums.items()
    ]
    rows += [row for path in before for row in _rows(path) if row["row_key"] not in sums]
    fitting = np.cumsum([len(row["directions"]) for row in rows]) <= MAX_PART_BYTES
    table = pa.Table.from_pylist(rows[: int(fitting.sum())], SCHEMA)
    with suppress(OSError):
        with whole_file(folder / f"{uuid.uuid4().hex}{SUFFIX}", add_digest=True) as path:
            pq.write_table(table, path.absolute(), compression="zstd", compression_level=1)
        for path in before:
            path.unlink(missing_ok=True)


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*{SUFFIX}"))


def _rows(path: Path) -> list[dict]:
    with suppress(OSError):
        table = whole_table(path, SCHEMA.names)
        return [] if table is None else table.cast(SCHEMA).to_pylist()
    return []
