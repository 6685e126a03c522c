"""Options of other packages: each entry point of the group `latent_tts.conf` names a package with YAML folders."""

from __future__ import annotations

from importlib.metadata import entry_points

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

GROUP = "latent_tts.conf"


class ThirdPartyConf(SearchPathPlugin):
    """Puts those packages behind the project's own folder, whose options therefore win."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Add them, in the order of their names."""
        for entry in sorted(entry_points(group=GROUP)):
            search_path.append(provider=entry.name, path=f"pkg://{entry.value}")
