"""Digests of the code that determines a run's rollouts: editing that code voids the cache.

Code is compared as it is compiled, so comments, docstrings, assertions and layout do not count.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dis import opmap
from functools import cache, cached_property
from importlib.machinery import PathFinder
from importlib.metadata import Distribution, PackageNotFoundError, distributions, requires, version
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

PACKAGE = "latent_tts"
DRAWING = ("checkpoint", "engine", "model", "random", "sampler", "schedule", "search")
NOP, MAX_PREAMBLE = opmap["NOP"], 8  # instructions of a class body before its docstring, rather more than less
SCORING = ("checkpoint", "engine", "scorer")
# fields that change no rollout: where files are, what tables call them, what other options take as defaults
FIELDS_NOT_IN_KEY = {
    "model": {"name", "checkpoint", "revision", "recommended", "latent_rm", "trained_latents"},
    "scorer": {"checkpoint", "revision", "reduce", "range", "only_own"},
}
WHOLE = ("",)  # all rooms


def code_digests(objects: Iterable[object], configs: Iterable[Any], rooms: tuple[str, ...]) -> dict[str, str]:
    """Digests of the code behind some objects, by the package that it lies in.

    Args:
        objects: options as they were built; the classes that theirs inherit from count, and those of their values.
        configs: their nodes; what is built for their arguments (`_target_`) counts.
        rooms: of this package, the rooms that are read whole, whichever option of them was chosen.
    """
    modules = {*_modules_of(objects), *(_module_of(target) for config in configs for target in _targets(config))}
    packages = {module.partition(".")[0] for module in modules} - {PACKAGE} - sys.stdlib_module_names
    return {PACKAGE: _digest_of_rooms(rooms)} | {package: digest_of_package(package) for package in sorted(packages)}


@cache
def digest_of_package(package: str) -> str:
    """The digest of a package that is not this one: all modules of its distribution, or of its folder."""
    if package in _own_libraries():  # too large to read, and not edited
        return version(package)
    roots = _roots(package)
    found = _files(roots)
    for root in roots:
        for distribution, record in _installed(root.parent):
            if re.search(rf"^{package}(/|\.py,)", record, re.M):
                found |= {Path(str(distribution.locate_file(each))) for each in distribution.files or ()}
    if not any(map(_is_installed, roots)):
        found |= _imported_files(found)
    sources = sorted(path for path in found if path.suffix == ".py" and path.is_file())
    return _digest(sources)


def _roots(package: str) -> list[Path]:
    """The folders of a package, or the file of a module; nothing is imported for it."""
    found = sys.modules.get(package) or PathFinder.find_spec(package)
    path = getattr(found, "__path__", None) or getattr(found, "submodule_search_locations", None)
    file = getattr(found, "__file__", None) or getattr(found, "origin", None)
    return [Path(root) for root in path or ([file] if file else [])]


def _files(roots: Iterable[Path]) -> set[Path]:
    return {path for root in roots for path in ([root] if root.is_file() else root.rglob("*.py"))}


@cache
def _installed(folder: Path) -> list[tuple[Distribution, str]]:
    """The distributions that are installed in a folder, with their lists of files."""
    found = [(each, each.read_text("RECORD")) for each in distributions(path=[str(folder)])]
    return [(each, record) for each, record in found if record is not None]


def _is_installed(root: Path) -> bool:
    """Whether a package lies among installed ones, which are not edited."""
    return root.parent.name in ("site-packages", "dist-packages") or bool(_installed(root.parent))


@cache
def _digest_of_rooms(rooms: tuple[str, ...]) -> str:
    root = Path(__file__).resolve().parents[1]
    return _digest(path for room in rooms for path in sorted((root / room).rglob("*.py")))


def _digest(paths: Iterable[Path]) -> str:
    sha = hashlib.sha256()
    for path in paths:
        sha.update(path.name.encode() + _digest_of_source(path.read_bytes()))
    return sha.hexdigest()[:16]


@cache  # rooms are read in several sets
def _digest_of_source(source: bytes) -> bytes:
    sha = hashlib.sha256()
    try:
        left: list[Any] = [compile(source, "", "exec", dont_inherit=True, optimize=2)]  # 2: without docstrings
    except (SyntaxError, ValueError):  # a template, or a file of another Python
        return hashlib.sha256(source).digest()
    while left:
        value = left.pop()
        if isinstance(value, CodeType):  # what it does, without where it stands in its file
            names = (value.co_name, value.co_names, value.co_varnames, value.co_freevars, value.co_cellvars)
            counts = (value.co_argcount, value.co_posonlyargcount, value.co_kwonlyargcount, value.co_flags)
            handlers = getattr(value, "co_exceptiontable", b"")  # since Python 3.11
            sha.update(repr((names, counts)).encode() + _without_docstring(value.co_code) + handlers)
            left += [len(value.co_consts), *value.co_consts]
        elif isinstance(value, tuple):
            left += [len(value), *value]
        elif isinstance(value, frozenset):  # whose order is another in each process
            left += [len(value), *sorted(value, key=repr)]
        else:
            sha.update(repr(value).encode())
    return sha.digest()


def _without_docstring(instructions: bytes) -> bytes:
    """Instructions without the idle one that stands where a module or class has its docstring."""
    for place in range(0, min(len(instructions), 2 * MAX_PREAMBLE), 2):
        if instructions[place] == NOP:
            return instructions[:place] + instructions[place + 2 :]
    return instructions


def _imported_files(paths: Iterable[Path]) -> set[Path]:
    """The files of modules and packages that files import, directly or by others; none of installed packages."""
    left, found = list(paths), set()
    known = {PACKAGE, *sys.stdlib_module_names, *_own_libraries()}
    while left:
        names = set(_imported_names(left.pop())) - known
        known |= names
        new = _files(root for name in names for root in _roots(name) if not _is_installed(root)) - found
        found |= new
        left += [path for path in new if path.suffix == ".py"]
    return found


def _imported_names(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]


@cache
def _own_libraries() -> frozenset[str]:
    """The packages that this one needs itself."""
    needed: list[str] = []
    with suppress(PackageNotFoundError):  # a checkout can run without being installed
        needed = requires("latent-tts") or []
    return frozenset(re.split(r"[^\w-]", line)[0].replace("-", "_") for line in needed)


def computed_attributes(kind: type) -> set[str]:
    """The attributes that an option computes from its others and from its checkpoint."""
    return {name for base in kind.__mro__ for name, value in vars(base).items() if isinstance(value, cached_property)}


def _modules_of(options: Iterable[object]) -> Iterator[str]:
    """The modules of the classes of options, and of the values that they hold."""
    left, seen = list(options), set()
    while left:
        value = left.pop()
        kind = type(value)
        if id(value) in seen:
            continue
        seen.add(id(value))
        yield from (base.__module__ for base in kind.__mro__)
        if isinstance(value, Mapping):
            left += value.values()
        elif isinstance(value, list | tuple | set | frozenset):
            left += value
        elif isinstance(value, type | FunctionType):
            yield value.__module__
        elif kind.__module__.partition(".")[0] not in {*sys.stdlib_module_names, *_own_libraries()}:
            fields = getattr(value, "__dict__", {})
            left += [each for name, each in fields.items() if name not in computed_attributes(kind)]


def _targets(config: Any) -> Iterator[str]:
    if isinstance(config, Mapping):
        if isinstance(config.get("_target_"), str):
            yield config["_target_"]
        config = list(config.values())
    if isinstance(config, list):
        for each in config:
            yield from _targets(each)


def _module_of(target: str) -> str:
    """The module that a `_target_` lies in."""
    name = target
    while name and name not in sys.modules:
        name = name.rpartition(".")[0]
    return name or target
