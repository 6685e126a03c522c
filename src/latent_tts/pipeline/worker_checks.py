"""What a worker in another process must have in common with the driver: code, and files under the same paths."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from importlib import import_module
from typing import Any

from latent_tts.checkpoint.adapter import CheckpointAdapter
from latent_tts.checkpoint.draft import DraftFile
from latent_tts.errors import RunError
from latent_tts.executor import Executor, Work, Worker
from latent_tts.pipeline.code import PACKAGE, WHOLE, code_digests, computed_attributes, digest_of_package
from latent_tts.scorer.latent_rm import LatentRM
from latent_tts.types import file_digest

_checked: set[Hashable] = set()  # files of this machine that are the driver's


def work_of(
    executor: Executor,
    make: Work,
    options: Iterable[object],
    configs: Iterable[Any],
    weights: Iterable[CheckpointAdapter | LatentRM | None],
    draft: DraftFile | None = None,
) -> Work:
    """Work that is done in another process only if that has the driver's code and files.

    Args:
        executor: of the work.
        make: makes a worker.
        options: those that the worker uses.
        configs: their nodes; see `code.code_digests`.
        weights: options whose weights it reads.
        draft: the draft head that it reads.
    """
    if executor.in_process:
        return make
    return partial(make_checked, make, code_digests(options, configs, WHOLE), list(weights), draft)


def make_checked(
    make: Work, code: Mapping[str, str], weights: Iterable[CheckpointAdapter | LatentRM | None], draft: DraftFile | None
) -> Worker:
    """A worker; see `work_of`.

    Raises:
        RunError: this process has other code, weights or another draft head than the driver.
    """
    check_code(code)
    check_weights(weights)
    check_draft(draft)
    return make()


def check_code(code: Mapping[str, str]) -> None:
    """Raise RunError unless this process has the driver's code, by package."""
    for package, digest in code.items():
        if package == PACKAGE:
            own = code_digests([], [], WHOLE)[PACKAGE]
        else:
            with suppress(ImportError):
                import_module(package)
            own = digest_of_package(package)
        if own != digest:
            raise RunError(f"it has another version of {package} than the driver")


def check_weights(options: Iterable[CheckpointAdapter | LatentRM | None]) -> None:
    """Raise RunError unless this machine has the driver's weights; options forget what they knew of its files."""
    for option in filter(None, options):
        digest, own = option.digest, vars(option)
        for name in computed_attributes(type(option)):
            own.pop(name, None)  # this machine may have other files under the same paths
        key = type(option), repr(own), digest
        if key not in _checked and option.digest != digest:
            where = f": {option.folder}" if isinstance(option, CheckpointAdapter) else ""  # a scorer's name says it
            raise RunError(f"it has other weights of {option.name} than the driver{where}")
        own["digest"] = digest
        _checked.add(key)


def check_draft(draft: DraftFile | None) -> None:
    """Raise RunError unless this machine has the driver's draft head."""
    if draft is None or draft in _checked:
        return
    try:
        found = file_digest(draft.path)
    except OSError as error:
        raise RunError(f"it cannot read the draft head {draft.path}: {error.strerror}") from error
    if found != draft.digest:
        raise RunError(f"it has another draft head than the driver: {draft.path}")
    _checked.add(draft)
