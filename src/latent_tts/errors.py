"""Errors a user can cause. Each is one to four lines: the key, the value, what is allowed."""

from __future__ import annotations

import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from typing import Any, TypeGuard

LESS_MEMORY = " (a smaller engine.rows needs less memory)"

DEVICE = "one of auto, cpu, cuda, cuda:INDEX"  # whether it exists is checked where it is used
SEED = "a whole number, 0 or more"
# what moves a terminal's cursor, changes its colours or the direction of text
CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ud800-\udfff\ufeff]")


def printable(text: str) -> str:
    """Text with its control characters, but for newlines, written out: a name cannot steer a terminal."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class LatentTTSError(Exception):
    """Base of every error that is shown without a traceback."""

    exit_code = 1


class UsageError(LatentTTSError):
    """Something the user wrote is wrong; nearly always found before a model is loaded."""

    exit_code = 2


class RunError(LatentTTSError):
    """A failure while computing; what was computed stays on disk."""


def bad_value(key: str, value: object, allowed: str) -> UsageError:
    """The error for a config value out of its range."""
    return UsageError(f"{key}={as_typed(value)}: {allowed}")


def as_typed(value: object) -> str:
    """A value as the command line takes it: `null`, `true`, `[a,b]`."""
    if isinstance(value, list | tuple):
        return f"[{','.join(map(as_typed, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def require(key: str, value: object, ok: bool, allowed: str) -> None:
    """Raise `bad_value` unless a config value is allowed."""
    if not ok:
        raise bad_value(key, value, allowed)


def unknown_key(key: str, known: Iterable[str]) -> UsageError:
    """The error for a config key that does not exist."""
    names = list(known)
    hint = did_you_mean(closest(key.rpartition(".")[2], names, cutoff=0.7))
    allowed = f"one of {', '.join(names)}" if names else "there are none"
    return UsageError(f"{key}: no such key; {hint}{allowed}")


def closest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The most similar of some words, if one is similar."""
    return next(iter(get_close_matches(word, list(known), n=1, cutoff=cutoff)), None)


def did_you_mean(word: str | None) -> str:
    """A hint at a word; empty for None."""
    return f"did you mean {word}? " if word else ""


def is_number(value: object) -> TypeGuard[float]:
    """Whether a config value is a finite number."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max  # `math.isfinite` raises for integers beyond it


def is_whole(value: object) -> TypeGuard[int]:
    """Whether a config value is an integer."""
    return isinstance(value, int) and not isinstance(value, bool)


VALUE_KINDS: dict[str, Callable[[Any], bool]] = {  # of values, as errors call them
    DEVICE: lambda value: isinstance(value, str) and re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", value) is not None,
    SEED: lambda value: is_whole(value) and value >= 0,
    "a positive integer": lambda value: is_whole(value) and 0 < value <= sys.maxsize,
    "an integer, 0 or more": lambda value: is_whole(value) and 0 <= value <= sys.maxsize,
    "a positive number": lambda value: is_number(value) and value > 0,
    "a finite number, 0 or more": lambda value: is_number(value) and value >= 0,
    "a number in [0, 1)": lambda value: is_number(value) and 0 <= value < 1,
    "a number in (0, 1)": lambda value: is_number(value) and 0 < value < 1,
    "a number in (0, 1]": lambda value: is_number(value) and 0 < value <= 1,
    "true or false": lambda value: isinstance(value, bool),
}


def check_fields(group: str, option: object, **kinds: str | Iterable[str]) -> None:
    """Check fields of an option.

    Args:
        group: what their keys begin with; empty for keys of a command.
        option: the object whose attributes are checked.
        **kinds: what each must be: one of `VALUE_KINDS`, maybe followed by `, or null`; or one of some words.

    Raises:
        UsageError: a field has another value.
    """
    for name, kind in kinds.items():
        value = getattr(option, name)
        if isinstance(kind, str):
            plain, null, _ = kind.partition(", or null")
            ok = VALUE_KINDS[plain](value) or (bool(null) and value is None)
        else:
            words = list(kind)
            ok, kind = value in words, " or ".join(words) if len(words) == 2 else f"one of {', '.join(words)}"
        require(f"{group}.{name}".lstrip("."), value, ok, f"must be {kind}")


@contextmanager
def computing(what: str, kept: str, hint: str = "") -> Iterator[None]:
    """Turn what torch raises (out of memory, a failing device) into a RunError that says what is kept.

    Args:
        what: what is being done, as in `drawing rollouts`.
        kept: what is kept and where, as in `what was drawn is in FOLDER`.
        hint: appended to the line that says how to resume.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        traceback.clear_frames(error.__traceback__)  # their tensors would fill the memory of a sweep's next jobs
        raise RunError(f"{what} failed: {reason(error)}\n{kept}; re-run the command to resume{hint}") from error


def reason(error: BaseException) -> str:
    """What an exception says, in one line; an empty MemoryError says nothing itself."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "out of memory" if isinstance(error, MemoryError) else type(error).__name__


@contextmanager
def hub_clients(seconds: float = 3.0) -> Iterator[None]:
    """Let the clients of the Hugging Face hub use only what they have on disk if the hub cannot be reached.

    Without this, the clients would retry for a minute. Behind a proxy nothing is changed.

    Args:
        seconds: how long to wait for the hub.

    Raises:
        ConnectionError: the hub cannot be reached, and a client did not find what it needs on disk.
    """
    from urllib.request import getproxies

    import huggingface_hub.constants as settings

    flag = "HF_HUB_OFFLINE"
    modules = [vars(module) for module in (settings, sys.modules.get("datasets.config")) if module is not None]
    before = [module[flag] for module in modules]
    offline = not (any(before) or "https" in getproxies() or _answers(settings.ENDPOINT, seconds))
    try:
        for module in modules if offline else ():
            module[flag] = True
        yield
    except Exception as error:
        if offline:
            raise ConnectionError(f"{settings.ENDPOINT} cannot be reached, and no copy is on this disk") from error
        raise
    finally:
        for module, value in zip(modules, before, strict=True):
            module[flag] = value


def _answers(address: str, seconds: float) -> bool:
    """Whether a server takes a connection in time; looking up its name counts."""
    from socket import create_connection
    from urllib.parse import urlsplit

    url, found = urlsplit(address), threading.Event()

    def connect() -> None:
        with suppress(OSError):
            create_connection((url.hostname, url.port or (80 if url.scheme == "http" else 443)), seconds).close()
            found.set()

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(seconds)
    return found.is_set()
