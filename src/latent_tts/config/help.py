"""The commands about commands: `ltts help`, `ltts list`, `ltts completion`. They need neither Hydra nor torch.

Texts are as wide as the terminal.
"""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from itertools import groupby, pairwise
from pathlib import Path

from latent_tts.config.completion import CANDIDATES, FOLDER_FLAGS, SCRIPTS, candidates
from latent_tts.config.reference import (
    GROUPS,
    Key,
    chosen_options,
    conf_dirs,
    nested_groups,
    option_keys,
    option_names,
    options_of,
    read_command,
    read_option,
    shown_default,
)
from latent_tts.errors import UsageError, closest, did_you_mean, printable

LEFT = 34  # largest width of the left column
PLURALS = {
    "models": "model", "tasks": "task", "samplers": "sampler", "schedules": "schedule", "searches": "search",
    "budgets": "budget", "rules": "budget/rule", "scorers": "scorer", "aggregators": "aggregator", "recipes": "recipe",
    "engines": "engine", "executors": "executor", "experiments": "experiment",
}  # fmt: skip
FLAGS_TEXT = (
    ("-m, --multirun", "run a job per combination of comma-separated values: seed=0,1,2 -m"),
    ("--cfg job", "print the config that the command would run with, and stop"),
    ("--config-dir FOLDER", "also find options in FOLDER/GROUP/OPTION.yaml"),
    ("-h, --help", "this text; with GROUP=OPTION it lists the keys of that option"),
    ("--hydra-help", "flags of Hydra, which reads the command line"),
)

Commands = Mapping[str, tuple[str, tuple[str, ...]]]
# name: (what it does, names of its positional arguments), as in `cli.COMMANDS`
ABOUT_COMMANDS: Commands = {
    "list": ("list models, tasks, samplers, ... (what each option is), or runs", ("what*",)),
    "help": ("show the keys of a command, the options of a group with their keys, or a key", ("what?",)),
    "completion": ("print the completion script of a shell, bash or zsh", ("shell",)),
}


def usage(commands: Commands) -> str:
    """The list of commands."""
    width = terminal_width()
    rows = [(name, what) for name, (what, _) in {**commands, **ABOUT_COMMANDS}.items()]
    notes = (
        "`ltts COMMAND --help` (or `ltts help COMMAND`) lists the keys of a command; -m runs a job per combination of "
        'comma-separated values; after `eval "$(ltts completion bash)"` Tab completes commands, keys and options.'
    )
    return f"usage: ltts COMMAND [KEY=VALUE ...] [-m]\n\n{definitions(rows, width)}\n\n{textwrap.fill(notes, width)}"


def terminal_width() -> int:
    """Columns of the terminal; 100 where there is none."""
    return shutil.get_terminal_size((100, 24)).columns


def run(
    name: str,
    words: Sequence[str],
    commands: Commands,
    flags: Mapping[str, Sequence[str]],
    flag_choices: Mapping[str, Sequence[str]],
) -> None:
    """Print what is asked for: about commands, or the help of a command with keys.

    Args:
        name: of the command, or a flag in its place.
        words: what follows it.
        commands: those with keys.
        flags: of each of those.
        flag_choices: the words that can follow a flag.

    Raises:
        UsageError: a word is unknown.
    """
    asked = words if name == "help" else [name, *words]
    if name == "--version":
        print(version("latent-tts"))
    elif name == "completion":
        print(_completion(words, commands, flags, flag_choices))
    elif name == "list" and words[:1] == ["runs"]:
        from latent_tts.results.report import print_runs

        print_runs([Path(word).expanduser() for word in words[1:]])
    elif name == "list":
        print(options_text(words, conf_dirs(), terminal_width()))
    elif not asked or asked[0] in ("-h", "--help"):
        print(usage(commands))
    elif asked[0] in commands:
        print(command_help(asked[0], asked[1:], commands))
    elif name != "help":
        known = [*commands, *ABOUT_COMMANDS]
        raise UsageError(
            f"unknown command {name!r}; {did_you_mean(closest(name, known))}one of {', '.join(known)}\n"
            "run `ltts --help` for a description of each"
        )
    elif group := PLURALS.get(asked[0]) or next((each for each in GROUPS if f"/{each}".endswith(f"/{asked[0]}")), None):
        title, width = f"{group}: {GROUPS.get(group, '')}".rstrip(": "), terminal_width()
        print(_join([title, *_described_options(group, conf_dirs(), width, indent=2)], width))
    else:
        print(key_help(asked[0], commands, conf_dirs(), terminal_width()))


def _completion(
    words: Sequence[str],
    commands: Commands,
    flags: Mapping[str, Sequence[str]],
    flag_choices: Mapping[str, Sequence[str]],
) -> str:
    if words[:1] == [CANDIDATES]:
        follow = {"list": [*PLURALS, "runs"], "help": [*commands, *GROUPS], "completion": list(SCRIPTS)}
        return "\n".join(candidates(words[1] if words[1:] else "", commands, follow, flags, flag_choices))
    if len(words) != 1 or words[0] not in SCRIPTS:
        raise UsageError(f"usage: ltts completion {'|'.join(SCRIPTS)}; it prints a script, which says where it goes")
    return SCRIPTS[words[0]].rstrip()


def definitions(rows: Iterable[tuple[str, str]], width: int, indent: int = 2, longest: int = LEFT) -> str:
    """Two columns: terms on the left, their texts wrapped on the right; a long term stands on a line of its own."""
    rows = list(rows)
    left = max([len(term) for term, _ in rows if len(term) <= longest], default=0) + 2
    start, lines = " " * (indent + left), []
    for term, text in rows:
        head = " " * indent + printable(term).ljust(left)
        if len(term) + 2 > left:
            lines.append(head)
            head = start
        wrapped = textwrap.fill(
            printable(text), max(width, len(start) + 20), initial_indent=head, subsequent_indent=start,
            break_long_words=False,
        )  # fmt: skip
        lines.append(wrapped or head)
    return "\n".join(line.rstrip() for line in lines if line.strip())


def command_help(name: str, arguments: Sequence[str], commands: Commands) -> str:
    """The help of a command with keys.

    Args:
        name: of the command, as in `train-rm`.
        arguments: those beside `--help`: options in them are shown with their keys.
        commands: what each does, and its positional arguments.
    """
    about, positional = commands[name]
    folders = [
        *(after for word, after in pairwise(arguments) if word in FOLDER_FLAGS),
        *(word.partition("=")[2] for word in arguments if word.startswith("--config-dir=")),
    ]
    overrides = [word for word in arguments if "=" in word and not word.startswith("-")]
    places, width, command_file = conf_dirs(folders), max(50, terminal_width()), name.replace("-", "_")
    command = read_command(command_file)
    groups = {group: options_of(command_file, group, places) for group in command.groups}
    groups = {group: options for group, options in groups.items() if options and group != "local"}
    usage = [
        "usage: ltts",
        name,
        *map(_positional, positional),
        "[KEY=VALUE ...]",
        *["[GROUP=OPTION ...] [-m]"] * bool(groups),
    ]
    parts = [" ".join(usage), f"{about[0].upper()}{about[1:]}."]
    for is_example, lines in groupby(filter(None, command.examples), lambda line: line.startswith("  ")):
        if is_example:
            pairs = ((term, what.strip()) for term, _, what in (line.strip().partition("  ") for line in lines))
            parts.append("\n" + definitions(pairs, width, longest=width // 2))
        else:
            parts.append(" ".join(lines))
    parts += ["Keys:", definitions(map(_key_row, command.keys), width)]
    chosen = chosen_options(command_file, overrides, places)
    if groups:
        parts.append("Groups, with their options (* is the one chosen) and the keys of what is chosen:")
    for group, options in groups.items():
        parts.append(f"{group}: {GROUPS.get(group, '')}".rstrip(": "))
        rows = [
            (f"{'*' if name in chosen[group] else ' '} {group}={name}", read_option(group, name, places).about)
            for name in options
        ]
        parts.append(definitions(rows, width))
        keys = [key for option in options if option in chosen[group] for key in read_option(group, option, places).keys]
        if keys and group != "experiment":
            parts.append(definitions(map(_key_row, keys), width, indent=4))
        for nested in nested_groups(group):
            described = _described_options(nested, places, width, indent=4)
            parts.append("\n".join([f"  {nested}, where the option above has one:", *described]))
    flags = [row for row in FLAGS_TEXT if groups or row[0] not in ("-m, --multirun", "--config-dir FOLDER")]
    return _join([*parts, "Flags:", definitions(flags, width)], width)


def key_help(name: str, commands: Iterable[str], places: Sequence[Path], width: int) -> str:
    """The keys of a name, in full (`sampler.sigma`) or its end (`sigma`), with the commands and options that have them.

    Raises:
        UsageError: there is none, and no command or group of that name.
    """
    own = [(key, f"ltts {command}") for command in commands for key in read_command(command.replace("-", "_")).keys]
    every = [*own, *option_keys(GROUPS, places)]
    owners: dict[tuple[str, str], list[str]] = {}
    for key, owner in every:
        if key.is_called(name):
            owners.setdefault(_key_row(key), []).append(owner)
    if not owners:
        known = [*commands, *GROUPS]
        of_keys = [part for key, _ in every for part in (key.name, key.name.rpartition(".")[2])]
        names = dict.fromkeys([*known, *PLURALS, *of_keys])
        hint = did_you_mean(closest(name, names, cutoff=0.7))
        raise UsageError(f"ltts help: no command, group or key {name!r}; {hint}one of {', '.join(known)}, or a key")
    parts = [(f"{', '.join(names)}:", definitions([row], width)) for row, names in owners.items()]
    return _join([part for pair in parts for part in pair], width)


def _described_options(group: str, places: Sequence[Path], width: int, indent: int) -> list[str]:
    """The options of a group, each with its keys below it."""
    parts = []
    for name in option_names(group, places):
        option = read_option(group, name, places)
        parts.append(definitions([(f"{group}={name}", option.about)], width, indent=indent))
        if option.keys:
            parts.append(definitions(map(_key_row, option.keys), width, indent=indent + 2))
    return parts


def options_text(what: Sequence[str], places: Sequence[Path], width: int) -> str:
    """The options of some groups, named in the plural (all of them by default), with a line each.

    Raises:
        UsageError: there is no such group.
    """
    for word in what:
        if word not in PLURALS:
            known = [*PLURALS, "runs"]
            hint = did_you_mean(closest(word, known))
            raise UsageError(f"ltts list: nothing is called {word!r}; {hint}one of {', '.join(known)}")
    parts = []
    for word in what or PLURALS:
        group = PLURALS[word]
        options = [read_option(group, name, places) for name in option_names(group, places)]
        described = definitions([(option.name, option.about) for option in options], width)
        parts += [f"{word} ({group}=NAME): {GROUPS[group]}", described]
    return _join(parts, width)


def _key_row(key: Key) -> tuple[str, str]:
    """A key with its default; a default that refers to another key is shown with the type."""
    shown, notes = shown_default(key.default), [key.kind] if key.kind else []
    term = f"{key.name}={shown}"
    if "${" in key.default or shown == "required":
        term = key.name
        notes.append("required" if shown == "required" else f"default: {shown}")
    return term, f"{key.comment} [{'; '.join(notes)}]".strip() if notes else key.comment


def _positional(argument: str) -> str:
    """A positional argument as usage lines have it: `RUN`, `[RUNS ...]`, `[ACTION]`."""
    name = argument.rstrip("*?").upper()
    return f"[{name} ...]" if argument.endswith("*") else f"[{name}]" if argument.endswith("?") else name


def _join(parts: Sequence[str], width: int) -> str:
    """Parts with an empty line before each one that is not indented; those are wrapped."""
    text = ""
    for part in parts:
        indented = part.startswith((" ", "\n"))
        text += ("\n" if indented else "\n\n") + (part if indented else textwrap.fill(part, width))
    return text.lstrip("\n")
