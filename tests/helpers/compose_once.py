"""Hydra composes the same options of groups once a process.

The suite composes some seven hundred configs out of a hundred and fifty choices of options, and each takes as long as a
small run. Values given on the command line are applied to a copy, by Hydra as ever.
"""

from collections.abc import Callable, Hashable
from copy import copy, deepcopy
from dataclasses import replace
from typing import Any

import pytest
from hydra._internal import config_loader_impl
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository, IConfigRepository
from hydra._internal.core_plugins.structured_config_source import StructuredConfigSource
from hydra._internal.defaults_list import Overrides

from latent_tts.config.build import conf_dir


def install(patch: pytest.MonkeyPatch) -> None:
    """Replace Hydra's slow steps by ones that remember what they gave."""
    create, merge = config_loader_impl.create_defaults_list, ConfigLoaderImpl._compose_config_from_defaults_list
    load = ConfigRepository.load_config
    kept: dict[Hashable, Any] = {}

    def once(repo: IConfigRepository, key: Hashable, make: Callable[[], Any]) -> Any:
        if _has_other_sources(repo):
            return make()
        if key not in kept:
            kept[key] = make()
        return kept[key]

    def create_once(repo, config_name, overrides_list, prepend_hydra, skip_missing):
        values = Overrides(repo, overrides_list).config_overrides
        options = [override for override in overrides_list if not any(override is value for value in values)]
        lines = [str(override.input_line) for override in options]
        skips = skip_missing and any("???" in line for line in lines)
        key = "options", config_name, prepend_hydra, skips, *lines
        made = once(repo, key, lambda: create(repo, config_name, overrides_list, prepend_hydra, skip_missing))
        return replace(made, config_overrides=values)

    def merge_once(self, defaults, repo):
        places = [(default.config_path, default.package, default.is_self, default.primary) for default in defaults]
        return deepcopy(once(repo, ("merged", *places), lambda: merge(self, defaults, repo)))

    def load_once(self, config_path):
        return deepcopy(once(self, ("loaded", config_path), lambda: load(self, config_path)))

    patch.setattr(ConfigRepository, "load_config", load_once)
    # it holds the one store of schemas, whose own answers are copies
    patch.setattr(StructuredConfigSource, "__deepcopy__", lambda self, memo: copy(self), raising=False)
    patch.setattr(config_loader_impl, "create_defaults_list", create_once)
    patch.setattr(ConfigLoaderImpl, "_compose_config_from_defaults_list", merge_once)


def _has_other_sources(repo: IConfigRepository) -> bool:
    """Whether there are configs beside Hydra's, the project's and the schemas; a test may change them."""
    return [source.path for source in repo.get_sources()] != ["hydra.conf", conf_dir(), ""]
