"""What a user probably meant: keys, options and quotes that an argument lacks."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from latent_tts.config.reference import (
    chosen_options,
    conf_dir,
    conf_dirs,
    keys_of,
    nested_groups,
    option_names,
    options_with_nested,
    read_command,
    read_option,
)
from latent_tts.errors import bad_value, closest, require

PLACES = (Path(conf_dir()),)
ASKING = ("ask", "trace")  # commands that take a question


OUTPUT = ("output", "hydra.run.dir")
OTHER_NAMES = {  # what other programs call a key: the first of these that a command has
    "batch_size": ("engine.rows",), "max_gen_toks": ("max_answer_tokens",), "max_new_tokens": ("max_answer_tokens",),
    "max_tokens": ("max_answer_tokens",), "num_rollouts": ("n",), "num_samples": ("n",), "output": OUTPUT,
    "output_dir": OUTPUT, "output_path": OUTPUT, "pretrained": ("model.checkpoint",), "tasks": ("task",),
}  # fmt: skip


def is_override(command: str, argument: str) -> bool:
    """Whether an argument with `=` sets a key of a command: `runs/epoch=6.ckpt` and `x=3+4, what is x?` set none."""
    key, _, value = argument.partition("=")
    if argument.startswith(("+", "~", "hydra")):
        return True
    if command in ASKING and _is_question(command, key, value):
        return False
    return " " not in key and ("/" not in key or (Path(conf_dir()) / key).is_dir())


def _is_question(command: str, key: str, value: str) -> bool:
    """Whether `KEY=VALUE` is rather a question: `2+2=?`, or several words where no key takes them."""
    if not re.fullmatch(r"[A-Za-z_][\w./@-]*", key):
        return True
    known = read_command(command)
    kinds = {each.name: each.kind for each in known.keys}
    takes_words = "text" in kinds.get(key, "") or ("." in key and key.partition(".")[0] in known.groups)
    return not takes_words and not value.startswith(("[", "{", "'", '"')) and bool(re.search(r"\s|\?$", value))


def key_of_flag(command: str, flag: str, value: str | None) -> str | None:
    """The override that a flag of other programs stands for: `task.limit=5` for `--limit 5`."""
    name = flag.lstrip("-").replace("-", "_").split("=")[0]
    value = flag.partition("=")[2] or value or "..."
    found = [key for key in _keys(command) if name in (key, key.rpartition(".")[2])]
    found = [name] if name in _groups(command) else found or _known_elsewhere(command, name)
    if not found:
        close = closest(name, [key.rpartition(".")[2] for key in _keys(command)], cutoff=0.75)
        found = [key for key in _keys(command) if key.rpartition(".")[2] == close]
    return f"{min(found, key=lambda key: key.count('.'))}={value}" if found else None


def option_of(command: str, word: str) -> str | None:
    """What an argument without a key may mean: `n=4` for `n = 4`, `sampler=gaussian` for `gausian`."""
    key, equals, value = (part.strip() for part in word.partition("="))
    if word.startswith("~"):
        return None
    if equals:
        return f"{key}={value}" if key in (*_keys(command), *_groups(command)) else None
    if word in _groups(command):
        return f"{word}=NAME"
    groups = {option: group for group in _groups(command) for option in _options(group)}
    close = closest(word, groups)
    return f"{groups[close]}={close}" if close else None


def nested_key(command: str, name: str) -> str | None:
    """The key that ends with a name, `task.limit` for `limit`, or that other programs call so."""
    keys = _keys(command) if (PLACES[0] / f"{command}.yaml").is_file() else ()
    found = [key for key in keys if key.endswith(f".{name}")] or (_known_elsewhere(command, name) if keys else [])
    return min(found, key=lambda key: key.count("."), default=None)


def _known_elsewhere(command: str, name: str) -> list[str]:
    """The key, in a list, that other programs call by this name; none where the command lacks it."""
    writes_run = re.search(r"^  - (hydra_folders|run)$", (PLACES[0] / f"{command}.yaml").read_text(), re.M)
    known = {*_keys(command), *_groups(command), *(["hydra.run.dir"] if writes_run else [])}
    return [key for key in OTHER_NAMES.get(name, ()) if key in known][:1]


def options_with(key: str) -> list[str]:
    """The options of a key's group that have the key: `task=jsonl` for `task.path`."""
    return _owners(key.partition(".")[0]).get(key, [])


def key_of_option(command: str, name: str) -> tuple[str, list[str]] | None:
    """The first key that ends with a name, and the options that have it: `sampler.sigma` of `sampler=gaussian`."""
    for group in _groups(command) if (PLACES[0] / f"{command}.yaml").is_file() else ():
        for key, options in _owners(group).items():
            if key.endswith(f".{name}"):
                return key, options
    return None


def _owners(group: str) -> dict[str, list[str]]:
    """The keys of a group and of those inside it, each with the options that have it."""
    owners: dict[str, list[str]] = {}
    for each in [group, *nested_groups(group)]:
        for option in _options(each):
            for key in read_option(each, option, PLACES).keys:
                owners.setdefault(key.name, []).append(f"{each}={option}")
    return owners


def quoted(text: str) -> str:
    """A value in Hydra's quotes."""
    text = re.sub(r"(\\*)\$\{", lambda found: 2 * found[1] + r"\${", text)
    text = re.sub(r"(\\*)'", lambda found: 2 * found[1] + r"\'", text)
    end = re.search(r"\\*$", text)
    return f"'{text}{end[0] if end else ''}'"


def quoted_override(override: str) -> str | None:
    """The override as it has to be typed in a shell, its value in quotes; None if quotes do not help."""
    key, equals, value = override.partition("=")
    fixed = f"{key}={quoted(value)}"
    try:
        OverridesParser.create().parse_override(fixed)
    except HydraException:
        return None
    plain = not re.search(r'[\\"$`!]', fixed)
    return (f'"{fixed}"' if plain else shlex.quote(fixed)) if equals else None


def check_choices(command: str, arguments: Sequence[str]) -> None:
    """Check that no argument chooses several options where one is allowed, or one that the others have no place for.

    Raises:
        UsageError: one does.
    """
    known, places = read_command(command), conf_dirs()
    nested = {name: group for group in known.groups for name in nested_groups(group)}
    for argument in arguments:
        key, _, text = argument.lstrip("+").partition("=")
        if key not in known.groups and key not in nested:
            continue
        names = ", ".join(option_names(key, places))
        for value in _values(argument):
            several = isinstance(value, list)
            if key in known.lists:
                require(
                    key,
                    text,
                    not several or all(isinstance(each, str | int | float) for each in value),
                    f"must be a list of {names}",
                )
            elif several or (isinstance(value, dict) and key in nested):
                found = [str(each) for each in value if str(each) in option_names(key, places)]
                sweep = f"; -m {key}={','.join(found)} runs a job for each" if len(found) > 1 else ""
                raise bad_value(key, text, f"must be one of {names}{sweep}")
        if key in nested:
            group, able = nested[key], options_with_nested(key, places)
            chosen = chosen_options(command, arguments, places)[group]
            if chosen and not set(chosen) & set(able):
                choose = " or ".join(f"{group}={option}" for option in able)
                raise bad_value(key, text, f"{group}={chosen[0]} has no {key.rpartition('/')[2]}; choose {choose}")


def takes_list(command: str, key: str) -> bool:
    """Whether a key can have a list: no group of which one option is chosen, and no key of another kind."""
    known = read_command(command)
    kinds = {each.name: each.kind for each in known.keys}
    return key in known.lists or (key not in known.groups and "list" in kinds.get(key, "list"))


def _values(argument: str) -> Iterator[Any]:
    """The values of an override, several in a sweep; none where Hydra will report the error."""
    try:
        override = OverridesParser.create().parse_override(argument)
        yield from override.sweep_iterator() if override.is_sweep_override() else [override.value()]
    except (HydraException, ValueError):
        return


def no_option(arguments: list[str]) -> str | None:
    """What to say of an argument that gives a group a value that is no option's name, as `schedule=nan` does."""
    for argument in arguments:
        key, _, value = argument.lstrip("+").partition("=")
        if not key and value:
            return f"{argument}: not of the form key=value"
        if key and _options(key) and value not in _options(key):
            return f"{key}={value}: no such option; one of {', '.join(_options(key))}"
    return None


def _groups(command: str) -> list[str]:
    return [group for group in read_command(command).groups if _options(group)]


def _options(group: str) -> list[str]:
    return option_names(group, PLACES)


@cache
def _keys(command: str) -> tuple[str, ...]:
    """The keys of a command and of the options that it chooses by default."""
    return tuple(dict.fromkeys(key.name for key in keys_of(command, (), PLACES)))
