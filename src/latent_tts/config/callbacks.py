"""Hydra's callbacks: the error of a command's only job, and the lock on its folder before Hydra writes there."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar, cast

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from latent_tts.errors import UsageError
from latent_tts.results.files import locked_folder


class Failures(Callback):
    """Keeps the error of a command's only job for the dispatcher to print: Hydra would print lines of its own before.

    Hydra notifies the callbacks of a config in reverse order, so others still see the job as failed.

    Attributes:
        kept: the errors of jobs outside of sweeps.
    """

    kept: ClassVar[list[Exception]] = []

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Take the error."""
        if job_return.status is JobStatus.FAILED and HydraConfig.get().mode == RunMode.RUN:
            self.kept.append(job_return._return_value)
            job_return.status, job_return.return_value = JobStatus.COMPLETED, None


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
