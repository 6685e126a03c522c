"""A lock on the folder of a command before Hydra writes its record there."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar, cast

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from latent_tts.config.failures import Failures
from latent_tts.errors import UsageError
from latent_tts.results.files import locked_folder


class FolderLock(Callback):
    """Holds the folder of a run, or of a sweep, until `held` is closed.

    A refusal ends the process by SystemExit, since Hydra goes on after any other error of a callback; the reason is in
    `Failures.kept`.
    """

    held: ClassVar[ExitStack] = ExitStack()

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Hold the run folder."""
        self._hold(config, "hydra.run.dir")

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Hold the folder of the sweep."""
        self._hold(config, "hydra.sweep.dir")

    def _hold(self, config: DictConfig, key: str) -> None:
        HydraConfig.instance().cfg = cast(Any, config)  # for what the name interpolates; the job sets a copy
        try:
            self.held.enter_context(locked_folder(Path(OmegaConf.select(config, key)), key))
        except UsageError as error:
            Failures.kept.append(error)
            raise SystemExit(error.exit_code) from error
