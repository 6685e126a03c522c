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
    option_keys,
    option_names,
    options_with_nested,
    read_command,
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


def is_path(text: str) -> bool:
    """Whether a text names a file or folder."""
    try:
        return Path(text).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # too long, no home, a null character
        return False


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
    ends = {key.rpartition(".")[2]: key for key in reversed(_keys(command))}
    key = key_called(command, name) or ends.get(closest(name, ends, cutoff=0.75) or "")
    return f"{key}={flag.partition('=')[2] or value or '...'}" if key else None


def option_of(command: str, word: str) -> str | None:
    """What an argument without a key may mean: `n=4` for `n = 4`, `sampler=gaussian` for `gausian`."""
    key, equals, value = (part.strip() for part in word.partition("="))
    groups = [group for group in read_command(command).groups if option_names(group, PLACES)]
    if equals or word.startswith("~"):
        return f"{key}={value}" if key in (*_keys(command), *groups) else None
    if word in groups:
        return f"{word}=NAME"
    options = {option: group for group in groups for option in option_names(group, PLACES)}
    close = closest(word, options)
    return f"{options[close]}={close}" if close else None


def key_called(command: str, name: str) -> str | None:
    """The key or group of a name: its own, one that ends with it (`task.limit`), or what other programs call so."""
    writes_run = re.search(r"^  - (hydra_folders|run)$", (PLACES[0] / f"{command}.yaml").read_text(), re.M)
    known = [*read_command(command).groups, *_keys(command), *["hydra.run.dir"] * bool(writes_run)]
    if name in known:
        return name
    ending = [key for key in known if key.endswith(f".{name}")]
    found = ending or [key for key in OTHER_NAMES.get(name, ()) if key in known][:1]
    return min(found, key=lambda key: key.count("."), default=None)


def options_with(command: str, name: str) -> dict[str, list[str]]:
    """The keys of a command's options that are called so or end so, with the options that have each.

    As in `{"sampler.sigma": ["sampler=gaussian"]}` of `sigma`, also where another sampler is chosen.
    """
    found: dict[str, list[str]] = {}
    for key, option in option_keys(read_command(command).groups, PLACES):
        if key.is_called(name):
            found.setdefault(key.name, []).append(option)
    return found


def escaped(text: str) -> str:
    """A text in which OmegaConf finds no interpolation."""
    return re.sub(r"(\\*)\$\{", lambda found: 2 * found[1] + r"\${", text)


def quoted(text: str) -> str:
    """A value in Hydra's quotes."""
    text = re.sub(r"(\\*)'", lambda found: 2 * found[1] + r"\'", escaped(text))
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
        options, many = option_names(key, places), key in known.lists
        for value in _values(argument):
            is_names = many and isinstance(value, list) and all(isinstance(each, str) for each in value)
            is_settings = not many and isinstance(value, dict) and key not in nested
            found = [each for each in value if each in options] if isinstance(value, list) else []
            sweep = f"; -m {key}={','.join(found)} runs a job for each" if len(found) > 1 else ""
            require(
                key,
                text,
                isinstance(value, str) or is_names or is_settings,
                f"must be {'a list' if many else 'one'} of {', '.join(options)}{sweep}",
            )
        if key in nested:
            group, able = nested[key], options_with_nested(key, places)
            chosen = chosen_options(command, arguments, places)[group]
            if chosen and not set(chosen) & set(able):
                choose = " or ".join(f"{group}={option}" for option in able)
                raise bad_value(key, text, f"{group}={chosen[0]} has no {key.rpartition('/')[2]}; choose {choose}")


def _values(argument: str) -> Iterator[Any]:
    """The values of an override, several in a sweep; none where Hydra will report the error."""
    try:
        override = OverridesParser.create().parse_override(argument)
        yield from override.sweep_iterator() if override.is_sweep_override() else [override.value()]
    except (HydraException, ValueError):
        return


@cache
def _keys(command: str) -> tuple[str, ...]:
    """The keys of a command and of the options that it chooses by default."""
    return tuple(dict.fromkeys(key.name for key in keys_of(command, (), PLACES)))
