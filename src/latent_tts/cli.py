"""`ltts`: a thin dispatcher. It takes the command's name and leaves the rest of the command line to Hydra."""

from __future__ import annotations

import errno
import importlib
import logging
import os
import re
import signal
import sys
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from latent_tts.config.interrupts import INTERRUPTS
from latent_tts.errors import JobsFailed, LatentTTSError, UsageError, closest, did_you_mean, printable, unknown_key

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
MAX_LINES = 4
KEPT = "finished work is kept; "
OF_DISK = {errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE, errno.ETIMEDOUT}
MULTIRUN = ("-m", "--multirun")
FLAGS = [*MULTIRUN, "-h", "--help", "--hydra-help", "--version", "--resolve", "-r", "--run"]
FLAGS_WITH_VALUE = ["-c", "--cfg", "-p", "--package", "-i", "--info", "-cd", "--config-dir", "-cn", "--config-name"]
EXAMPLE = {"--example": ["task=arith", "task.limit=1"]}
FLAGS_OF_COMMAND = {"ask": {"--json": ["json=true"], **EXAMPLE}, "trace": EXAMPLE}  # and their keys
OF_VALUES = {  # what OmegaConf says of a value, and what is said here
    r"Cannot convert '(?P<kind>\w+)' to string: '(?P<value>.*)'$": "{key}={value}: must be text, not a {kind}",
    r"Value '(?P<value>.*?)' of type '\w+' could not be converted to (?P<kind>\w+)": (
        "{key}={value}: must be of type {kind}"
    ),
    r"Value '(?P<value>.*?)' is not a valid bool": "{key}={value}: must be true or false",
    r".*is not a ListConfig, list or tuple": "{key}: must be a list, as in {key}=[A,B]",
    r"Missing mandatory value: (?P<name>.+)": "{name}: needs a value; null and an empty list are none",
    r"field '(?P<name>.+)' is not Optional": "{name}: needs a value; null and an empty list are none",
    r".*Error trying to access (?P<node>.+?)\.(?P<inner>\S+): node `(?P=node)` is not a container": (
        "{node}: must be a mapping with {inner}"
    ),
}
OF_ARGUMENTS = (  # errors of other libraries: kind, what they say, the argument's text, and what is said here
    (UnicodeEncodeError, "surrogates", "", "a name is not UTF-8: {error.object!r:.200}"),
    (
        OverflowError,
        "too large to convert to float",
        r"=[+-]?\d{300,}$",
        "{key}: a number that is beyond those of float64",
    ),
    (ValueError, "embedded null", "\0", "{key}: has the character NUL, which no path can have"),
    (RuntimeError, "home directory", "", "~ in a path: that user has no home folder; write the path in full"),
)
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
    return _run_hydra(name, overrides)


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
    except BrokenPipeError:  # the reader of stdout is gone, as with `| head`: end as other programs do
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    except OSError as error:  # stdout is on a disk that is full, say
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = say(error)
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
    known_flags = [*FLAGS_OF_COMMAND.get(name, ()), *FLAGS, *FLAGS_WITH_VALUE]
    flags: list[str] = []
    others: list[str] = []
    positional: dict[str, list[str]] = {}
    for before, argument, after in zip(["", *arguments], arguments, [*arguments[1:], None], strict=False):
        is_value = before in FLAGS_WITH_VALUE
        is_flag = argument.startswith("-") and not is_value
        if name in meant.ASKING and is_flag and " " in argument:
            others.append(f"question={meant.quoted(argument)}")  # `-3 + 4?`
            continue
        if not argument.isprintable() and (found := re.search("[\ud800-\udfff]", argument)):
            raise UsageError(
                f"{argument}: the byte {ord(found[0]) & 0xFF:#04x} is not UTF-8; rename the file or folder"
            )
        if argument.startswith("=") and not is_value:
            raise UsageError(f"{argument}: not of the form key=value; `ltts {name} --help` lists keys")
        if is_flag and argument.split("=")[0] not in FLAGS + FLAGS_WITH_VALUE:
            hint = did_you_mean(meant.key_of_flag(command, argument, after) or closest(argument, known_flags))
            hint = f"the file or folder is ./{argument}; " if names and _exists(argument) else hint
            raise UsageError(f"{argument}: no such flag; {hint}one of {', '.join(known_flags)}")
        if is_value and argument not in FLAG_CHOICES.get(before, [argument]):
            raise UsageError(f"{before} {argument}: must be one of {', '.join(FLAG_CHOICES[before])}")
        if argument in FLAG_CHOICES and after is None:
            raise UsageError(f"{argument}: needs one of {', '.join(FLAG_CHOICES[argument])} after it")
        if is_flag or is_value:
            flags.append(argument)
        elif "=" in argument and not (names and _exists(argument)) and meant.is_override(command, argument):
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


def _exists(path: str) -> bool:
    """Whether an argument names a file or folder."""
    try:
        return Path(path).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # too long, no home, a null character
        return False


def _run_hydra(name: str, arguments: list[str]) -> int:
    """Hand over to Hydra, and turn what it raises into a line and an exit code."""
    import hydra

    from latent_tts.config import jobs
    from latent_tts.config.build import (
        conf_dir,
        name_after_checkpoint,
        refuse_unknown_keys,
        register_schemas,
        remove_record,
        spell_numbers_alike,
        stay_where_started,
    )
    from latent_tts.config.callbacks import Failures, FolderLock

    command = name.replace("-", "_")
    register_schemas()
    wants_traceback = os.environ.get("HYDRA_FULL_ERROR", "0") == "1"
    saved_argv, saved_full = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    # with the full error set, Hydra lets exceptions through instead of printing them and exiting with 1
    sys.argv, os.environ["HYDRA_FULL_ERROR"] = [f"ltts {name}", *arguments], "1"

    def job(cfg: Any) -> None:
        stay_where_started()
        try:
            refuse_unknown_keys(cfg)
            name_after_checkpoint(cfg)
            spell_numbers_alike(cfg)
            importlib.import_module(job.__module__).main(cfg)  # slow, and needless where the config is refused
        except Exception as error:
            if is_refused(error):
                remove_record()
            else:
                log_to_files(error)
            raise

    job.__module__ = f"latent_tts.commands.{command}"  # Hydra names the job by its module
    Failures.kept.clear()
    try:
        if not jobs.run(command, job, arguments):
            hydra.main(version_base="1.3", config_path=conf_dir(), config_name=command)(job)()
        if Failures.kept:
            raise Failures.kept.pop()
    except SystemExit as stop:
        if Failures.kept:
            return say(Failures.kept.pop())
        return stop.code if isinstance(stop.code, int) else 1
    except KeyboardInterrupt as interrupt:
        return _say_interrupted(name, str(interrupt))
    except JobsFailed as failed:
        return failed.exit_code
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
        sys.argv = saved_argv
        os.environ.pop("HYDRA_FULL_ERROR")
        if saved_full is not None:
            os.environ["HYDRA_FULL_ERROR"] = saved_full
    return 0


def _say_interrupted(name: str, kept: str = "") -> int:
    """Print that a command was interrupted and what is kept; returns the exit code."""
    resumed = f"{KEPT}re-run the command to resume"
    print(f"interrupted: {kept or (resumed if name in RESUMABLE else 're-run the command')}", file=sys.stderr)
    return 128 + signal.SIGINT


def say(error: Exception, job: str = "") -> int:
    """Print an error, of a job of a sweep, in at most four lines; returns its exit code."""
    lines, code = describe(error)
    print("ltts: error: " + job + printable("\n".join(lines[:MAX_LINES])), file=sys.stderr)
    return code


def log_to_files(error: Exception) -> None:
    """Write an error into the log of the running job, with its traceback unless it is of a kind that users cause."""
    traceback = None if isinstance(error, LatentTTSError) else (type(error), error, error.__traceback__)
    record = logging.LogRecord(__name__, logging.ERROR, __file__, 0, "\n".join(describe(error)[0]), None, traceback)
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(record)


def describe(error: Exception) -> tuple[list[str], int]:
    """Lines that name key, value and what is allowed, and the exit code."""
    from hydra.errors import HydraException, MissingConfigException, OverrideParseException
    from omegaconf.errors import OmegaConfBaseException

    from latent_tts.config.meant import no_option, quoted_override, takes_list
    from latent_tts.config.reference import conf_dir

    if isinstance(error, LatentTTSError):
        return str(error).splitlines(), error.exit_code
    if isinstance(error, MissingConfigException):
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        own = [path.stem for path in (Path(conf_dir()) / group).glob("*.yaml")]
        options = sorted({*own, *(error.options or ())})  # Hydra's own list also has those of other packages
        hint = ["`ltts tune` makes it"] if (group, option) == ("engine", "tuned") else []
        if not group:
            return [f"--config-name {option}: no such config; one of {', '.join(options)}"], 2
        return [
            f"{group}={option}: no such option; {did_you_mean(closest(option, options))}one of {', '.join(options)}",
            *hint,
        ], 2
    if isinstance(error, OverrideParseException):
        fixed = quoted_override(error.override)
        hint = f"write {fixed}, with quotes around the value" if fixed else f"`{sys.argv[0]} --help` lists keys"
        return [f"{error.override}: {'cannot be read' if fixed else 'not of the form key=value'}; {hint}"], 2
    if ambiguous := re.match(r"Ambiguous value for argument '(.+?)'\n", str(error), re.S):
        key, _, value = ambiguous[1].partition("=")
        several = f"{ambiguous[1]}: several values; -m runs a job for each"
        command = sys.argv[0].partition(" ")[2].replace("-", "_")
        return [several + (f", {key}=[{value}] is a list" if takes_list(command, key) else "")], 2
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__ or error.__context__
    if isinstance(cause, OmegaConfBaseException):
        lines, file = _describe_omegaconf(error, cause), re.match(r"In '(.+?)': ", str(error))
        return [f"{file[1]}.yaml: {lines[0]}" if file else lines[0], *lines[1:]], 2
    if group := re.match(r"Could not override '(.+?)'\. No match in the defaults list", str(error)):
        return [f"{group[1]}: {sys.argv[0]} has no such group; `{sys.argv[0]} --help` lists its groups and keys"], 2
    if isinstance(error, HydraException):
        return [line for line in str(error).splitlines() if line.strip()], 2
    of_a_list = isinstance(error, TypeError) and "is not iterable" in str(error)  # of numbers, where Hydra wants names
    if "Config group override must be" in str(error) or (of_a_list and no_option(sys.argv[1:])):
        return [no_option(sys.argv[1:]) or str(error)], 2
    number, file = _errno_of(error), getattr(error, "filename", None)
    where = f"{file}: " if file else ""
    if number == errno.ENOSPC:
        return [f"{where}no space left on the disk", KEPT + "free some space first"], 1
    for kind, words, pattern, said in OF_ARGUMENTS:
        if isinstance(error, kind) and words in str(error):
            key = next((each.partition("=")[0] for each in sys.argv[1:] if re.search(pattern, each)), "a key")
            return [said.format(key=key, error=error)], 2
    if isinstance(error, MemoryError):
        return [
            f"out of memory{': ' if str(error) else ''}{error}",
            KEPT + "a smaller engine.rows needs less memory",
        ], 1
    if isinstance(error, OSError) or number is not None:
        of_user = isinstance(error, FileExistsError | NotADirectoryError) or number == errno.ENAMETOOLONG
        hint = [KEPT + "re-run the command to resume"] if number in OF_DISK else []
        what = getattr(error, "strerror", None) or (os.strerror(number) if number else (error.args or ("?",))[0])
        return [f"{where}{what}", *hint], 2 if of_user else 1
    hint = KEPT + "set HYDRA_FULL_ERROR=1 to see the traceback"
    return [f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}", hint], 1


def _errno_of(error: Exception) -> int | None:
    """The error number of the system behind an error; libraries in machine code have it in the text alone."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    text = " ".join(map(str, error.args))
    found = re.search(r"[\[(](?:errno|os error) (\d+)[\])]", text, re.IGNORECASE)
    if found is None and os.strerror(errno.ENOSPC) in text:
        return errno.ENOSPC
    return int(found[1]) if found else None


def is_refused(error: Exception) -> bool:
    """Whether an error is of something that the user wrote: then nothing was run."""
    return describe(error)[1] == 2


def _describe_omegaconf(error: Exception, cause: Any) -> list[str]:
    """A wrong key or a wrong type."""
    from latent_tts.config.meant import ASKING, key_of_option, nested_key, options_with, quoted_override

    first = str(cause).splitlines()[0]
    key = cause.full_key or cause.key or ""
    if missing := re.match(r"Key '(.+?)' (?:is not in struct|not in )", first):
        known = sorted(map(str, cause.parent_node or ()))
        key = key or missing[1]
        elsewhere = options_with(key)
        hint = [f"options with that key: {', '.join(elsewhere)}"] if elsewhere else []
        command = sys.argv[0].partition(" ")[2].replace("-", "_")  # as `_run_hydra` sets it
        if "." not in key and (nested := nested_key(command, key)):
            return [f"{key}: no such key; did you mean {nested}? `{sys.argv[0]} --help` lists keys"]
        if "." not in key and not closest(key, known, cutoff=0.7) and (other := key_of_option(command, key)):
            return [f"{key}: no such key; did you mean {other[0]}? It goes with {' or '.join(other[1])}"]
        question = next((each for each in sys.argv if command in ASKING and each.startswith(f"{key}=")), None)
        if question and not closest(key, known):
            hint.append(f"to ask it: {sys.argv[0]} {quoted_override(f'question={question}')}")
        return [str(unknown_key(key, (k for k in known if k not in ("_target_", "hydra")))), *hint]
    if re.match(r"Cannot merge DictConfig with ListConfig|Invalid type assigned: .* is not a subclass of", first):
        given = next((each.partition("=")[2] for each in sys.argv if each.lstrip("+").startswith(f"{key}=")), "")
        if given.startswith("{"):
            return [f"{key}={given}: must be a list, as in {key}=[A,B]"]
        return [f"{key}={given}: must be a mapping; set a key of it, as in {key}.KEY=VALUE"]
    for pattern, said in OF_VALUES.items():
        if found := re.match(pattern, first):
            parts = {"kind": "", "name": ""} | found.groupdict()
            return [said.format(**parts | {"key": key, "name": key or parts["name"], "kind": parts["kind"].lower()})]
    first = re.sub(r"^\w+ raised while resolving interpolation: ", "", first)
    return [f"{key}: {first}" if key and key not in first else first]
