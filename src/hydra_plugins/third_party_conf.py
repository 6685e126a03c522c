"""Options of other packages: each entry point in the group `latent_tts.conf` names a package with YAML folders."""

from __future__ import annotations

from importlib.metadata import entry_points

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

GROUP = "latent_tts.conf"


class ThirdPartyConf(SearchPathPlugin):
    """Appends these packages to the search path, after this project's own folder, which therefore wins."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append them in the order of their names."""
        for entry in sorted(entry_points(group=GROUP)):
            search_path.append(provider=entry.name, path=f"pkg://{entry.value}")
