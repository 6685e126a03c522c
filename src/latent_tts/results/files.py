"""Files written whole: under another name, then renamed, so that an existing file is complete."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from latent_tts.errors import bad_value
from latent_tts.types import file_digest, read_object, text_digest

if TYPE_CHECKING:
    import pandas as pd

SECONDS_BETWEEN_PARTS = 2.0
LOCK = ".lock"
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
NO_SYNC = {errno.EBADF, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}  # of network file systems, often for folders
FORMULA = re.compile("'*[=+\\-@\t\r]")
log = logging.getLogger(__name__)
_held: set[Path] = set()  # folders that this process holds
_unsynced: set[int] = set()  # file systems of which it was said that they cannot flush


T = TypeVar("T")


@contextmanager
def written_in_parts(
    write: Callable[[list[T]], None], size: Callable[[T], int] = lambda result: 0, limit: int = 1
) -> Iterator[Callable[[Iterable[T]], None]]:
    """A function that takes results; `write` gets them two seconds' worth at a time, and the rest at the end.

    However it ends: an interruption loses no result that was taken.

    Args:
        write: what writes results.
        size: of a result.
        limit: of the size of results that are not written yet.
    """
    pending: list[T] = []
    written = time.perf_counter()

    def take(results: Iterable[T]) -> None:
        nonlocal pending, written
        pending += results
        late = pending and time.perf_counter() - written > SECONDS_BETWEEN_PARTS
        if late or sum(map(size, pending)) >= limit:
            done, pending = pending, []
            write(done)
            written = time.perf_counter()

    try:
        yield take
    finally:
        if pending:
            write(pending)


@contextmanager
def whole_file(path: Path, *, add_digest: bool = False) -> Iterator[Path]:
    """A path to write to, renamed to `path` when the block ends well; with its digest in the name, if that is wanted.

    After a power cut there is the old file or the whole new one: bytes reach the disk before the name does.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield partial
        _sync(partial)
        _rename(partial, path.with_stem(f"{path.stem}-{file_digest(partial)}") if add_digest else path)
        _sync(path.parent)
    except OSError as error:
        error.filename = error.filename or str(path.parent if add_digest else path)  # Arrow's errors name no file
        raise
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file of text."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a JSON-able mapping with its digest."""
    write_text(path, json.dumps({**record, "digest": settings_digest(record)}, indent=1) + "\n")


def read_record(path: Path) -> dict[str, Any] | None:
    """What `write_record` wrote; None where it is missing or damaged."""
    record = read_object(path)
    return record if record.pop("digest", None) == settings_digest(record) else None


def launch_rank() -> int:
    """The number of this process among those that `accelerate launch` or `torchrun` started together."""
    return int(os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or 0)


@contextmanager
def locked_folder(folder: Path, key: str) -> Iterator[None]:
    """Hold a folder, made if it is missing, as its only writer. The lock ends with the process, however it ends.

    Within the process that holds it, the folder can be locked again, to no effect.

    Processes of one launch (`accelerate launch`) share a folder: the first of them holds it.

    Args:
        folder: to hold.
        key: the config key that errors name.

    Raises:
        UsageError: another process holds it, or it cannot be made.
    """
    try:
        place = folder.resolve()
    except RuntimeError as error:
        raise bad_value(key, folder, "a link in it leads to itself") from error
    if launch_rank() > 0 or place in _held:
        yield
        return
    made = []
    try:
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _lock(folder / LOCK)
    except FileExistsError as error:
        raise bad_value(key, folder, "must be a folder, this is a file") from error
    except BlockingIOError as error:
        holder = ""
        with suppress(OSError):
            holder = (folder / LOCK).read_text().strip()
        allowed = f"process {holder or '?'} writes there; choose another folder, or wait until it has ended"
        raise bad_value(key, folder, allowed) from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise bad_value(key, folder, f"cannot be written to ({error.strerror})") from error
        log.warning("%s: its file system has no locks, so make sure that no other process writes there", folder)
        descriptor = None
    _held.add(place)
    try:
        yield
    finally:
        _held.remove(place)
        with suppress(OSError):  # the work is done
            (place / LOCK).unlink(missing_ok=True)
        if descriptor is not None:
            os.close(descriptor)
        for path in made:  # whatever was refused leaves nothing behind
            with suppress(OSError):
                path.rmdir()


def _lock(path: Path) -> int:
    """Lock a file that names this process; raises BlockingIOError where another has, or has just ended."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_nlink == 0:  # its last holder has just removed it
            raise BlockingIOError
        os.truncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()} on {socket.gethostname()}\n".encode())
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def set_aside(path: Path) -> Path:
    """Rename a damaged file, so that it is kept for a look at it and read no more; returns where it is."""
    aside = path.with_name(f"{path.name}.damaged")
    with suppress(FileNotFoundError):  # another process was first
        os.replace(path, aside)
    return aside


def _rename(partial: Path, path: Path) -> None:
    number = partial.stat().st_ino
    try:
        os.replace(partial, path)
    except FileNotFoundError:
        # a network file system that sends a request twice says so of the second one
        if not path.exists() or path.stat().st_ino != number:
            raise


def _sync(path: Path) -> None:
    """Make the disk hold what a file or a folder holds, where the file system can do that."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise OSError(error.errno, error.strerror, str(path)) from error
        system = os.fstat(descriptor).st_dev
        if system not in _unsynced:
            _unsynced.add(system)
            log.warning("%s: its file system cannot flush files, so a power cut may damage the last ones", path.parent)
    finally:
        os.close(descriptor)


def bytes_digest(content: bytes) -> str:
    """16 hex digits that stand for the content of a file."""
    return hashlib.sha256(content).hexdigest()[:16]


def write_csv(path: Path, frame: pd.DataFrame, **options: Any) -> None:
    """Write a table; `options` are those of `DataFrame.to_csv`."""
    with whole_file(path) as partial:
        spreadsheet_cells(frame).to_csv(partial, **options)


def spreadsheet_cells(frame: pd.DataFrame) -> pd.DataFrame:
    """A table whose texts no spreadsheet takes for a formula: those that could be one begin with an apostrophe."""
    return frame.map(lambda cell: f"'{cell}" if isinstance(cell, str) and _is_formula(cell) else cell)


def plain_cells(frame: pd.DataFrame) -> pd.DataFrame:
    """The table that `spreadsheet_cells` was given."""
    return frame.map(
        lambda cell: cell[1:] if isinstance(cell, str) and cell[:1] == "'" and _is_formula(cell[1:]) else cell
    )


def _is_formula(cell: str) -> bool:
    if FORMULA.match(cell) is None:
        return False
    try:
        float(cell)
    except ValueError:
        return True
    return False


def settings_digest(settings: Mapping[str, Any]) -> str:
    """16 hex digits of a JSON-able mapping."""
    return text_digest(json.dumps(settings, sort_keys=True))
