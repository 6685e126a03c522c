"""Digests of the code that determines a run's rollouts: editing that code voids the cache.

Code is compared as it is compiled, so comments, docstrings, assertions and layout do not count.
"""

from __future__ import annotations

import ast
import dis
import hashlib
import marshal
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import cache, cached_property
from importlib.machinery import PathFinder
from importlib.metadata import distributions, version
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

PACKAGE = "latent_tts"
DRAWING = ("checkpoint", "engine", "model", "random", "sampler", "schedule", "search")
SCORING = ("checkpoint", "engine", "scorer")
# fields that change no rollout: where files are, what tables call them, what other options take as defaults
FIELDS_NOT_IN_KEY = {
    "model": {"name", "checkpoint", "revision", "recommended", "latent_rm", "trained_latents"},
    "scorer": {"checkpoint", "revision", "reduce", "range", "only_own"},
}
WHOLE = ("",)  # all rooms


def code_digests(objects: Iterable[object], configs: Iterable[Any], rooms: tuple[str, ...]) -> dict[str, str]:
    """Digests of the code behind some objects, by the package that it lies in.

    What a package imports that is not installed counts, too, such as the modules beside a single file.

    Args:
        objects: options as they were built; the classes that theirs inherit from count, and those of their values.
        configs: their nodes; what is built for their arguments (`_target_`) counts.
        rooms: of this package, the rooms that are read whole, whichever option of them was chosen.
    """
    left = {module.partition(".")[0] for module in _modules_of([*objects, *configs])}
    digests = {PACKAGE: _digest_of_rooms(rooms)}
    while left := left - digests.keys() - sys.stdlib_module_names:
        package = left.pop()
        digests[package] = digest_of_package(package)
        left |= {name for name in _imported_packages(package) if not _sources(name)[1]}
    return digests


@cache
def digest_of_package(package: str) -> str:
    """The digest of a package that is not this one: all modules of its distribution, or of its folder."""
    if package in _own_libraries():  # too large to read, and not edited
        return version(package)
    return _digest(_sources(package)[0])


@cache
def _sources(package: str) -> tuple[list[Path], bool]:
    """The modules of a package, and whether it is an installed one, which is not edited; nothing is imported."""
    found = sys.modules.get(package) or PathFinder.find_spec(package)
    folders = getattr(found, "__path__", None) or getattr(found, "submodule_search_locations", None)
    file = getattr(found, "__file__", None) or getattr(found, "origin", None)
    roots = [Path(root) for root in folders or filter(None, [file])]
    files = {path for root in roots for path in (root.rglob("*.py") if root.is_dir() else [root])}
    installed = any(root.parent.name in ("site-packages", "dist-packages") for root in roots)
    for distribution in distributions(path=[str(root.parent) for root in roots]):
        record = distribution.read_text("RECORD") or ""
        installed = installed or bool(record)
        if re.search(rf"^{package}(/|\.py,)", record, re.M):
            files |= {Path(str(distribution.locate_file(each))) for each in distribution.files or ()}
    return sorted(path for path in files if path.suffix == ".py" and path.is_file()), installed


@cache
def _imported_packages(package: str) -> set[str]:
    """The packages that a package imports; none if it is an installed one."""
    sources, installed = _sources(package)
    names: list[str] = []
    for path in () if installed else sources:
        with suppress(SyntaxError, ValueError):
            for node in ast.walk(ast.parse(path.read_bytes())):
                if isinstance(node, ast.Import):
                    names += [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                    names.append(node.module)
    return {name.partition(".")[0] for name in names} - _own_libraries()


@cache
def _digest_of_rooms(rooms: tuple[str, ...]) -> str:
    root = Path(__file__).resolve().parents[1]
    return _digest(path for room in rooms for path in sorted((root / room).rglob("*.py")))


def _digest(paths: Iterable[Path]) -> str:
    digests = [path.name.encode() + _digest_of_source(path.read_bytes()) for path in paths]
    return hashlib.sha256(b"".join(digests)).hexdigest()[:16]


@cache  # rooms are read in several sets
def _digest_of_source(source: bytes) -> bytes:
    with suppress(SyntaxError, ValueError, RecursionError):  # a template, or a file of another Python: all of it counts
        code = compile(source, "", "exec", dont_inherit=True, optimize=2)
        source = marshal.dumps(_without_places(code), 2)  # later formats depend on which objects are shared
    return hashlib.sha256(source).digest()


def _without_places(code: CodeType) -> CodeType:
    """Code without its lines, nor the instruction that stands for a docstring or a `pass`, which does nothing."""
    pairs = zip(code.co_code[::2], code.co_code[1::2], strict=True)
    return code.replace(
        co_code=bytes(byte for pair in pairs if pair[0] != dis.opmap["NOP"] for byte in pair),
        co_consts=tuple(_without_places(each) if isinstance(each, CodeType) else each for each in code.co_consts),
        co_firstlineno=1,
        co_linetable=b"",
    )


@cache
def _own_libraries() -> frozenset[str]:
    """The packages that this one needs itself."""
    return frozenset(
        re.split(r"[^\w-]", line)[0].replace("-", "_")
        for each in distributions(name="latent-tts")  # none if a checkout runs without being installed
        for line in each.requires or ()
    )


def computed_attributes(kind: type) -> set[str]:
    """The attributes that an option computes from its others and from its checkpoint."""
    return {name for base in kind.__mro__ for name, value in vars(base).items() if isinstance(value, cached_property)}


def _modules_of(objects: Iterable[object]) -> Iterator[str]:
    """The modules of the classes of objects, of the values that they hold, and of `_target_` in config nodes."""
    left, seen = list(objects), set()
    while left:
        value = left.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        kind = type(value)
        yield from (base.__module__ for base in kind.__mro__)
        if isinstance(value, Mapping):
            if "_target_" in value:
                yield str(value["_target_"])
            left += value.values()
        elif isinstance(value, list | tuple | set | frozenset):
            left += value
        elif isinstance(value, type | FunctionType):
            yield value.__module__
        elif kind.__module__.partition(".")[0] not in sys.stdlib_module_names | _own_libraries():
            fields = getattr(value, "__dict__", {})
            left += [fields[name] for name in fields.keys() - computed_attributes(kind)]
