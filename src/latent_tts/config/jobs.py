"""Jobs and sweeps as `hydra.main` runs them, but files are read once, and composed once per choice of options."""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl, get_overrides_dirname
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobRuntime
from hydra.errors import ConfigCompositionException
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict

from latent_tts.config.reference import conf_dir

MAX_COMPOSED = 256  # of 20 KB each
MAX_READ = 16  # states of the config folders
Stamps = tuple[tuple[str, int, int], ...]
_composed: dict[tuple[Any, ...], bytes] = {}
_read: dict[tuple[Stamps, ...], dict[str, bytes]] = {}


class _Repository(ConfigRepository):
    """Reads a config file only if a file changed: most of the time that composing takes goes into YAML."""

    read: dict[str, bytes] | None = None  # what was read of these files; None to read all anew

    def load_config(self, config_path: str) -> ConfigResult | None:
        if self.read is None:
            return super().load_config(config_path)
        if config_path not in self.read:
            found = super().load_config(config_path)
            try:
                self.read[config_path] = pickle.dumps(found)
            except pickle.PicklingError:  # Hydra imports the plugins of launchers twice, so their classes are not found
                return found
        return pickle.loads(self.read[config_path])

    def initialize_sources(self, config_search_path: ConfigSearchPath) -> None:
        super().initialize_sources(config_search_path)
        self.read = None  # which is of other sources

    def __deepcopy__(self, memo: Any) -> _Repository:
        return copy.copy(self)  # Hydra copies it for each config, and at most replaces the sources


class Loader(ConfigLoaderImpl):
    """Composes files only if the chosen options or a file changed; then applies the values, as Hydra does.

    Composing files takes as long as a small run, and the jobs of a sweep often choose the same options.
    """

    def __init__(self, config_search_path: ConfigSearchPath) -> None:
        super().__init__(config_search_path)
        self.repository = _Repository(config_search_path)

    def _load_configuration_impl(
        self, config_name: str | None, overrides: list[str], run_mode: RunMode, *arguments: Any, **more: Any
    ) -> DictConfig:
        parsed = OverridesParser.create().parse_overrides(overrides)
        options = [each for each in parsed if self._is_option(each)]
        stamps = [_stamps(source) for source in self.get_sources()]
        files = tuple(each for each in stamps if each is not None)
        alters_search = any(each.is_sweep_override() or each.key_or_group == "hydra.searchpath" for each in parsed)
        compose = super()._load_configuration_impl
        if len(files) < len(stamps) or alters_search:
            self.repository.read = None
            return compose(config_name, overrides, run_mode, *arguments, **more)
        if files not in _read and len(_read) >= MAX_READ:
            _read.clear()
        self.repository.read = _read.setdefault(files, {})
        chosen = [str(each.input_line) for each in options]
        key = (config_name, run_mode, JobRuntime().get("name"), version.getbase(), files, tuple(chosen))
        if key not in _composed:
            composed = compose(config_name, chosen, run_mode, *arguments, **more)
            try:
                content = pickle.dumps(composed)
            except pickle.PicklingError:  # as above
                return compose(config_name, overrides, run_mode, *arguments, **more)
            while len(_composed) >= MAX_COMPOSED:
                _composed.pop(next(iter(_composed)))
            _composed[key] = content
        cfg = pickle.loads(_composed[key])  # five times as fast as a deep copy
        self._apply_overrides_to_config([each for each in parsed if each not in options], cfg)
        own = [each for each in parsed if not each.is_hydra_override()]
        cfg.hydra.overrides.task = [each.input_line for each in own]
        cfg.hydra.overrides.hydra = [each.input_line for each in parsed if each.is_hydra_override()]
        with open_dict(cfg.hydra):
            cfg.hydra.job.env_set.update({name: os.environ[name] for name in cfg.hydra.job.env_copy})
        cfg.hydra.runtime.cwd = os.getcwd()
        cfg.hydra.job.override_dirname = get_overrides_dirname(own, **cfg.hydra.job.config.override_dirname)
        return cfg

    def _is_option(self, override: Override) -> bool:
        if override.is_sweep_override():
            return False
        return self.repository.group_exists(override.key_or_group) and not isinstance(override.value(), dict)


def _stamps(source: ConfigSource) -> Stamps | None:
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


class _IsSweep(Exception):
    """The config says that it is of a sweep."""


class _Hydra(Hydra):
    def compose_config(
        self, config_name: str | None, overrides: list[str], run_mode: RunMode, *arguments: Any, **more: Any
    ) -> DictConfig:
        try:
            cfg = super().compose_config(config_name, overrides, run_mode, *arguments, **more)
        except ConfigCompositionException as error:
            if str(error).startswith("Ambiguous value") and self.get_mode(config_name, overrides) == RunMode.MULTIRUN:
                raise _IsSweep from error
            raise
        if run_mode == RunMode.RUN and cfg.hydra.mode == RunMode.MULTIRUN:
            raise _IsSweep
        return cfg


def run(command: str, job: Callable[[DictConfig], None], arguments: Sequence[str]) -> bool:
    """Run a job or a sweep as `hydra.main` does, which composes its config twice: first only to read `hydra.mode`.

    Args:
        command: name of the primary config.
        job: takes the config. What it raises passes, and so does an error of composing the config.
        arguments: of the command line; `-m` is the first.

    Returns:
        Whether it ran. False where `hydra.main` has to: for other flags, and for `-m` beside `hydra.mode`.
    """
    flagged = arguments[:1] in (["-m"], ["--multirun"])
    overrides = list(arguments[1:] if flagged else arguments)
    if any(each.startswith("-") or (flagged and each.startswith("hydra.mode")) for each in overrides):
        return False
    version.setbase("1.3")
    hydra = _Hydra(command, Loader(create_config_search_path(conf_dir())))
    GlobalHydra.instance().initialize(hydra)
    try:
        if flagged:
            hydra.multirun(command, job, [*overrides, "hydra.mode=MULTIRUN"])
        else:
            try:
                hydra.run(command, job, overrides)
            except _IsSweep:
                hydra.multirun(command, job, overrides)
    finally:
        GlobalHydra.instance().clear()
    return True
