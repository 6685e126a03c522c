"""The user's own options, in the user's config folder; `ltts tune` writes `engine/tuned.yaml` there."""

from __future__ import annotations

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

from latent_tts.config.reference import user_conf_dir


class UserConf(SearchPathPlugin):
    """Appends that folder to the search path, after this project's own folder, which therefore wins."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append it if it exists."""
        folder = user_conf_dir()
        if folder is not None and folder.is_dir():
            search_path.append(provider="user", path=f"file://{folder}")
