"""Parquet parts: tables of rollouts in a folder, written by a thread, found by an index, gathered row by row.

A part is complete or absent, and has the digest of its bytes in its name. A part with other bytes is damaged: it is
named, set aside and counts as missing.
"""

from __future__ import annotations

import gzip
import json
import logging
import queue
import re
import threading
import time
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from latent_tts.errors import RunError
from latent_tts.results.files import bytes_digest, set_aside, whole_file, written_in_parts
from latent_tts.types import Bools, Float32, Int64

PART_SUFFIX, INDEX, SAMPLE = ".parquet", "index.json.gz", "sample.json.gz"
SAMPLED = 32  # k of 32 runs of k rows are in the sample of the index: a part has some, however few rows a run has
PART_NAME = re.compile(r"[0-9a-f]{32}-[0-9a-f]{16}\.parquet")
MAX_PART_BYTES = 12 << 20  # in memory; on the disk a part is smaller, and never larger than 16 MB
MIN_RELEASED_BYTES = 1 << 20  # giving back less takes longer than reading it
MAX_WAITING = 4  # tables that the writer has not taken yet
SECONDS_TO_SAY = 10.0  # that the work has waited for the disk
PLACE = ["row_key", "rollout"]  # what identifies a row
FRACTIONS = pa.list_(pa.float32())
Run: TypeAlias = tuple[str, int, int]  # of rows: row key, first rollout, how many
Index: TypeAlias = dict[str, list[Run]]  # by part
log = logging.getLogger(__name__)
pa.set_memory_pool(pa.system_memory_pool())  # see `release_memory`


# Writing


def write_part(folder: Path, table: pa.Table, name: str | None = None) -> None:
    """Write one part; `name` is what the index calls it (default: a new one)."""
    with whole_file(folder / f"{name or uuid.uuid4().hex}{PART_SUFFIX}", add_digest=True) as path:
        # Arrow takes a relative path with a colon for a URI
        pq.write_table(table, path.absolute(), compression="zstd", compression_level=1)


class PartWriter:
    """Writes tables as parts of a folder, in a thread, so that who computes them does not wait for the disk.

    A part is written every two seconds, when there are `MAX_PART_BYTES`, and at the end, however it ends: leaving the
    block waits until everything that was put is written. An error of the thread is raised by the next `put`,
    or at the end of the block.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # bounded by what waits, so that the end is never kept waiting: Ctrl-C there would leave a thread without one
        self._queue: queue.SimpleQueue[Callable[[], pa.Table] | None] = queue.SimpleQueue()
        self._room = threading.Semaphore(MAX_WAITING)
        self._thread = threading.Thread(target=self._write_all, name="part writer")
        self._error: BaseException | None = None
        self._index: Index = {}
        self._waited, self._wrote, self._said = 0.0, 0.0, False  # seconds; whether that was said

    def __enter__(self) -> PartWriter:
        self._thread.start()
        return self

    def put(self, make: Callable[[], pa.Table]) -> None:
        """Queue a table as the function that makes it; the thread calls it."""
        if self._error is not None:
            raise self._error
        started = time.perf_counter()
        self._room.acquire()
        self._queue.put(make)
        self._waited += time.perf_counter() - started
        if not self._said and min(self._waited, self._wrote) > SECONDS_TO_SAY:
            self._said = True
            log.warning("%s: its file system is slower than the work, which waits for it", self._folder)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._queue.put(None)
        self._thread.join()
        if self._error is None or self._error is error:
            return
        if error is None:
            raise self._error
        log.warning("%s: what was computed last is lost: %s", self._folder, self._error)

    def _write_all(self) -> None:
        queued = iter(self._queue.get, None)
        try:
            with written_in_parts(self._write, lambda table: table.nbytes, MAX_PART_BYTES) as take:
                for make in queued:
                    self._room.release()
                    take([make()])
        except BaseException as error:
            self._error = error
            for _ in queued:  # no `put` may wait for room
                self._room.release()
        if self._index:
            _write_index(self._folder, _read_index(self._folder / INDEX) | self._index)

    def _write(self, tables: Sequence[pa.Table]) -> None:
        pieces, started = [pa.concat_tables(tables)], time.perf_counter()
        while pieces:
            part = pieces.pop()
            half = len(part) // 2
            if part.nbytes > MAX_PART_BYTES and half:  # rows may be of very different lengths
                pieces += [part.slice(half), part.slice(0, half)]
            else:
                name = uuid.uuid4().hex
                write_part(self._folder, part, name)
                self._index[name] = _runs(part)
        self._wrote += time.perf_counter() - started


# Reading


def part_files(folder: Path) -> list[Path]:
    """The parts of a folder, damaged or not."""
    return sorted(path for path in folder.glob(f"*{PART_SUFFIX}") if PART_NAME.fullmatch(path.name))


def tables_holding(folder: Path, rows: GatheredRows, columns: list[str]) -> Iterator[pa.Table]:
    """Columns of the whole parts that hold rows which are still missing, one part after another.

    Which rows a part holds is in an index beside the parts, and in a smaller sample of it, which mostly suffices. Of
    parts that are not in the index, all is read.

    Raises:
        RunError: see `whole_parts`.
    """
    there, sample = {_name(path): path for path in part_files(folder)}, _read_index(folder / SAMPLE)
    sampled = (path for name, path in there.items() if rows.any_missing(sample.get(name, ())))
    yield from (table for _, table in whole_parts(sampled, columns))
    if rows.complete and (folder / INDEX).is_file():
        return
    known = _read_index(folder / INDEX)
    index = {name: known[name] for name in known if name in there}
    holding = (path for name, path in there.items() if name not in index or rows.any_missing(index[name]))
    for path, table in whole_parts(holding, columns):
        if _name(path) not in index:
            index[_name(path)] = _runs(table)
        yield table
    if not known.keys() == index.keys() == sample.keys():
        _write_index(folder, index)


def _name(path: Path) -> str:
    return path.name.partition("-")[0]


def _runs(table: pa.Table) -> list[Run]:
    return [(key, numbers.start, len(numbers)) for key, numbers in runs_of(table.select(PLACE).to_pandas())]


def _read_index(path: Path) -> Index:
    """The index or its sample; empty where the file is missing or damaged."""
    try:
        return json.loads(gzip.decompress(path.read_bytes()))  # which checks a checksum
    except (OSError, EOFError, ValueError, zlib.error):
        return {}


def _write_index(folder: Path, index: Index) -> None:
    """Write the index and its sample, if the folder can be written to: without them, the parts are read."""
    sample = {
        name: [run for run in runs if zlib.crc32(run[0].encode()) % SAMPLED < run[2]] for name, runs in index.items()
    }
    with suppress(OSError):
        for file, content in ((INDEX, index), (SAMPLE, sample)):
            with whole_file(folder / file) as path:
                path.write_bytes(gzip.compress(json.dumps(content).encode(), 6, mtime=0))


def whole_parts(paths: Iterable[Path], columns: list[str]) -> Iterator[tuple[Path, pa.Table]]:
    """Columns of those of some parts that are whole; the others are set aside with a warning.

    Raises:
        RunError: a part cannot be read, or is damaged and cannot be set aside.
    """
    for path in paths:
        try:
            table = whole_table(path, columns)
            if table is None:
                log.warning("%s is damaged: it is now %s, and its rollouts are missing", path, set_aside(path).name)
        except FileNotFoundError:  # pruned, or set aside by another process
            continue
        except OSError as error:
            raise RunError(f"{path} cannot be read, or set aside where it is damaged ({error.strerror})") from error
        if table is not None:
            yield path, table


def whole_table(path: Path, columns: list[str]) -> pa.Table | None:
    """Columns of a file whose name holds its digest; None where its bytes are not those that were written.

    Arrow reads a copy of its own. Its threads let go of what they read a little later: of an object of Python, when
    Python may be ending, which aborts the process.
    """
    content = path.read_bytes()
    if not path.stem.endswith(f"-{bytes_digest(content)}"):
        return None
    copy = pa.BufferOutputStream()
    copy.write(content)
    try:
        return pq.read_table(pa.BufferReader(copy.getvalue()), columns=columns).select(columns)
    except (pa.ArrowException, KeyError):  # whole, and of another version
        return None


def runs_of(places: pd.DataFrame) -> list[tuple[str, range]]:
    """Rollouts (columns `row_key`, `rollout`) as runs of consecutive numbers of a row key, in their order."""
    codes, keys = pd.factorize(places["row_key"])
    numbers = places["rollout"].to_numpy(dtype=np.int64)
    begins = np.flatnonzero((np.diff(codes, prepend=-1) != 0) | (np.diff(numbers, prepend=-2) != 1))
    counts = np.diff(begins, append=len(codes))
    return [
        (str(keys[codes[begin]]), range(int(numbers[begin]), int(numbers[begin]) + int(count)))
        for begin, count in zip(begins, counts, strict=True)
    ]


class GatheredRows:
    """Columns of some wanted rows, gathered from one table after another; the first of equal rows counts.

    Each column can be had once, so that there are never two copies of all of them.

    Attributes:
        wanted: the rows (columns `row_key`, `rollout`), in the order that they come out in.
    """

    def __init__(self, wanted: pd.DataFrame, schema: pa.Schema) -> None:
        """Start empty; `wanted` has at least one row and none twice. `schema` has the columns to gather."""
        self.wanted, self._schema = wanted, schema
        codes, keys = pd.factorize(wanted["row_key"])
        self._codes = {key: code for code, key in enumerate(keys)}
        ids = (codes.astype(np.int64) << 32) + wanted["rollout"].to_numpy()
        # runs of consecutive rollouts, by their ids: a few numbers instead of some per row
        places = np.flatnonzero(np.diff(ids, prepend=-2) != 1)
        order = ids[places].argsort()
        self._first, self._place = ids[places[order]], places[order]
        self._count = np.diff(places, append=len(ids))[order]
        self._found = np.zeros(len(ids), dtype=np.bool_)
        self._pieces = [(np.zeros(0, dtype=np.int64), schema.empty_table())]

    def take(self, table: pa.Table, which: Bools | None = None) -> None:
        """Keep those rows of a table (of those that `which` names) that are wanted and still missing."""
        places = self._places(self._ids_of(table))
        fresh = (places >= 0) & ~self._found[places]
        if which is not None:
            fresh &= which
        rows = np.flatnonzero(fresh)
        places, first = np.unique(places[rows], return_index=True)
        if len(places):
            self._found[places] = True
            taken = table.select(self._schema.names).take(rows[first])
            self._pieces.append((places.astype(np.min_scalar_type(len(self._found))), taken))

    def contains(self, table: pa.Table) -> Bools:
        """Which rows of a table are wanted."""
        return self._places(self._ids_of(table)) >= 0

    def any_missing(self, runs: Iterable[Run]) -> bool:
        """Whether any of some runs holds a row that is still missing."""
        codes = self._codes
        ids = [(codes[key] << 32) + np.arange(first, first + count) for key, first, count in runs if key in codes]
        places = self._places(np.concatenate([self._first[:0], *ids]))
        return not self._found[places[places >= 0]].all()

    @property
    def complete(self) -> bool:
        """Whether no row is missing."""
        return bool(self._found.all())

    def missing(self) -> pd.DataFrame:
        """The rows of `wanted` that are still missing."""
        return self.wanted[~self._found]

    def frame(self) -> pd.DataFrame:
        """The rows that were found, in the order of `wanted`, with their columns but lists of fractions."""
        places = self.wanted[PLACE] if self.complete else self.wanted.loc[self._found, PLACE]
        columns = {}
        for field in self._schema:
            if field.type != FRACTIONS:
                values = self._values(field)
                # pandas would make a text of its own for every row
                columns[field.name] = pd.Series(values, dtype=values.dtype, copy=False)
        return pd.DataFrame({name: places[name].array for name in PLACE} | columns, copy=False)

    def padded(self, name: str) -> Float32:
        """A column of lists of fractions (rows, longest), NaN beyond a row's own."""
        pieces = self._taken(name)
        lengths = [column.value_lengths().to_numpy() for _, column in pieces]
        longest = max((piece.max(initial=0) for piece in lengths), default=0)
        values = np.full((int(self._found.sum()), longest), np.nan, dtype=np.float32)
        for (rows, column), length in zip(pieces, lengths, strict=True):
            inside = np.arange(longest) < length[:, None]
            values[rows[inside.nonzero()[0]], inside.nonzero()[1]] = column.flatten().to_numpy()
        return values

    def _values(self, field: pa.Field) -> np.ndarray:
        """A column of the rows that were found, in the order of `wanted`: numbers, or objects that equal rows share."""
        objects, known = pa.types.is_string(field.type) or pa.types.is_list(field.type), {}
        ranks, pieces = zip(*self._taken(field.name), strict=True)
        content = [shared_objects(each, known) if objects else each.to_numpy(zero_copy_only=False) for each in pieces]
        values = np.empty(int(self._found.sum()), np.result_type(*content))  # Arrow makes floats of integers with nulls
        for rows, each in zip(ranks, content, strict=True):
            values[rows] = each
        return values

    def _taken(self, name: str) -> list[tuple[np.ndarray, pa.Array]]:
        """A column by pieces, each with the places of its rows among those found; it is not kept here any longer."""
        columns = [table[name].combine_chunks() for _, table in self._pieces]
        self._pieces = [(places, table.drop_columns(name)) for places, table in self._pieces]
        ranks = None if self.complete else self._found.cumsum() - 1
        if sum(column.nbytes for column in columns) >= MIN_RELEASED_BYTES:
            release_memory()
        return [
            (places if ranks is None else ranks[places], column)
            for (places, _), column in zip(self._pieces, columns, strict=True)
        ]

    def _places(self, ids: Int64) -> Int64:
        """Where rows stand in `wanted`, by their ids; -1 for those that are not wanted."""
        run = (self._first.searchsorted(ids, side="right") - 1).clip(min=0)
        beyond = ids - self._first[run]
        return np.where((beyond >= 0) & (beyond < self._count[run]), self._place[run] + beyond, -1)

    def _ids_of(self, table: pa.Table) -> Int64:
        encoded = table["row_key"].combine_chunks().dictionary_encode()
        codes = np.array([self._codes.get(key, -1) for key in encoded.dictionary.to_pylist()], dtype=np.int64)
        return (codes[encoded.indices.to_numpy()] << 32) + table["rollout"].to_numpy()


# Columns


def shared_objects(column: pa.Array, known: dict[Any, Any]) -> np.ndarray:
    """A column as Python objects (texts, or lists of numbers), equal ones the same object: many rows are equal.

    Args:
        column: of texts or lists.
        known: the objects so far, also of other columns; more are added.
    """
    objects = np.empty(len(column), dtype=object)
    for row, value in enumerate(column.to_pylist()):
        objects[row] = known.setdefault(tuple(value) if isinstance(value, list) else value, value)
    return objects


def release_memory() -> None:
    """Give memory that Arrow and NumPy have freed back to the system: after a stage it is about 100 bytes per row."""
    pa.default_memory_pool().release_unused()


def ragged(values_RT: np.ndarray, lengths_R: np.ndarray) -> pa.ListArray:
    """An array as a column of lists, the first `lengths_R` of each row."""
    own = np.arange(values_RT.shape[1]) < lengths_R[:, None]
    offsets = np.concatenate([[0], lengths_R.cumsum()]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values_RT[own]))
