"""Jobs without a sweep, whose config Hydra composes once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hydra import version
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException
from hydra.types import RunMode
from omegaconf import DictConfig

from latent_tts.config.build import conf_dir


class _NotASingleJob(Exception):
    """The arguments ask for a sweep, or may: `hydra.main` has to see them."""


class _SingleJob(Hydra):
    def compose_config(self, *arguments: Any, **more: Any) -> DictConfig:
        try:
            cfg = super().compose_config(*arguments, **more)
        except ConfigCompositionException as error:
            if str(error).startswith("Ambiguous value"):  # of several values: the config may say that it is a sweep
                raise _NotASingleJob from error
            raise
        if cfg.hydra.mode == RunMode.MULTIRUN:
            raise _NotASingleJob
        return cfg


def run_single_job(command: str, job: Callable[[DictConfig], None], arguments: Sequence[str]) -> bool:
    """Run a job as `hydra.main` does, which composes the config twice: first only to read `hydra.mode`.

    Args:
        command: name of the primary config.
        job: takes the config. What it raises passes, and so does an error of composing the config.
        arguments: of the command line.

    Returns:
        Whether it ran. False where `hydra.main` has to: for flags, sweeps, and several values of a key.
    """
    if any(argument.startswith("-") for argument in arguments):
        return False
    version.setbase("1.3")
    hydra = _SingleJob.create_main_hydra2(command, create_config_search_path(conf_dir()))
    try:
        hydra.run(command, job, list(arguments))
    except _NotASingleJob:
        return False
    finally:
        GlobalHydra.instance().clear()
    return True
