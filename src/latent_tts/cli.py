"""`ltts`: a thin dispatcher. It takes the command's name and leaves the rest of the command line to Hydra."""

from __future__ import annotations

import importlib
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from typing import Any

from latent_tts.config.error_text import KEPT, is_refused, log_to_files, say
from latent_tts.config.interrupts import INTERRUPTS
from latent_tts.errors import UsageError, closest, did_you_mean

# name: (what it does, names of its positional arguments; a trailing * takes the rest, a trailing ? may be missing)
COMMANDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "run": ("draw rollouts, pick answers, write the scaling curve", ()),
    "ask": ("ask a question, or one per line of standard input: votes, picks, costs", ("question?",)),
    "rescore": ("score the rollouts of a completed run with another scorer", ("run",)),
    "replay": ("apply a budget to the rollouts of a completed run; nothing is drawn", ("run",)),
    "annotate": ("label every step of rollouts, for train-rm to learn from; resumable", ()),
    "train-reasoner": ("train a latent reasoner with its family's recipe; resumable", ()),
    "train-rm": ("train LatentRM, which scores rollouts by their latents; resumable", ()),
    "train-draft": ("train a small head that predicts a reasoner's latents, for schedule.guess=draft", ()),
    "tune": ("measure which engine settings are fastest on this machine and save them as engine=tuned", ()),
    "probe": ("measure how latents depend on each other, and whether computing them in parallel pays", ()),
    "trace": ("look into rollouts: latents, tokens, scores, sweeps, answers; a page and tables", ("question*",)),
    "collect": ("join tables of runs, average over seeds, list incomplete runs", ("runs*",)),
    "compare": ("paired differences of two run folders with intervals", ("a", "b")),
    "plot": ("draw figures from metrics tables", ("runs*",)),
    "cache": ("list the cache of rollouts, or remove entries of it", ("action?",)),
    "convert": ("rewrite a pickle or a training checkpoint for ltts run", ("src", "dst")),
}
RESUMABLE = (
    "run",
    "ask",
    "trace",
    "rescore",
    "annotate",
    "train-reasoner",
    "train-rm",
)  # the others keep nothing of what they began
MULTIRUN = ("-m", "--multirun")
FLAGS = [*MULTIRUN, "-h", "--help", "--hydra-help", "--version", "--resolve", "-r", "--run"]
FLAGS_WITH_VALUE = ["-c", "--cfg", "-p", "--package", "-i", "--info", "-cd", "--config-dir", "-cn", "--config-name"]
EXAMPLE = {"--example": ["task=arith", "task.limit=1"]}
FLAGS_OF_COMMAND = {"ask": {"--json": ["json=true"], **EXAMPLE}, "trace": EXAMPLE}  # and their keys
FLAG_CHOICES = {
    **dict.fromkeys(("-c", "--cfg"), ("job", "hydra", "all")),
    **dict.fromkeys(("-i", "--info"), ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after `ltts`; None takes the process's.

    Returns:
        The exit code: 0 for success, 1 for a failure while running, 2 for something wrong on the command line.
    """
    from latent_tts.config import help as about

    name, *others = (sys.argv[1:] if argv is None else argv) or ["--help"]
    own_flags = FLAGS_OF_COMMAND.get(name, {})
    others = [part for word in others for part in own_flags.get(word, [word])]
    try:
        if name not in COMMANDS or {"-h", "--help"} & set(others):
            flags = {each: [*FLAGS_OF_COMMAND.get(each, ()), *FLAGS, *FLAGS_WITH_VALUE] for each in COMMANDS}
            about.run(name, others, COMMANDS, flags, FLAG_CHOICES)
            return 0
        overrides = _overrides(name, others)
    except UsageError as error:
        return say(error)
    with _as_hydra_expects(name, overrides) as wants_traceback:
        return _run_hydra(name, wants_traceback=wants_traceback)


def entry() -> None:
    """The console script."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started the command
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # an encoding may lack a character of a table or a name
    INTERRUPTS.install()
    try:
        code = main()
        sys.stdout.flush()
    except OSError as error:  # stdout is on a disk that is full, or its reader is gone, as with `| head`
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE if isinstance(error, BrokenPipeError) else say(error)
    except KeyboardInterrupt:  # before the command began
        print("interrupted: nothing was begun", file=sys.stderr)
        code = 128 + signal.SIGINT
    if code == 128 + signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # another Ctrl-C ends what is left without a traceback
    sys.exit(code)


def _overrides(name: str, arguments: list[str]) -> list[str]:
    """Arguments for Hydra: `-m` goes first, where Hydra accepts it, and positional ones become overrides.

    Raises:
        UsageError: an unknown flag, too many positional arguments, or too few.
    """
    from latent_tts.config import meant

    multirun = [flag for flag in arguments if flag in MULTIRUN]
    arguments = [argument for argument in arguments if argument not in MULTIRUN]
    command, names = name.replace("-", "_"), list(COMMANDS[name][1])
    flags: list[str] = []
    others: list[str] = []
    positional: dict[str, list[str]] = {}
    for before, argument, after in zip(["", *arguments], arguments, [*arguments[1:], None], strict=False):
        is_value = before in FLAGS_WITH_VALUE
        is_flag = argument.startswith("-") and not is_value
        if name in meant.ASKING and is_flag and " " in argument:
            others.append(f"question={meant.quoted(argument)}")  # `-3 + 4?`
            continue
        _check_argument(name, before, argument, after)
        if is_flag or is_value:
            flags.append(argument)
        elif "=" in argument and not (names and meant.is_path(argument)) and meant.is_override(command, argument):
            others.append(argument)
        elif names:
            positional.setdefault(names[0].rstrip("*?"), []).append(meant.quoted(argument))
            names = names if names[0].endswith("*") else names[1:]
        else:
            raise UsageError(
                f"ltts {name}: {argument!r} is not of the form key=value; "
                f"{did_you_mean(meant.option_of(command, argument))}`ltts {name} --help` lists keys"
            )
    given_keys = {argument.partition("=")[0] for argument in flags + others}
    if names and not names[0].endswith(("*", "?")) and not {*names, *FLAGS[2:], *FLAGS_WITH_VALUE} & given_keys:
        usage = " ".join(["ltts", name, *(key.upper() for key in COMMANDS[name][1])])
        raise UsageError(
            f"usage: {usage} [key=value ...]; {names[0].upper()} is missing; `ltts {name} --help` lists keys"
        )
    meant.check_choices(command, others)
    given = [
        f"{key}=[{','.join(values)}]" if f"{key}*" in COMMANDS[name][1] else f"{key}={values[0]}"
        for key, values in positional.items()
    ]
    return multirun[:1] + flags + others + given  # argparse wants what is no flag in one piece


def _check_argument(name: str, before: str, argument: str, after: str | None) -> None:
    """Refuse an argument that cannot be read.

    Raises:
        UsageError: no text, no key, an unknown flag, or a flag with another value than it takes.
    """
    from latent_tts.config import meant

    is_value = before in FLAGS_WITH_VALUE
    if not argument.isprintable() and (found := re.search("[\ud800-\udfff]", argument)):
        raise UsageError(f"{argument}: the byte {ord(found[0]) & 0xFF:#04x} is not UTF-8; rename the file or folder")
    if argument.startswith("=") and not is_value:
        raise UsageError(f"{argument}: not of the form key=value; `ltts {name} --help` lists keys")
    if argument.startswith("-") and not is_value and argument.split("=")[0] not in FLAGS + FLAGS_WITH_VALUE:
        known = [*FLAGS_OF_COMMAND.get(name, ()), *FLAGS, *FLAGS_WITH_VALUE]
        key = meant.key_of_flag(name.replace("-", "_"), argument, after)
        hint = did_you_mean(key or closest(argument, known))
        if COMMANDS[name][1] and meant.is_path(argument):
            hint = f"the file or folder is ./{argument}; "
        raise UsageError(f"{argument}: no such flag; {hint}one of {', '.join(known)}")
    if is_value and argument not in FLAG_CHOICES.get(before, [argument]):
        raise UsageError(f"{before} {argument}: must be one of {', '.join(FLAG_CHOICES[before])}")
    if argument in FLAG_CHOICES and after is None:
        raise UsageError(f"{argument}: needs one of {', '.join(FLAG_CHOICES[argument])} after it")


def _run_hydra(name: str, *, wants_traceback: bool) -> int:
    """Hand over to Hydra, and turn what it raises into a line and an exit code."""
    from latent_tts.config import jobs
    from latent_tts.config.build import register_schemas
    from latent_tts.config.callbacks import Failures, FolderLock

    register_schemas()
    Failures.kept.clear()
    try:
        jobs.run(name.replace("-", "_"), _job_of(name))
        if Failures.kept:
            raise Failures.kept.pop()
    except SystemExit as stop:
        if Failures.kept:
            return say(Failures.kept.pop())
        return stop.code if isinstance(stop.code, int) else 1
    except KeyboardInterrupt as interrupt:
        return _say_interrupted(name, str(interrupt))
    except BrokenPipeError:
        raise
    except Exception as error:
        if INTERRUPTS.pending:  # a module in machine code makes another error of Ctrl-C
            return _say_interrupted(name)
        if wants_traceback:
            raise
        return say(error)
    finally:
        FolderLock.held.close()
    return 0


def _job_of(name: str) -> Callable[[Any], None]:
    """What Hydra calls with the config of a job, for a command."""
    from latent_tts.config import build

    def job(cfg: Any) -> None:
        build.stay_where_started()
        try:
            build.refuse_unknown_keys(cfg)
            build.name_after_checkpoint(cfg)
            build.spell_numbers_alike(cfg)
            importlib.import_module(job.__module__).main(cfg)  # slow, and needless where the config is refused
        except Exception as error:
            if is_refused(error):
                build.remove_record()
            else:
                log_to_files(error)
            raise

    job.__module__ = f"latent_tts.commands.{name.replace('-', '_')}"  # Hydra names the job by its module
    return job


@contextmanager
def _as_hydra_expects(name: str, arguments: list[str]) -> Iterator[bool]:
    """The command line as Hydra reads it, which raises errors instead of printing them and exiting with 1.

    Yields:
        Whether the user wants the tracebacks of errors.
    """
    saved_argv, saved_full = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv, os.environ["HYDRA_FULL_ERROR"] = [f"ltts {name}", *arguments], "1"
    try:
        yield saved_full == "1"
    finally:
        sys.argv = saved_argv
        os.environ.pop("HYDRA_FULL_ERROR")
        if saved_full is not None:
            os.environ["HYDRA_FULL_ERROR"] = saved_full


def _say_interrupted(name: str, kept: str = "") -> int:
    """Print that a command was interrupted and what is kept; returns the exit code."""
    resumed = f"{KEPT}re-run the command to resume"
    print(f"interrupted: {kept or (resumed if name in RESUMABLE else 're-run the command')}", file=sys.stderr)
    return 128 + signal.SIGINT
