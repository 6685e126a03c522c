"""The commands about commands: `ltts help`, `ltts list`, `ltts completion`. They need neither Hydra nor torch."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from latent_tts.config.completion import CANDIDATES, FOLDER_FLAGS, SCRIPTS, candidates
from latent_tts.config.help import PLURALS, command_help, group_help, options_text
from latent_tts.config.reference import GROUPS, conf_dirs
from latent_tts.errors import UsageError

Commands = Mapping[str, tuple[str, tuple[str, ...]]]
# name: (what it does, names of its positional arguments), as in `cli.COMMANDS`
COMMANDS: Commands = {
    "list": ("list models, tasks, samplers, ... (what each option is), or runs", ("what*",)),
    "help": ("show the keys of a command, or the options of a group with their keys", ("command?",)),
    "completion": ("print the completion script of a shell, bash or zsh", ("shell",)),
}


def run(
    name: str,
    words: Sequence[str],
    commands: Commands,
    flags: Mapping[str, Sequence[str]],
    flag_choices: Mapping[str, Sequence[str]],
) -> None:
    """Print what a command of this module is asked for.

    Args:
        name: of the command.
        words: what follows it.
        commands: those with keys.
        flags: of each of those.
        flag_choices: the words that can follow a flag.

    Raises:
        UsageError: a word is unknown.
    """
    width = shutil.get_terminal_size((100, 24)).columns
    if name == "completion":
        print(_completion(words, commands, flags, flag_choices))
    elif name == "list" and words[:1] == ["runs"]:
        from latent_tts.results.run_list import print_runs

        print_runs([Path(word).expanduser() for word in words[1:]])
    elif name == "list":
        print(options_text(words, conf_dirs(), width))
    elif words[:1] and words[0] in GROUPS:
        print(group_help(words[0], conf_dirs(), width))
    else:
        raise UsageError(f"ltts help: no command or group {words[0]!r}; one of {', '.join([*commands, *GROUPS])}")


def help_of(name: str, arguments: Sequence[str], commands: Commands) -> str:
    """The help of a command with keys, as `ltts NAME ARGUMENTS... --help` shows it."""
    folders = [arguments[place + 1] for place, word in enumerate(arguments[:-1]) if word in FOLDER_FLAGS]
    folders += [word.partition("=")[2] for word in arguments if word.startswith("--config-dir=")]
    overrides = [word for word in arguments if "=" in word and not word.startswith("-")]
    width = shutil.get_terminal_size((100, 24)).columns
    return command_help(name, *commands[name], overrides, conf_dirs(folders), width)


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
