"""Completion of `ltts` command lines: the scripts for bash and zsh, and the words that they offer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from latent_tts.config.reference import (
    GROUPS,
    chosen_options,
    conf_dirs,
    keys_of,
    option_names,
    options_of,
)

FOLDER_FLAGS = ("-cd", "--config-dir")
ACTIONS = {"cache": ("list", "prune")}  # what can follow a command without a key
CANDIDATES = "candidates"  # the word with which the scripts ask for what is below
VALUES = {"true or false": ("true", "false")}
OWN_VALUES = {
    "engine.dtype": ("float32", "bfloat16", "float16"),
    "engine.graph": ("auto", "on", "off"),
    "cache": ("on", "refresh", "off"),
    "answer.decode": ("all", "winners"),
    "against": ("n", "rollouts", "gflops", "seconds", "recorded_seconds", "diversity"),
    "beside": ("auto", "dropout", "gaussian", "null"),
    "maps": ("[pca]", "[pca,tsne]"),
    "format": ("png", "svg", "pdf"),
    "keep": ("mixed", "all"),
    "action": ACTIONS["cache"],
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
    line: str,
    commands: Iterable[str],
    words: Mapping[str, Sequence[str]],
    flags: Mapping[str, Sequence[str]],
    flag_choices: Mapping[str, Sequence[str]],
) -> list[str]:
    """What can stand at the end of a command line; nothing where a path is expected.

    Args:
        line: up to the cursor, `ltts` included.
        commands: names of commands with keys.
        words: names of the other commands, with the words that can follow each.
        flags: of each command with keys.
        flag_choices: the words that can follow a flag.
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
        return _beginning(flags[name], word)
    if others and others[-1] in flag_choices:
        return _beginning(flag_choices[others[-1]], word)
    if others and others[-1] in FOLDER_FLAGS:
        return []
    file = name.replace("-", "_")
    places = conf_dirs(folder for flag, folder in pairwise(others) if flag in FOLDER_FLAGS)
    key, equals, value = word.partition("=")
    if equals:
        *before, last = re.split(r"[,\[]", value)  # the values of a sweep or a list
        values = [each for each in _values(file, key.lstrip("+"), others, places) if each not in before]
        return [f"{word.removesuffix(last)}{each}" for each in _beginning(values, last)]
    groups = [group for group in chosen_options(file, others, places) if option_names(group, places)]
    keys = [key.name for key in keys_of(file, others, places)]
    sign = word[: len(word) - len(word.lstrip("+"))]
    found = _beginning([f"{sign}{key}=" for key in dict.fromkeys([*groups, *keys])], word)
    return [*_beginning(ACTIONS.get(name, ()), word), *found]


def _values(command: str, key: str, overrides: Sequence[str], places: Sequence[Path]) -> Sequence[str]:
    """The values that a key can have, if they are few."""
    if key in GROUPS:
        return options_of(command, key, places)
    if key in OWN_VALUES:
        return OWN_VALUES[key]
    kinds = {each.name: each.kind for each in keys_of(command, overrides, places)}
    return VALUES.get(kinds.get(key, ""), ())


def _beginning(words: Iterable[str], start: str) -> list[str]:
    """The words that begin like that."""
    return [word for word in words if word.startswith(start)]
