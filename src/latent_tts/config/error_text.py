"""What is printed of an error, whoever raised it: a line that names key, value and what is allowed; its exit code."""

from __future__ import annotations

import errno
import logging
import os
import re
import sys
from typing import Any

from latent_tts.errors import LatentTTSError, closest, did_you_mean, printable, unknown_key

MAX_LINES = 4
KEPT = "finished work is kept; "
OF_DISK = {errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE, errno.ETIMEDOUT}
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
    (ValueError, "Only one of --run", "", "--cfg and --info are of one job, and cannot be together; leave out -m"),
    (ValueError, "embedded null", "\0", "{key}: has the character NUL, which no path can have"),
    (RuntimeError, "home directory", "", "~ in a path: that user has no home folder; write the path in full"),
)


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


def is_refused(error: Exception) -> bool:
    """Whether an error is of something that the user wrote: then nothing was run."""
    return describe(error)[1] == 2


def describe(error: Exception) -> tuple[list[str], int]:
    """Lines that name key, value and what is allowed, and the exit code."""
    if isinstance(error, LatentTTSError):
        return str(error).splitlines(), error.exit_code
    if lines := _describe_config(error) or _describe_argument(error):
        return lines, 2
    return _describe_failure(error)


def _describe_config(error: Exception) -> list[str]:
    """The lines for a config that Hydra or OmegaConf cannot compose; none for other errors."""
    from hydra.errors import HydraException, MissingConfigException, OverrideParseException
    from omegaconf.errors import OmegaConfBaseException

    from latent_tts.config.meant import quoted_override
    from latent_tts.config.reference import command_files, conf_dirs, option_names, read_command

    if isinstance(error, MissingConfigException):
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        options = sorted(error.options or (option_names(group, conf_dirs()) if group else command_files()))
        hint = ["`ltts tune` makes it"] if (group, option) == ("engine", "tuned") else []
        if not group:
            return [f"--config-name {option}: no such config; one of {', '.join(options)}"]
        meant = did_you_mean(closest(option, options))
        return [f"{group}={option}: no such option; {meant}one of {', '.join(options)}", *hint]
    if isinstance(error, OverrideParseException):
        fixed = quoted_override(error.override)
        hint = f"write {fixed}, with quotes around the value" if fixed else f"`{sys.argv[0]} --help` lists keys"
        return [f"{error.override}: {'cannot be read' if fixed else 'not of the form key=value'}; {hint}"]
    if ambiguous := re.match(r"Ambiguous value for argument '(.+?)'\n", str(error), re.S):
        key, _, value = ambiguous[1].partition("=")
        several = f"{ambiguous[1]}: several values; -m runs a job for each"
        known = read_command(sys.argv[0].partition(" ")[2].replace("-", "_"))
        kind = next((each.kind for each in known.keys if each.name == key), "list")
        takes_list = key in known.lists or (key not in known.groups and "list" in kind)
        return [several + (f", {key}=[{value}] is a list" if takes_list else "")]
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__ or error.__context__
    if isinstance(cause, OmegaConfBaseException):
        lines, file = _describe_omegaconf(error, cause), re.match(r"In '(.+?)': ", str(error))
        return [f"{file[1]}.yaml: {lines[0]}" if file else lines[0], *lines[1:]]
    if group := re.match(r"Could not override '(.+?)'\. No match in the defaults list", str(error)):
        return [f"{group[1]}: {sys.argv[0]} has no such group; `{sys.argv[0]} --help` lists its groups and keys"]
    of_hydra = isinstance(error, HydraException) or "Config group override must be" in str(error)
    return [line for line in str(error).splitlines() if line.strip()] if of_hydra else []


def _describe_argument(error: Exception) -> list[str]:
    """The line for a value that another library cannot take; none for other errors."""
    for kind, words, pattern, said in OF_ARGUMENTS:
        if isinstance(error, kind) and words in str(error):
            key = next((each.partition("=")[0] for each in sys.argv[1:] if re.search(pattern, each)), "a key")
            return [said.format(key=key, error=error)]
    return []


def _describe_failure(error: Exception) -> tuple[list[str], int]:
    """Lines and exit code for a full disk, missing memory, and whatever else goes wrong."""
    number, file = _errno_of(error), getattr(error, "filename", None)
    where = f"{file}: " if file else ""
    if number == errno.ENOSPC:
        return [f"{where}no space left on the disk", KEPT + "free some space first"], 1
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


def _describe_omegaconf(error: Exception, cause: Any) -> list[str]:
    """A wrong key or a wrong type."""
    from latent_tts.config.meant import ASKING, key_called, options_with, quoted_override
    from latent_tts.config.reference import command_files

    first = str(cause).splitlines()[0]
    key = cause.full_key or cause.key or ""
    if missing := re.match(r"Key '(.+?)' (?:is not in struct|not in )", first):
        known, key = sorted(map(str, cause.parent_node or ())), key or missing[1]
        command = sys.argv[0].partition(" ")[2].replace("-", "_")  # as `cli` sets it
        is_known = command in command_files()
        if is_known and "." not in key and (called := key_called(command, key)):
            return [f"{key}: no such key; did you mean {called}? `{sys.argv[0]} --help` lists keys"]
        full, options = next(iter(options_with(command, key).items()), ("", [])) if is_known else ("", [])
        if options and full != key and not closest(key, known, cutoff=0.7):
            return [f"{key}: no such key; did you mean {full}? It goes with {' or '.join(options)}"]
        hint = [f"options with that key: {', '.join(options)}"] if full == key else []
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
