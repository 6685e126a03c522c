"""Options of other packages: each entry point in the group `latent_tts.conf` names a package with YAML folders."""

from __future__ import annotations

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

from latent_tts.config.reference import conf_packages


class ThirdPartyConf(SearchPathPlugin):
    """Appends these packages to the search path, after this project's own folder, which therefore wins."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append them in the order of their names."""
        for entry in conf_packages():
            search_path.append(provider=entry.name, path=f"pkg://{entry.value}")
