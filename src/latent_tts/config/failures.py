"""The error of a command's only job, kept for the dispatcher to print: Hydra would print lines of its own before."""

from __future__ import annotations

from typing import Any, ClassVar

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig


class Failures(Callback):
    """Hydra notifies the callbacks of a config in reverse order, so others still see the job as failed.

    Attributes:
        kept: the errors of jobs outside of sweeps.
    """

    kept: ClassVar[list[Exception]] = []

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Take the error."""
        del config, kwargs
        if job_return.status is JobStatus.FAILED and HydraConfig.get().mode == RunMode.RUN:
            self.kept.append(job_return._return_value)
            job_return.status, job_return.return_value = JobStatus.COMPLETED, None
