"""What a user probably meant: keys, options and quotes that an argument lacks."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf

from latent_tts.config.build import defaults_of
from latent_tts.config.reference import conf_dir
from latent_tts.config.schemas import SCHEMAS


def closest(word: str, known: list[str]) -> str | None:
    """The most similar of some words, if one is similar."""
    return next(iter(get_close_matches(word, known, n=1, cutoff=0.6)), None)


def is_key(command: str, text: str) -> bool:
    """Whether a command may have a key: `runs/epoch` of `runs/epoch=6.ckpt` is none."""
    if text.startswith(("+", "~", "hydra")):
        return True
    return " " not in text and ("/" not in text or (Path(conf_dir()) / text).is_dir())


def key_of_flag(command: str, flag: str, value: str | None) -> str | None:
    """The override that a flag of other programs stands for: `task.limit=5` for `--limit 5`."""
    name = flag.lstrip("-").replace("-", "_").split("=")[0]
    value = flag.partition("=")[2] or value or "..."
    found = [key for key in _keys(command) if name in (key, key.rpartition(".")[2])]
    if not found:
        close = closest(name, [key.rpartition(".")[2] for key in _keys(command)])
        found = [key for key in _keys(command) if key.rpartition(".")[2] == close]
    return f"{min(found, key=lambda key: key.count('.'))}={value}" if found else None


def option_of(command: str, word: str) -> str | None:
    """What an argument without a key may mean: `n=4` for `n = 4`, `sampler=gaussian` for `gausian`."""
    key, equals, value = (part.strip() for part in word.partition("="))
    if equals:
        return f"{key}={value}" if key in (*_keys(command), *_groups(command)) else None
    if word in _groups(command):
        return f"{word}=NAME"
    groups = {option: group for group in _groups(command) for option in _options(group)}
    close = closest(word, list(groups))
    return f"{groups[close]}={close}" if close else None


def nested_key(command: str, name: str) -> str | None:
    """The key that ends with a name: `task.limit` for `limit`."""
    keys = _keys(command) if command in SCHEMAS else ()
    return min((key for key in keys if key.endswith(f".{name}")), key=lambda key: key.count("."), default=None)


def options_with(key: str) -> list[str]:
    """The options of a key's group that have the key: `task=jsonl` for `task.path`."""
    group, _, name = key.partition(".")
    return [f"{group}={option}" for option in _options(group) if name in _flat(_read(f"{group}/{option}"))]


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


def no_option(arguments: list[str]) -> str | None:
    """What to say of an argument that gives a group a value that is no option's name, as `schedule=nan` does."""
    for argument in arguments:
        key, _, value = argument.lstrip("+").partition("=")
        if not key and value:
            return f"{argument}: not of the form key=value"
        if key and (Path(conf_dir()) / key).is_dir() and value not in _options(key):
            return f"{key}={value}: no such option; one of {', '.join(_options(key))}"
    return None


def _groups(command: str) -> list[str]:
    entries = [entry for entry in defaults_of(command) for entry in entry]
    return [name for entry in entries if (Path(conf_dir()) / (name := str(entry).removeprefix("optional "))).is_dir()]


def _options(group: str) -> list[str]:
    return sorted(path.stem for path in (Path(conf_dir()) / group).glob("*.yaml"))


@cache
def _keys(command: str) -> tuple[str, ...]:
    """The keys of a command and of the options that it chooses by default."""
    keys = [*(f for f in SCHEMAS[command].__dataclass_fields__), *_flat(_read(command))]
    for entry in defaults_of(command):
        for group, option in entry.items():
            if isinstance(option, str) and option in _options(str(group)):
                keys += [f"{group}.{key}" for key in _flat(_read(f"{group}/{option}"))]
    return tuple(key for key in dict.fromkeys(keys) if not key.startswith(("hydra", "defaults")))


@cache
def _read(name: str) -> Mapping[str, Any]:
    content: Any = OmegaConf.to_container(OmegaConf.load(Path(conf_dir()) / f"{name}.yaml"), resolve=False)
    return content


def _flat(content: Mapping[str, Any]) -> Iterator[str]:
    for key, value in content.items():
        if key != "_target_":
            yield key
        if isinstance(value, Mapping):
            yield from (f"{key}.{part}" for part in _flat(value))
