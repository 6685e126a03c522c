"""What a worker in another process must have in common with the driver: code, and files under the same paths."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from contextlib import suppress
from importlib import import_module
from typing import Any

from latent_tts.checkpoint.adapter import CheckpointAdapter
from latent_tts.checkpoint.draft import DraftFile
from latent_tts.errors import RunError
from latent_tts.executor import Executor
from latent_tts.pipeline.code import PACKAGE, WHOLE, code_digests, computed_attributes, digest_of_package
from latent_tts.scorer.latent_rm import LatentRM
from latent_tts.types import file_digest

_checked: set[Hashable] = set()  # files of this machine that are the driver's


def code_of_driver(executor: Executor, objects: Iterable[object], configs: Iterable[Any]) -> dict[str, str] | None:
    """Digests of this package and of those behind a worker's options; None where no worker is in another process.

    Args:
        executor: of the work.
        objects: the options.
        configs: their nodes; see `code.code_digests`.
    """
    return None if executor.in_process else code_digests(objects, configs, WHOLE)


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


def check_weights(*options: CheckpointAdapter | LatentRM | None) -> None:
    """Raise RunError unless this machine has the driver's weights; options forget what they knew of its files."""
    for option in filter(None, options):
        computed, digest = computed_attributes(type(option)), option.digest
        settings = {name: value for name, value in vars(option).items() if name not in computed}
        key = type(option), repr(settings), digest
        known = {"digest"} if key in _checked else set()
        for name in computed - known:
            vars(option).pop(name, None)  # this machine may have other files under the same paths
        if not known and option.digest != digest:
            where = f": {option.folder}" if isinstance(option, CheckpointAdapter) else ""  # a scorer's name says it
            raise RunError(f"it has other weights of {option.name} than the driver{where}")
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
