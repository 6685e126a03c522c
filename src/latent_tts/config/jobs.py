"""Jobs and sweeps as `hydra.main` runs them, but files are composed once per choice of options."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import hydra
from hydra import version
from hydra._internal import hydra as internal
from hydra._internal.config_loader_impl import ConfigLoaderImpl, get_overrides_dirname
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobRuntime
from hydra.plugins.config_source import ConfigSource
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict

from latent_tts.config.reference import conf_dir

MAX_COMPOSED = 64  # of 150 KB each
_composed: dict[tuple[object, ...], DictConfig] = {}


class Loader(ConfigLoaderImpl):
    """Composes files only if the chosen options or a file changed; then applies the values, as Hydra does.

    Composing files takes as long as a small run. Hydra composes a job twice, the first time to read `hydra.mode`, and
    the jobs of a sweep often choose the same options.
    """

    def _load_configuration_impl(
        self,
        config_name: str | None,
        overrides: list[str],
        run_mode: RunMode,
        from_shell: bool = True,
        validate_sweep_overrides: bool = True,
    ) -> DictConfig:
        compose = super()._load_configuration_impl
        parsed = OverridesParser.create().parse_overrides(overrides)
        stamps = [_stamps(source) for source in self.get_sources()]
        if None in stamps or any(each.key_or_group == "hydra.searchpath" for each in parsed):
            return compose(config_name, overrides, run_mode, from_shell, validate_sweep_overrides)
        if validate_sweep_overrides:
            self.validate_sweep_overrides_legal(parsed, run_mode, from_shell)
        own = [each for each in parsed if not each.is_sweep_override()]
        groups = [each for each in own if self.repository.group_exists(each.key_or_group)]
        options = [each for each in groups if not isinstance(each.value(), dict)]
        chosen = [str(each.input_line) for each in options]
        paths = [source.path for source in self.get_sources()]  # a config names them
        key = (config_name, JobRuntime().get("name"), version.getbase(), *paths, *filter(None, stamps), *chosen)
        if key not in _composed:
            if len(_composed) >= MAX_COMPOSED:
                _composed.clear()
            _composed[key] = compose(config_name, chosen, run_mode)
        cfg = copy.deepcopy(_composed[key])
        self._apply_overrides_to_config([each for each in own if each not in options], cfg)
        of_hydra = [each for each in parsed if each.is_hydra_override()]
        of_task = [each for each in parsed if not each.is_hydra_override()]
        cfg.hydra.overrides.task = [each.input_line for each in of_task]
        cfg.hydra.overrides.hydra = [each.input_line for each in of_hydra]
        with open_dict(cfg.hydra):
            cfg.hydra.job.env_set.update({name: os.environ[name] for name in cfg.hydra.job.env_copy})
        cfg.hydra.runtime.cwd = os.getcwd()
        cfg.hydra.job.override_dirname = get_overrides_dirname(of_task, **cfg.hydra.job.config.override_dirname)
        return cfg


def _stamps(source: ConfigSource) -> tuple[object, ...] | None:
    """The files of a source with their sizes and times of change; None if it is not known which files it has."""
    if source.scheme() == "structured" or source.path == "hydra.conf":
        return ()
    if source.scheme() == "file":
        folders = [source.path]
    elif source.scheme() == "pkg" and (spec := find_spec(source.path)):
        folders = spec.submodule_search_locations or ()
    else:
        return None
    paths = [os.path.join(at, name) for folder in folders for at, _, names in os.walk(folder) for name in names]
    return tuple((path, (stat := os.stat(path)).st_size, stat.st_mtime_ns) for path in sorted(paths))


class _Hydra(internal.Hydra):
    """Hydra with that loader; an error of composing the config is raised at once."""

    def __init__(self, task_name: str, config_loader: ConfigLoader) -> None:
        super().__init__(task_name, Loader(config_loader.get_search_path()))

    def get_mode(self, config_name: str | None, overrides: list[str]) -> RunMode | None:
        return self.compose_config(
            config_name, overrides, RunMode.MULTIRUN, validate_sweep_overrides=False
        ).hydra.mode  # fmt: skip


def run(command: str, job: Callable[[Any], None]) -> None:
    """Run a command, of which the arguments are those of the process, by `hydra.main`.

    Args:
        command: name of the primary config.
        job: takes the config. What it raises passes, and so does an error of composing the config.
    """
    internal.Hydra = _Hydra  # where `hydra.main` finds it
    hydra.main(version_base="1.3", config_path=conf_dir(), config_name=command)(job)()
