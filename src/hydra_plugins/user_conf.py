"""The user's own options, of any group, in the user's config folder: `engine/tuned.yaml` is what `ltts tune` writes."""

from __future__ import annotations

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

from latent_tts.config.build import user_conf_dir


class UserConf(SearchPathPlugin):
    """Puts that folder behind the project's own, whose options therefore win."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Add it if it is there."""
        folder = user_conf_dir()
        if folder is not None and folder.is_dir():
            search_path.append(provider="user", path=f"file://{folder}")
