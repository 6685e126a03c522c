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


class TolerantSweeper(BasicSweeper):
    """Hydra's basic sweeper, except that each job is composed separately and may fail without the others."""

    def sweep(self, arguments: list[str]) -> Any:
        """Launch every job that can be composed, report the others, and join the results.

        An argument replaces the parameter of the same name in the config's own sweep (`hydra.sweeper.params`).

        Raises:
            SystemExit: at least one job failed; the largest of their exit codes.
        """
        # Hydra imports this file for every command: what only sweeps need is imported here
        from latent_tts.config.build import from_here
        from latent_tts.pipeline.sweep import SweepJob
        from latent_tts.results.report import warnings_once

        assert self.config is not None
        assert self.launcher is not None
        command = importlib.import_module(f"latent_tts.commands.{self.config.hydra.job.name}")
        jobs = self._jobs(arguments, command)
        common = set.intersection(*map(set, jobs))

        def own(job: Sequence[str]) -> list[str]:
            return [override for override in job if override not in common]

        folder = from_here(Path(self.config.hydra.sweep.dir))
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, folder / "multirun.yaml")
        codes, log_file = [0], folder / f"{self.config.hydra.job.name}.log"

        def report_failure(error: Exception, job: Sequence[str]) -> None:
            name = f"job {' '.join(own(job))}: " if own(job) else ""
            codes.append(say(error, name))
            with log_file.open("a") as file:
                file.write(name + "\n".join(describe(error)[0]) + "\n")

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
            cfg = ran = None
            if job in launchable and results is None:
                cfg, ran = self._find_job(job, launchable.index(job), folder)
            elif job in launchable and results is not None:
                result = results[launchable.index(job)]
                if result.status is JobStatus.FAILED:
                    report_failure(result._return_value, job)
                refused = result.status is JobStatus.FAILED and is_refused(result._return_value)
                if result.hydra_cfg is not None and not refused:
                    cfg, ran = result.cfg, from_here(Path(result.hydra_cfg.hydra.runtime.output_dir))
            if cfg is not None:
                configs.append(cfg)
            finished.append(SweepJob(own(job), ran))
        if hasattr(command, "finish_sweep"):
            command.finish_sweep(folder, finished, configs)
        if max(codes):
            raise SystemExit(max(codes))
        return results

    def _jobs(self, arguments: Sequence[str], command: Any) -> list[list[str]]:
        """The overrides of each job: the user's, and those that the command has for sweeps."""
        assert self.config is not None
        assert self.hydra_context is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        given = {argument.lstrip("+~").partition("=")[0] for argument in arguments}
        own = [param for param in self._parse_config() if param.partition("=")[0] not in given]
        overrides = parser.parse_overrides([*own, *arguments])
        more = []
        if hasattr(command, "sweep_overrides"):
            swept = {str(one.key_or_group) for one in overrides if one.is_sweep_override()}
            more = command.sweep_overrides(self.config, swept)
        if more:  # folders are named after what the user gave
            names = self.config.hydra.job.config.override_dirname
            excluded = [*names.exclude_keys, *(one.partition("=")[0] for one in more)]
            more.append(f"hydra.job.config.override_dirname.exclude_keys=[{','.join(excluded)}]")
        return [[*job, *more] for job in self.split_arguments(overrides, None)[0]]

    def _find_job(self, job: list[str], number: int, folder: Path) -> tuple[Any, Path | None]:
        """The config of a job that no launcher tells of, and its folder if it was begun in this sweep."""
        assert self.config is not None
        assert self.hydra_context is not None
        cfg = self.hydra_context.config_loader.load_sweep_config(self.config, job)
        cfg.hydra.job.num = number
        place = folder / str(cfg.hydra.sweep.subdir)
        # else it is of an earlier sweep
        return cfg, place if _was_asked(place, list(cfg.hydra.overrides.task)) else None


def _was_asked(folder: Path, overrides: list[str]) -> bool:
    """Whether the job that a folder is of had these overrides."""
    record = folder / ".hydra" / "overrides.yaml"
    return record.is_file() and OmegaConf.load(record) == overrides
