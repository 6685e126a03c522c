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
from dataclasses import dataclass, make_dataclass
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
# types of commands' keys whose default in the file does not show them; beside a default of null it is one of both
TYPES = {
    "n": "int", "a_n": "int", "b_n": "int", "latents": "int", "engine.rows": "int", "max_answer_tokens": "int",
    "guesses": "list[str]", "chunks": "list[int]", "tolerances": "list[float]", "scorer.range": "list[float]",
    "beside": "str | None",
}  # fmt: skip
TARGET = "_target_"
NO_KEYS = ("defaults", "hydra", TARGET)
NO_NODES = {"local", "experiment"}  # groups whose options set keys of other groups
YAML = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


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

    def is_called(self, name: str) -> bool:
        """Whether a name is this key's or the end of it, as `sigma`."""
        return f".{self.name}".endswith(f".{name}")


@dataclass(frozen=True)
class Option:
    """An option of a group.

    Attributes:
        name: as in `group=name`.
        about: its file's first comment; may be empty.
        keys: what can be set in it.
    """

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
        schema: a dataclass with the types of its own keys, by which OmegaConf checks its config; options check theirs.
    """

    examples: tuple[str, ...]
    keys: tuple[Key, ...]
    groups: Mapping[str, list[str]]
    lists: frozenset[str]
    schema: type


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
    return sorted(path.with_suffix("").as_posix() for path in found if f"{group}/{path.parts[0]}" not in GROUPS)


def options_of(command: str, group: str, places: Sequence[Path]) -> list[str]:
    """The names of the options of a group that a command can take: experiments are made for some commands."""
    names = option_names(group, places)
    if group != "experiment":
        return names
    own = read_command(command)
    known = {*own.groups, *(key.name.partition(".")[0] for key in own.keys)}
    return [name for name in names if known >= _settings_of(name, places)]


def _settings_of(experiment: str, places: Sequence[Path]) -> set[str]:
    """What an experiment sets: groups, and the first parts of keys."""
    groups = re.findall(r"^ *- override /([a-z]+):", _option_text("experiment", experiment, places), re.M)
    keys = read_option("experiment", experiment, places).keys
    return {*groups, *(key.name.partition(".")[0] for key in keys)}


def _option_text(group: str, name: str, places: Sequence[Path]) -> str:
    """The first file of that name."""
    files = (place / group / f"{name}.yaml" for place in places)
    return next(file for file in files if file.is_file()).read_text(errors="replace")


def nested_groups(group: str) -> list[str]:
    """The groups inside a group, as `budget/rule`."""
    return [name for name in GROUPS if name.startswith(f"{group}/")]


def options_with_nested(nested: str, places: Sequence[Path]) -> dict[str, str]:
    """The options of a group that have a group inside it, as those of `budget` that take a `budget/rule`.

    Returns:
        The option of the inner group that each chooses by default.
    """
    group, _, name = nested.rpartition("/")
    texts = {option: _option_text(group, option, places) for option in option_names(group, places)}
    found = {option: re.search(rf"^  - {name}: *([\w-]+)", text, re.M) for option, text in texts.items()}
    return {option: default[1] for option, default in found.items() if default}


def read_option(group: str, name: str, places: Sequence[Path]) -> Option:
    """An option, as the first file of that name has it; its keys begin with the group."""
    text = _option_text(group, name, places)
    is_global = "# @package _global_" in text
    prefix = "" if is_global else f"{group}.{name}." if group == "aggregator" else f"{group.replace('/', '.')}."
    keys: tuple[Key, ...] = ()
    with suppress(yaml.YAMLError):  # composing it says what is wrong
        keys = tuple(_keys(yaml.compose(text, YAML), text, prefix, nested=is_global))
    return Option(name, next(iter(_top_comment(text)), ""), keys)


def option_keys(groups: Iterable[str], places: Sequence[Path]) -> Iterator[tuple[Key, str]]:
    """The keys of all options of some groups and of the groups in them, each with its option, as `sampler=gaussian`."""
    inside = [nested for group in groups for nested in (group, *nested_groups(group)) if group != "experiment"]
    for group in dict.fromkeys(inside):  # an experiment sets keys of others
        for option in option_names(group, places):
            yield from ((key, f"{group}={option}") for key in read_option(group, option, places).keys)


def command_files() -> list[str]:
    """The names of the commands' files, as in `train_reasoner`."""
    return [path.stem for path in Path(conf_dir()).glob("*.yaml") if not path.stem.startswith("hydra_")]


@cache
def read_command(command: str) -> Command:
    """A command by the name of its file."""
    text = (Path(conf_dir()) / f"{command}.yaml").read_text()
    root = yaml.compose(text, YAML)
    defaults = next(value for key, value in root.value if key.value == "defaults").value
    base = next((entry.value for entry in defaults if entry.value in command_files()), None)
    extended = read_command(base) if base else Command((), (), {}, frozenset(), object)
    groups, lists = dict(extended.groups), set(extended.lists)
    for entry in defaults:
        for key, value in entry.value if isinstance(entry, yaml.MappingNode) else ():
            group = key.value.removeprefix("optional ").removeprefix("override ")
            if isinstance(value, yaml.SequenceNode):
                lists.add(group)
            if not group.startswith("hydra/"):
                chosen = value.value if isinstance(value, yaml.SequenceNode) else [value]
                groups[group] = [each.value for each in chosen if each.value != "null"]
    types: dict[str, Any] = {group: Any for group in groups if group not in NO_NODES}
    if "engine" in types:  # which makes no object
        settings = yaml.compose(_option_text("engine", "default", [Path(conf_dir())]), YAML)
        types["engine"] = _schema(settings, "engine.")
    keys = (*_keys(root, text, nested=True), *extended.keys)
    schema = _schema(root, "", types, extended.schema)
    return Command(tuple(_top_comment(text)[1:]), keys, groups, frozenset(lists), schema)


def _schema(node: yaml.Node, prefix: str, groups: Mapping[str, Any] | None = None, base: type = object) -> type:
    """A dataclass with the types of the keys of a mapping.

    Args:
        node: the mapping.
        prefix: of its keys' full names.
        groups: types of keys of which those in the mapping say nothing.
        base: the class to extend.
    """
    groups = groups or {}
    found: dict[str, Any] = {}
    for key, value in node.value:
        if key.value in groups or key.value in NO_KEYS:
            continue
        if not isinstance(value, yaml.MappingNode):
            found[key.value] = _annotation(prefix + key.value, value)
        else:  # the object that it describes checks it, if it describes one
            found[key.value] = Any if _target(value) else _schema(value, f"{prefix}{key.value}.")
    # with a default of OmegaConf's, since the standard library's is another object in other processes
    kinds = [(key, kind, "???") for key, kind in (found | {**groups}).items()]
    return make_dataclass("Keys", kinds, bases=(base,))


def _annotation(name: str, value: yaml.Node) -> str:
    """The type of a key, as `TYPES` has it or else as its default shows it."""
    shown = value.tag.rpartition(":")[2]
    if shown == "null":
        return f"{TYPES.get(name, 'str')} | None"
    return TYPES.get(name, "list[str]" if shown == "seq" else shown)


def chosen_options(command: str, overrides: Iterable[str], places: Sequence[Path]) -> dict[str, list[str]]:
    """The options that a command has under some overrides, by group; those that do not exist are left out."""
    parts = (override.lstrip("+").partition("=") for override in overrides)
    given = {key: [name.strip() for name in value.strip("[]").split(",")] for key, _, value in parts}
    groups = read_command(command).groups
    chosen = {group: given.get(group, names) for group, names in groups.items()}
    if chosen.get("recipe") == ["${model}"]:
        chosen["recipe"] = [chosen["model"][-1].removeprefix("demo_")]
    for nested in (name for group in groups for name in nested_groups(group)):
        defaults = options_with_nested(nested, places)
        if inner := [defaults[option] for option in chosen[nested.rpartition("/")[0]] if option in defaults]:
            chosen[nested] = given.get(nested, inner)
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


def _keys(node: yaml.Node | None, text: str, prefix: str = "", *, nested: bool) -> Iterator[Key]:
    """The keys of a mapping with their comments; a mapping in it is one key, or its keys each (`nested`)."""
    lines, kinds = text.splitlines(), _argument_kinds(_target(node))
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        name = prefix + key.value
        if key.value in NO_KEYS:
            continue
        block = isinstance(value, yaml.MappingNode) and not value.flow_style  # written over several lines
        end = key.end_mark if block else value.end_mark
        comment = lines[end.line][end.column :].lstrip(": ") if end.line < len(lines) else ""
        comment = comment.removeprefix("#").strip() if comment.startswith("#") else ""
        if block and nested:
            yield from _keys(value, text, f"{name}.", nested=True)
        elif not block or comment:
            default = "{...}" if block else text[value.start_mark.index : value.end_mark.index]
            yield Key(name, default or "null", comment, kinds.get(key.value, _words(_annotation(name, value))))


def _target(node: yaml.Node | None) -> str:
    """The object that a mapping describes; empty for none."""
    pairs = node.value if isinstance(node, yaml.MappingNode) else ()
    return next((value.value for key, value in pairs if key.value == TARGET), "")


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
            return _parameter_kinds(node)
        if isinstance(node, ast.ClassDef) and node.name == name:
            for base in node.bases:
                kinds |= _argument_kinds(f"{module}.{ast.unparse(base)}") if isinstance(base, ast.Name) else {}
            for field in node.body:
                if isinstance(field, ast.AnnAssign):
                    kinds[ast.unparse(field.target)] = _words(ast.unparse(field.annotation))
                if isinstance(field, ast.FunctionDef) and field.name == "__init__":
                    kinds |= _parameter_kinds(field)
    return kinds


def _parameter_kinds(function: ast.FunctionDef) -> dict[str, str]:
    parameters = (*function.args.args, *function.args.kwonlyargs)
    return {each.arg: _words(ast.unparse(each.annotation)) for each in parameters if each.annotation}


def _words(annotation: str) -> str:
    """An annotation in words: `integer or null`."""
    parts = [WORDS.get(part.partition("[")[0], "") for part in annotation.split(" | ")]
    return " or ".join(dict.fromkeys(part for part in parts if part))
