"""Sweeps (`-m`): a job that fails, even one whose config cannot be composed, does not stop the others.

Hydra finds plugins only in the namespace package `hydra_plugins`, hence the place of this file.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobStatus
from omegaconf import OmegaConf

from latent_tts.config.error_text import describe, is_refused, say
from latent_tts.errors import JobsFailed


class TolerantSweeper(BasicSweeper):
    """Hydra's basic sweeper, except that each job is composed separately and may fail without the others."""

    def sweep(self, arguments: list[str]) -> Any:
        """Launch every job that can be composed, report the others, and join the results.

        An argument replaces the parameter of the same name in the config's own sweep (`hydra.sweeper.params`).

        Raises:
            JobsFailed: at least one job failed.
        """
        # Hydra imports this file for every command: what only sweeps need is imported here
        from latent_tts.config.build import from_here
        from latent_tts.pipeline.sweep import SweepJob
        from latent_tts.results.report import warnings_once

        assert self.config is not None
        assert self.launcher is not None
        assert self.hydra_context is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        given = {argument.lstrip("+~").partition("=")[0] for argument in arguments}
        own = [param for param in self._parse_config() if param.partition("=")[0] not in given]
        overrides = parser.parse_overrides([*own, *arguments])
        command = importlib.import_module(f"latent_tts.commands.{self.config.hydra.job.name}")
        own_overrides = []
        if hasattr(command, "sweep_overrides"):
            swept = {str(one.key_or_group) for one in overrides if one.is_sweep_override()}
            own_overrides = command.sweep_overrides(self.config, swept)
        if own_overrides:  # folders are named after what the user gave
            names = self.config.hydra.job.config.override_dirname
            excluded = [*names.exclude_keys, *(one.partition("=")[0] for one in own_overrides)]
            own_overrides.append(f"hydra.job.config.override_dirname.exclude_keys=[{','.join(excluded)}]")
        jobs = [[*job, *own_overrides] for job in self.split_arguments(overrides, None)[0]]
        common = set.intersection(*map(set, jobs))

        def name(job: Sequence[str]) -> str:
            own = [override for override in job if override not in common]
            return f"job {' '.join(own)}: " if own else ""

        folder = from_here(Path(self.config.hydra.sweep.dir))
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, folder / "multirun.yaml")
        codes, log_file = [0], folder / f"{self.config.hydra.job.name}.log"

        def report_failure(error: Exception, job: Sequence[str]) -> None:
            codes.append(say(error, name(job)))
            with log_file.open("a") as file:
                file.write(name(job) + "\n".join(describe(error)[0]) + "\n")

        launchable = []
        for job in jobs:
            try:
                self.validate_batch_is_legal([job])
                launchable.append(job)
            except Exception as error:  # any error of composing a job is a failure of that job only
                report_failure(error, job)
        results: Sequence[Any] | None = []
        with warnings_once():
            try:
                results = self.launcher.launch(launchable, initial_job_idx=0) if launchable else []
            except Exception as error:  # a launcher gives up on all jobs if one of their processes was killed
                report_failure(error, [])
                results = None
        finished, configs = [], []
        for job in jobs:
            ran = None
            if job in launchable and results is None:
                cfg = self.hydra_context.config_loader.load_sweep_config(self.config, job)
                cfg.hydra.job.num = launchable.index(job)
                place = folder / str(cfg.hydra.sweep.subdir)
                ran = place if _was_asked(place, list(cfg.hydra.overrides.task)) else None  # else an earlier sweep's
                configs.append(cfg)
            elif job in launchable and results is not None:
                result = results[launchable.index(job)]
                refused = False
                if result.status is JobStatus.FAILED:
                    report_failure(result._return_value, job)
                    refused = is_refused(result._return_value)
                if result.hydra_cfg is not None and not refused:
                    ran = from_here(Path(result.hydra_cfg.hydra.runtime.output_dir))
                    configs.append(result.cfg)
            finished.append(SweepJob([override for override in job if override not in common], ran))
        if hasattr(command, "finish_sweep"):
            command.finish_sweep(folder, finished, configs)
        if max(codes):
            raise JobsFailed(max(codes))
        return results


def _was_asked(folder: Path, overrides: list[str]) -> bool:
    """Whether the job that a folder is of had these overrides."""
    record = folder / ".hydra" / "overrides.yaml"
    return record.is_file() and OmegaConf.load(record) == overrides
