"""`ltts replay RUN`: apply a budget to the rollouts that a run has; nothing is drawn."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from latent_tts.config.build import in_sweep, output_dir
from latent_tts.config.recorded import finish_sweep as finish_sweep  # hydra_plugins/tolerant_sweeper.py calls it
from latent_tts.config.recorded import recorded_run
from latent_tts.config.requests import run_request
from latent_tts.errors import require
from latent_tts.pipeline import replaying, rescoring
from latent_tts.pipeline.running import replacing_run
from latent_tts.pipeline.spec import check_run
from latent_tts.results import report
from latent_tts.results.files import locked_folder
from latent_tts.results.run_folder import METRICS


def main(cfg: DictConfig) -> None:
    """Apply `cfg.budget` to the rollouts of `cfg.run` and write a run folder of its own.

    Raises:
        UsageError: no complete run there, or the budget cannot be applied to it.
    """
    started, source = time.perf_counter(), Path(cfg.run).expanduser()
    record = rescoring.read_record(source)
    if cfg.scorer.range is not None:
        record["settings"]["scorer.range"] = list(cfg.scorer.range)
    of_run = record["config"]["n"]
    require("n", cfg.n, cfg.n is None or 1 <= cfg.n <= of_run, f"must be 1 to {of_run}, which the run has, or null")
    spec = check_run(run_request(merged_config(cfg, record)))
    replaying.check_spec(spec, source, record)
    folder = output_dir()
    with locked_folder(folder, "hydra.run.dir"), replacing_run(folder):
        tables = replaying.replay(spec, source, record)
        replaying.write_folder(folder, spec, tables, record, source, time.perf_counter() - started)
    if not in_sweep():
        report.print_metrics(tables.metrics)
        print(folder / METRICS)


def merged_config(cfg: DictConfig, record: dict[str, Any]) -> DictConfig:
    """The run's config with this command's budget, n and range of scores in it."""
    merged = recorded_run(record, cfg, own=["budget"])
    merged.n = cfg.n or merged.n
    if cfg.scorer.range is not None:
        merged.scorer.range = list(cfg.scorer.range)
    return merged
