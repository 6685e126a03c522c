"""Completion of `ltts` command lines: the scripts for bash and zsh, and the words that they offer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from latent_tts.config.reference import GROUPS, Key, chosen_options, conf_dirs, option_names, read_command, read_option

FOLDER_FLAGS = ("-cd", "--config-dir")
CANDIDATES = "candidates"  # the word with which the scripts ask for what is below
VALUES = {"true or false": ("true", "false")}
OWN_VALUES = {
    "engine.dtype": ("float32", "bfloat16", "float16"),
    "engine.graph": ("auto", "on", "off"),
    "cache": ("on", "refresh", "off"),
    "answer.decode": ("all", "winners"),
    "against": ("n", "gflops", "seconds", "diversity"),
    "format": ("png", "svg", "pdf"),
    "keep": ("mixed", "all"),
}
BASH = """# completion of ltts in bash; in ~/.bashrc: eval "$(ltts completion bash)"
_ltts() {
    local line="${COMP_LINE:0:COMP_POINT}" IFS=$'\\n'
    local word="${line##* }"
    local kept="${word%"${word##*[=:]}"}" # bash replaces only what follows a = or :
    COMPREPLY=($("${COMP_WORDS[0]}" completion candidates "$line" 2>/dev/null))
    [[ "${COMPREPLY[0]}" == *= ]] && compopt -o nospace
    COMPREPLY=("${COMPREPLY[@]#"$kept"}")
}
complete -o default -F _ltts ltts
"""
ZSH = """#compdef ltts
# completion of ltts in zsh; in ~/.zshrc, after compinit: eval "$(ltts completion zsh)"
_ltts() {
    local -a found
    found=(${(f)"$("${words[1]}" completion candidates "${(j: :)words[1,CURRENT-1]} $PREFIX" 2>/dev/null)"})
    if (( $#found )); then
        compadd -S '' -- ${(M)found:#*=}
        compadd -- ${found:#*=}
    else
        compset -P '*='
        _files
    fi
}
compdef _ltts ltts
"""
SCRIPTS = {"bash": BASH, "zsh": ZSH}


def candidates(
    line: str, commands: Iterable[str], words: Mapping[str, Sequence[str]], flags: Iterable[str]
) -> list[str]:
    """What can stand at the end of a command line; nothing where a path is wanted.

    Args:
        line: up to the cursor, `ltts` included.
        commands: names of commands with keys.
        words: names of the other commands, with the words that can follow each.
        flags: of the commands with keys.
    """
    given = line.split()[1:]
    word = given.pop() if given and not line.endswith(" ") else ""
    if not given:
        return _beginning([*commands, *words, "--help", "--version"], word)
    name, *others = given
    if name in words:
        return _beginning(words[name], word)
    if name not in commands:
        return []
    if word.startswith("-"):
        return _beginning(flags, word)
    places = conf_dirs(folder for flag, folder in pairwise(others) if flag in FOLDER_FLAGS)
    key, equals, value = word.partition("=")
    if equals:
        before, comma, last = value.rpartition(",")
        values = _values(name, key, others, places)
        return [f"{key}={before}{comma}{each}" for each in _beginning(values, last)]
    command = read_command(name.replace("-", "_"))
    groups = [group for group in command.groups if option_names(group, places)]
    keys = [key.name for key in _keys(name, others, places)]
    return _beginning([f"{key}=" for key in dict.fromkeys([*groups, *keys])], word)


def _keys(name: str, overrides: Sequence[str], places: Sequence[Path]) -> list[Key]:
    """The keys of a command and of the options that it has under some overrides."""
    command = name.replace("-", "_")
    keys = list(read_command(command).keys)
    for group, options in chosen_options(command, overrides, places).items():
        keys += [key for option in options for key in read_option(group, option, places).keys]
    return keys


def _values(name: str, key: str, overrides: Sequence[str], places: Sequence[Path]) -> Sequence[str]:
    """The values that a key can have, if they are few."""
    if key in GROUPS:
        return option_names(key, places)
    if key in OWN_VALUES:
        return OWN_VALUES[key]
    kinds = {each.name: each.kind for each in _keys(name, overrides, places)}
    return VALUES.get(kinds.get(key, ""), ())


def _beginning(words: Iterable[str], start: str) -> list[str]:
    """The words that begin like that."""
    return [word for word in words if word.startswith(start)]
