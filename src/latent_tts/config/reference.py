"""What `conf/` says of commands, groups, options and keys, comments included: for help, lists and completion.

It reads the YAML files as text and needs no Hydra, so that a completion takes a fraction of a second.
"""

from __future__ import annotations

import ast
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml

PACKAGES = "latent_tts.conf"  # entry points of packages that bring options
GROUPS = {
    "model": "the reasoner: its family and its checkpoint",
    "task": "the questions",
    "sampler": "what makes the rollouts of a question differ",
    "schedule": "the order in which latents are computed",
    "search": "how rollouts are searched for",
    "budget": "how many rollouts are drawn, and at which n figures are reported",
    "scorer": "what scores rollouts",
    "aggregator": "how one answer is picked from many rollouts; a list",
    "recipe": "how a family is trained",
    "engine": "how rollouts are computed",
    "executor": "where rollouts are computed",
    "budget/rule": "when a question of budget=adaptive has enough rollouts",
    "experiment": "settings that belong together",
    "local": "your own defaults, in conf/local/default.yaml (of other commands than run: conf/local/COMMAND.yaml)",
}
WORDS = {
    "int": "integer", "float": "number", "bool": "true or false", "str": "text", "None": "null",
    "Sequence": "list", "list": "list", "tuple": "list", "Mapping": "mapping", "dict": "mapping",
}  # fmt: skip


@dataclass(frozen=True)
class Key:
    """A key of a command or of an option.

    Attributes:
        name: in full, as in `answer.temperature`.
        default: as the file writes it.
        comment: what the file says of it; may be empty.
        kind: type in words, as in `integer or null`; empty where it is not known.
    """

    name: str
    default: str
    comment: str
    kind: str = ""


@dataclass(frozen=True)
class Option:
    """An option of a group.

    Attributes:
        group, name: as in `group=name`.
        about: its file's first comment; may be empty.
        keys: what can be set in it.
    """

    group: str
    name: str
    about: str
    keys: tuple[Key, ...]


@dataclass(frozen=True)
class Command:
    """A command's own file.

    Attributes:
        examples: the comment at the top of its file, without the first line.
        keys: its own keys.
        groups: its groups in order, with the option chosen by default, or the list of them.
        lists: those of its groups of which several options can be chosen.
    """

    examples: tuple[str, ...]
    keys: tuple[Key, ...]
    groups: Mapping[str, list[str]]
    lists: frozenset[str]


def conf_dir() -> str:
    """Directory of the YAML files: packaged in a wheel, `conf/` in a checkout."""
    here = Path(__file__).resolve().parents[1]
    packaged = here / "conf"
    return str(packaged if packaged.is_dir() else here.parents[1] / "conf")


def user_conf_dir() -> Path | None:
    """Folder of the user's own options, as `ltts tune` writes one: `GROUP/OPTION.yaml`; None without a home."""
    home = os.environ.get("XDG_CONFIG_HOME")
    try:
        return Path(home or Path.home() / ".config") / "latent_tts"
    except RuntimeError:  # neither HOME nor an entry in the password database
        return None


def conf_packages() -> tuple[EntryPoint, ...]:
    """The packages that bring options, by name; looked for once per search path of Python."""
    return _conf_packages(tuple(sys.path))


@cache
def _conf_packages(search_path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    return tuple(sorted(entry_points(group=PACKAGES)))


def conf_dirs(extra: Iterable[str] = ()) -> list[Path]:
    """Where options are found, in the order in which they win: this package's, other packages', the user's, `extra`."""
    packages = []
    for entry in conf_packages():
        with suppress(ImportError):  # a broken package: a command that uses it says so
            spec = find_spec(entry.value)
            packages += [Path(place) for place in spec.submodule_search_locations or ()] if spec else []
    places = [Path(conf_dir()), *packages, user_conf_dir(), *(Path(folder).expanduser() for folder in extra)]
    return [place for place in places if place is not None and place.is_dir()]


def option_names(group: str, places: Sequence[Path]) -> list[str]:
    """The names of a group's options, those in folders too, as `smollm2/codi`."""
    found = {path.relative_to(place / group) for place in places for path in (place / group).rglob("*.yaml")}
    nested = {name.removeprefix(f"{group}/") for name in nested_groups(group, places)}
    return sorted(path.with_suffix("").as_posix() for path in found if path.parts[0] not in nested)


def options_of(command: str, group: str, places: Sequence[Path]) -> list[str]:
    """The names of the options of a group that a command can take: experiments are made for some commands."""
    names = option_names(group, places)
    if group != "experiment":
        return names
    own = read_command(command)
    known = {*own.groups, *(key.name.partition(".")[0] for key in own.keys)}
    return [name for name in names if known >= _settings_of(read_option(group, name, places), places)]


def _settings_of(option: Option, places: Sequence[Path]) -> set[str]:
    """What an experiment sets: groups, and the first parts of keys."""
    text = _option_path(option.group, option.name, places).read_text(errors="replace")
    groups = re.findall(r"^ *- override /([a-z]+):", text, re.M)
    return {*groups, *(key.name.partition(".")[0] for key in option.keys)}


def _option_path(group: str, name: str, places: Sequence[Path]) -> Path:
    return next(file for place in places if (file := place / group / f"{name}.yaml").is_file())


def nested_groups(group: str, places: Sequence[Path]) -> list[str]:
    """The groups inside a group, as `budget/rule`."""
    folders = {path.name for place in places for path in (place / group).glob("*/") if any(path.glob("*.yaml"))}
    return [name for folder in sorted(folders) if options_with_nested(name := f"{group}/{folder}", places)]


def options_with_nested(nested: str, places: Sequence[Path]) -> dict[str, str]:
    """The options of a group that have a group inside it, as those of `budget` that take a `budget/rule`.

    Returns:
        The option of the inner group that each chooses by default.
    """
    group, _, name = nested.rpartition("/")
    files = {path.stem: path.read_text(errors="replace") for place in places for path in (place / group).glob("*.yaml")}
    found = {option: re.search(rf"^  - {re.escape(name)}: *([\w-]+)", files[option], re.M) for option in sorted(files)}
    return {option: default[1] for option, default in found.items() if default}


def read_option(group: str, name: str, places: Sequence[Path]) -> Option:
    """An option, as the first file of that name has it; its keys begin with the group."""
    text = _option_path(group, name, places).read_text(errors="replace")
    about = _top_comment(text)
    prefix = (
        ""
        if "# @package _global_" in text
        else f"{group}.{name}."
        if group == "aggregator"
        else f"{group.replace('/', '.')}."
    )
    try:
        root = yaml.compose(text)
    except yaml.YAMLError:  # composing it says what is wrong
        return Option(group, name, about[0] if about else "", ())
    target = next((v.value for k, v in root.value if k.value == "_target_"), "") if root is not None else ""
    kinds = _argument_kinds(target)
    keys = tuple(
        Key(prefix + key.name, key.default, key.comment, kinds.get(key.name, ""))
        for key in _keys(root, text, nested=prefix == "")
    )
    return Option(group, name, about[0] if about else "", keys)


@cache
def read_command(command: str) -> Command:
    """A command by the name of its file, as in `train_reasoner`."""
    from latent_tts.config.schemas import SCHEMAS  # imports OmegaConf, which lists of options do without

    text = (Path(conf_dir()) / f"{command}.yaml").read_text()
    root = yaml.compose(text)
    defaults = next(value for key, value in root.value if key.value == "defaults")
    bases = [read_command(entry.value) for entry in defaults.value if entry.value in list(SCHEMAS)]  # it extends them
    groups = {group: list(chosen) for base in bases for group, chosen in base.groups.items()}
    lists = {group for base in bases for group in base.lists}
    for entry in defaults.value:
        for key, value in entry.value if isinstance(entry, yaml.MappingNode) else ():
            group = key.value.removeprefix("optional ").removeprefix("override ")
            if isinstance(value, yaml.SequenceNode):
                lists.add(group)
            if not group.startswith("hydra/"):
                chosen = [each.value for each in value.value] if isinstance(value, yaml.SequenceNode) else [value.value]
                groups[group] = [name for name in chosen if name != "null"]
    kinds = _schema_kinds(SCHEMAS[command])
    for key, value in root.value:  # what describes an object, as `optimization` does
        target = next((v.value for k, v in value.value if k.value == "_target_"), "") if _is_block(value) else ""
        kinds |= {f"{key.value}.{name}": kind for name, kind in _argument_kinds(target).items()}
    keys = [Key(key.name, key.default, key.comment, kinds.get(key.name, "")) for key in _keys(root, text, nested=True)]
    keys += [key for base in bases for key in base.keys]
    return Command(tuple(_top_comment(text)[1:]), tuple(keys), groups, frozenset(lists))


def chosen_options(command: str, overrides: Iterable[str], places: Sequence[Path]) -> dict[str, list[str]]:
    """The options that a command has under some overrides, by group; those that do not exist are left out."""
    chosen = dict(read_command(command).groups)
    for override in overrides:
        group, _, value = override.lstrip("+").partition("=")
        if group in chosen:
            chosen[group] = [name.strip() for name in value.strip("[]").split(",")]
    if chosen.get("recipe") == ["${model}"]:
        chosen["recipe"] = [chosen.get("model", [""])[-1].removeprefix("demo_")]
    return {group: [name for name in names if name in option_names(group, places)] for group, names in chosen.items()}


def keys_of(command: str, overrides: Iterable[str], places: Sequence[Path]) -> list[Key]:
    """The keys of a command and of the options that it has under some overrides."""
    chosen = chosen_options(command, overrides, places).items()
    options = [read_option(group, option, places) for group, names in chosen for option in names]
    return [*read_command(command).keys, *(key for option in options for key in option.keys)]


def shown_default(default: str) -> str:
    """A default as people read it: an interpolation by what it refers to."""
    found = re.fullmatch(r"\$\{(?:oc\.(env|select):)?([^,}]+)(?:,(.*))?\}", default)
    if not found:
        return {"???": "required", '""': "empty", "''": "empty"}.get(default, default.strip("\"'"))
    kind, name, fallback = found.groups()
    return f"{'$' if kind == 'env' else ''}{name}" + (f", else {fallback}" if fallback else "")


def _top_comment(text: str) -> list[str]:
    """The comment that a file begins with, a text per line."""
    lines = takewhile(lambda line: line.startswith("#"), text.splitlines())
    return [line.removeprefix("#").removeprefix(" ") for line in lines if "@package" not in line]


def _keys(node: yaml.Node | None, text: str, *, nested: bool, prefix: str = "") -> Iterator[Key]:
    """The keys of a mapping with their comments; a mapping in it is one key, or its keys each (`nested`)."""
    lines = text.splitlines()
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        name = prefix + str(key.value)
        if key.value == "_target_" or name in ("defaults", "hydra"):
            continue
        block = _is_block(value)
        end = key.end_mark if block else value.end_mark
        comment = lines[end.line][end.column :].lstrip(": ") if end.line < len(lines) else ""
        comment = comment.removeprefix("#").strip() if comment.startswith("#") else ""
        if block and nested:
            yield from _keys(value, text, nested=True, prefix=f"{name}.")
        elif not block or comment:
            default = "{...}" if block else text[value.start_mark.index : value.end_mark.index]
            yield Key(name, default or "null", comment)


def _is_block(node: yaml.Node) -> bool:
    """Whether a node is a mapping that is written over several lines."""
    return isinstance(node, yaml.MappingNode) and not node.flow_style


@cache
def _argument_kinds(target: str) -> Mapping[str, str]:
    """The types of what an option's object takes, in words, by key; nothing for what cannot be found.

    The source is parsed and not imported: some options import torch.
    """
    module, _, name = target.rpartition(".")
    try:
        spec = find_spec(module) if module else None
        tree = ast.parse(Path(str(spec.origin)).read_text()) if spec else ast.Module([], [])
    except (ImportError, AttributeError, OSError, SyntaxError, ValueError):
        return {}
    kinds: dict[str, str] = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and name in {alias.asname or alias.name for alias in node.names}:
            return _argument_kinds(f"{node.module}.{name}")
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return {each.arg: _kind(each.annotation) for each in (*node.args.args, *node.args.kwonlyargs)}
        if isinstance(node, ast.ClassDef) and node.name == name:
            for base in node.bases:
                kinds |= _argument_kinds(f"{module}.{ast.unparse(base)}") if isinstance(base, ast.Name) else {}
            for field in node.body:
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                    kinds[field.target.id] = _kind(field.annotation)
                if isinstance(field, ast.FunctionDef) and field.name == "__init__":
                    kinds |= {each.arg: _kind(each.annotation) for each in (*field.args.args, *field.args.kwonlyargs)}
    return kinds


def _schema_kinds(schema: Any, prefix: str = "") -> dict[str, str]:
    """The types of a command's own keys, in words, by key."""
    kinds = {}
    for field in fields(schema):
        nested = vars(sys.modules[schema.__module__]).get(str(field.type))
        if is_dataclass(nested):
            kinds |= _schema_kinds(nested, f"{prefix}{field.name}.")
        else:
            kinds[prefix + field.name] = _kind(ast.parse(str(field.type), mode="eval").body)
    return kinds


def _kind(annotation: ast.expr | None) -> str:
    """An annotation in words: `integer or null`."""
    if annotation is None:
        return ""
    parts = [WORDS.get(part.partition("[")[0], "") for part in ast.unparse(annotation).split(" | ")]
    return " or ".join(dict.fromkeys(part for part in parts if part))
