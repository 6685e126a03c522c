"""The one place that knows file names and columns: the rollout cache, `rollouts.parquet`, `metrics.csv`, `run.json`.

Everything is written whole under another name and then renamed, so a file that is there is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pandas.api.types import is_numeric_dtype

from latent_tts.errors import RunError, UsageError, bad_value

ROLLOUTS, METRICS, RUN_JSON, LATENTS = "rollouts.parquet", "metrics.csv", "run.json", "latents.safetensors"
SCORES = "scores.parquet"
SECONDS_BETWEEN_PARTS = 2.0
NOT_DECODED = "not_decoded"  # the stop reason of a rollout whose answer nobody needed
# fmt: off
ROLLOUT_COLUMNS = [
    "question_id", "rollout", "prediction", "correct", "score", "answer_logprob", "answer_margin", "stop_reason",
    "answer_text", "answer_ids", "answer_tokens", "latent_steps",
]
METRIC_COLUMNS = [
    "run_id", "model", "checkpoint", "task", "split", "sampler", "sampler_param", "sampler_value", "settings",
    "schedule", "search", "budget", "scorer", "aggregator", "seed", "dtype", "n", "drawn", "metric", "value",
    "ci_low", "ci_high", "questions",
]
# fmt: on
NUMBER_COLUMNS = ["n", "drawn", "value", "ci_low", "ci_high", "questions"]
ALWAYS_THERE = ["n", "drawn", "metric", "questions"]  # in every row
RUN_COLUMNS = METRIC_COLUMNS[: METRIC_COLUMNS.index("n")]
# what makes rows belong to one curve
CURVE_COLUMNS = [name for name in RUN_COLUMNS if name not in ("run_id", "aggregator", "seed")]
SEED_COLUMNS = ["seeds", "seed_sd"]  # beside the others in a table of means over seeds
MEASURED_SUMS = {
    "seconds": pa.float64(),  # the row's share of its batch's wall-clock time
    "floor_seconds": pa.float64(),  # of the least time that the device needs for the batch: see cost.py
    "bytes": pa.float64(),  # of the bytes that the batch cannot but read or write
}
MEASURED = MEASURED_SUMS | {"peak_memory_bytes": pa.int64()}
PART_SCHEMA = pa.schema(
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


T = TypeVar("T")


@contextmanager
def written_in_parts(write: Callable[[list[T]], None]) -> Iterator[Callable[[Iterable[T]], None]]:
    """A function that takes results; `write` gets them two seconds' worth at a time, and the rest at the end.

    However it ends: an interruption loses nothing that was handed over.
    """
    pending: list[T] = []
    written = time.perf_counter()

    def take(results: Iterable[T]) -> None:
        nonlocal pending, written
        pending += results
        if pending and time.perf_counter() - written > SECONDS_BETWEEN_PARTS:
            done, pending = pending, []
            write(done)
            written = time.perf_counter()

    try:
        yield take
    finally:
        if pending:
            write(pending)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to, renamed to `path` when the block ends well."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def settings_digest(settings: Mapping[str, Any]) -> str:
    """16 hex digits of a JSON-able mapping."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


class PartCache:
    """Rows (row key, rollout, ...) kept across runs; one folder for each thing that determines them.

    A folder holds `key.json` and parts. The parts are their own manifest: each is a parquet file that is there whole
    or not at all, and says which rollouts it has.
    """

    schema: ClassVar[pa.Schema]

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

    schema = PART_SCHEMA


class ScoreCache(PartCache):
    """Step scores of the rollouts of one `RolloutCache`, in its folder; how they are reduced is no part of them."""

    schema = SCORE_SCHEMA

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


def write_rollouts(folder: Path, rollouts: pd.DataFrame) -> None:
    """Write `rollouts.parquet`."""
    with whole_file(folder / ROLLOUTS) as path:
        rollouts[ROLLOUT_COLUMNS].to_parquet(path, index=False)


def read_rollouts(folder: Path) -> pd.DataFrame:
    """The `rollouts.parquet` of a run folder.

    Raises:
        UsageError: it is missing or cannot be read.
    """
    try:
        return pd.read_parquet(folder / ROLLOUTS, columns=ROLLOUT_COLUMNS)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UsageError(f"{folder / ROLLOUTS}: cannot be read ({str(error).splitlines()[0]})") from error


def write_latents(folder: Path, latents: list[np.ndarray]) -> None:
    """Write `latents.safetensors`: one tensor `latents_RTD`; rows with fewer steps end in zeros."""
    from safetensors.numpy import save_file

    steps = max(len(row) for row in latents)
    latents_RTD = np.zeros((len(latents), steps, latents[0].shape[1]), dtype=np.float32)
    for index, row in enumerate(latents):
        latents_RTD[index, : len(row)] = row
    with whole_file(folder / LATENTS) as path:
        save_file({"latents_RTD": latents_RTD}, path)


def read_latents(folder: Path, steps: Iterable[int]) -> list[np.ndarray]:
    """The latents (steps, D) of each row of a run folder, from its `latents.safetensors`.

    Raises:
        UsageError: the file cannot be read, or has another number of rows.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    counts = list(steps)
    try:
        latents_RTD = load_file(folder / LATENTS)["latents_RTD"]
    except (OSError, KeyError, SafetensorError) as error:
        raise UsageError(f"{folder / LATENTS}: cannot be read ({error})") from error
    if len(latents_RTD) != len(counts):
        raise UsageError(f"{folder / LATENTS}: {len(latents_RTD)} rows, but {len(counts)} in {ROLLOUTS}")
    return [row[:count] for row, count in zip(latents_RTD, counts, strict=True)]


def write_scores(folder: Path, rollouts: pd.DataFrame, step_scores: Sequence[Sequence[float]]) -> None:
    """Write `scores.parquet`: each rollout's score and the step scores behind it."""
    table = rollouts[["question_id", "rollout", "score"]].assign(step_scores=pd.Series(list(step_scores)))
    with whole_file(folder / SCORES) as path:
        table.to_parquet(path, index=False)


def write_metrics(path: Path, metrics: pd.DataFrame) -> None:
    """Write a metrics table (or one of means over seeds); missing figures are empty cells."""
    columns = METRIC_COLUMNS + [name for name in SEED_COLUMNS if name in metrics]
    with whole_file(path) as partial:
        metrics[columns].to_csv(partial, index=False, float_format="%.10g")


def read_metrics(path: Path) -> pd.DataFrame:
    """Read a metrics table.

    Raises:
        UsageError: it is not one, or is cut off.
    """
    try:
        content = path.read_bytes()
        frame = pd.read_csv(
            BytesIO(content),
            dtype=dict.fromkeys(RUN_COLUMNS, str),
            keep_default_na=False,
            na_values={name: [""] for name in METRIC_COLUMNS + SEED_COLUMNS if name not in RUN_COLUMNS},
        )
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read as a metrics table ({error})") from error
    missing = [name for name in METRIC_COLUMNS if name not in frame.columns]
    if missing:
        raise UsageError(f"{path}: not a metrics table, it lacks the columns {', '.join(missing[:5])}")
    if frame.empty or not content.endswith((b"\n", b"\r")):  # the rest of a last number would not be missed
        raise UsageError(f"{path}: {'holds no rows' if frame.empty else 'is cut off, its last line has no end'}")
    for name in NUMBER_COLUMNS:
        if not is_numeric_dtype(frame[name]):
            raise UsageError(f"{path}: not a metrics table, its column {name} holds something else than numbers")
    for name in ALWAYS_THERE:
        if frame[name].isna().any():
            raise UsageError(f"{path}: not a metrics table, its row {frame[name].isna().argmax() + 1} has no {name}")
    return frame


def write_run_json(folder: Path, record: Mapping[str, Any]) -> None:
    """Write `run.json`, last of all: its presence means that the run is complete."""
    with whole_file(folder / RUN_JSON) as path:
        path.write_text(json.dumps(record, indent=1, sort_keys=True, default=str) + "\n")


def read_run_json(folder: Path, needed: Mapping[str, type]) -> dict[str, Any]:
    """Read a `run.json`.

    Args:
        folder: of the run.
        needed: the kinds of the values that have to be there, by dotted key.

    Raises:
        UsageError: it cannot be read, or lacks one.
    """
    path = folder / RUN_JSON
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read ({error})") from error
    lacking = []
    for key, kind in needed.items():
        value = record
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if not isinstance(value, kind):
            lacking.append(key)
    if lacking:
        raise UsageError(f"{path}: lacks {', '.join(lacking[:5])}; draw that run again with ltts run")
    return record


def is_complete(folder: Path) -> bool:
    """Whether a run folder's run ended well."""
    return (folder / RUN_JSON).is_file()


def run_folders(path: Path, key: str = "runs") -> list[Path]:
    """The run folders at or below a folder: those with a `.hydra` record of a started run; in job order.

    Raises:
        UsageError: there are none.
    """
    if not path.is_dir():
        raise bad_value(key, path, "no such folder")
    found = [hydra.parent for hydra in path.rglob(".hydra") if hydra.is_dir()]
    if not found:
        raise bad_value(key, path, "neither a run folder nor one that holds run folders")
    return sorted(found, key=lambda folder: [(not p.isdigit(), int(p) if p.isdigit() else 0, p) for p in folder.parts])


def join_metrics(folders: list[Path]) -> tuple[pd.DataFrame, list[Path]]:
    """The metrics of the complete run folders in one table without repeated rows, and the folders left out."""
    complete = [folder for folder in folders if is_complete(folder) and (folder / METRICS).is_file()]
    left_out = [folder for folder in folders if folder not in complete]
    if not complete:
        return pd.DataFrame(columns=METRIC_COLUMNS), left_out
    joined = pd.concat([read_metrics(folder / METRICS) for folder in complete], ignore_index=True)
    return joined.drop_duplicates(["run_id", "aggregator", "n", "drawn", "metric"], ignore_index=True), left_out
