"""`ltts run`: draw rollouts, score them, pick answers, write tables and the scaling curve."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from omegaconf import DictConfig

from latent_tts.config.build import in_sweep, output_dir
from latent_tts.config.recorded import aggregator_builder
from latent_tts.config.requests import changed_settings, run_request
from latent_tts.pipeline import sweep
from latent_tts.pipeline.rollouts import draw_rollouts
from latent_tts.pipeline.run_output import clear_run_folder, write_run_folder
from latent_tts.pipeline.spec import check_run
from latent_tts.pipeline.tables import make_tables, schedule_lines
from latent_tts.pipeline.verification import verify
from latent_tts.results import report
from latent_tts.results.cache import cache_root
from latent_tts.results.files import locked_folder
from latent_tts.results.run_folder import LATENTS, METRICS


def main(cfg: DictConfig) -> None:
    """Run one job; print its table and the table's path, unless it is a sweep's, which has one table.

    Raises:
        UsageError: something in the config is wrong; nothing has been loaded.
        RunError: a failure while drawing; what was drawn stays in the cache.
    """
    started, request = time.perf_counter(), run_request(cfg)
    with cache_root(request.cache, cfg.cache) as cache:
        spec = check_run(replace(request, cache=cache))
        folder, settings = output_dir(), changed_settings(cfg)
        with locked_folder(folder, "hydra.run.dir"):
            clear_run_folder(folder)
            compared = spec.schedule.verified
            rollouts = draw_rollouts(spec, folder / LATENTS if cfg.keep_latents or compared else None)
            tables = make_tables(spec, rollouts, settings)
            verification = verify(spec, rollouts, folder) if compared else None
            if not cfg.keep_latents:
                (folder / LATENTS).unlink(missing_ok=True)
            seconds = time.perf_counter() - started
            kept = {} if cfg.cache == "off" else {"cache": str(rollouts.cache.folder.resolve())}
            write_run_folder(
                folder, spec, rollouts, tables, settings, seconds=seconds, verification=verification, **kept
            )
    if not in_sweep():
        report.print_metrics(tables.metrics)
        for line in schedule_lines(spec, tables.rollouts) + ([] if verification is None else verification.lines):
            report.print_line(line)
        print(folder / METRICS)
    if verification is not None:
        verification.check()


def sweep_overrides(cfg: DictConfig, swept: set[str]) -> list[str]:
    """Overrides for the jobs of a sweep: one over n is a curve by itself, so each job reports its own n alone.

    Args:
        cfg: config of the sweep, with Hydra's part.
        swept: the keys and groups that have several values.
    """
    keys = {override.partition("=")[0] for override in cfg.hydra.overrides.task}
    given = "budget" in keys or cfg.hydra.runtime.choices.budget != "ladder"
    return [] if given or "n" not in swept else ["budget=fixed"]


def finish_sweep(folder: Path, jobs: Sequence[sweep.SweepJob], configs: Sequence[DictConfig]) -> None:
    """Join the tables of a sweep's jobs, which ran with these configs, and print what was written."""
    sweep.finish(folder, jobs, aggregator_builder(*configs))
