"""`ltts run`: draw rollouts, score them, pick answers, write tables and the scaling curve."""

from __future__ import annotations

import logging
import time
from dataclasses import replace

from omegaconf import DictConfig

from latent_tts.config.build import in_sweep, output_dir
from latent_tts.config.recorded import finish_sweep as finish_sweep  # hydra_plugins/tolerant_sweeper.py calls it
from latent_tts.config.requests import changed_settings, run_request
from latent_tts.pipeline.running import complete_run
from latent_tts.pipeline.spec import check_run
from latent_tts.results import report
from latent_tts.results.cache import cache_root
from latent_tts.results.run_folder import METRICS

log = logging.getLogger(__name__)


def main(cfg: DictConfig) -> None:
    """Run one job; print its table and the table's path, unless it is a sweep's, which has one table.

    Raises:
        UsageError: something in the config is wrong; nothing has been loaded.
        RunError: a failure while drawing; what was drawn stays in the cache.
    """
    started, request = time.perf_counter(), run_request(cfg)
    with cache_root(request.cache, cfg.cache) as cache:
        spec = check_run(replace(request, cache=cache))
        done = complete_run(
            output_dir(), spec, changed_settings(cfg),
            started=started, keep_latents=cfg.keep_latents, keep_cache=cfg.cache != "off",
        )  # fmt: skip
    if not in_sweep():
        report.print_metrics(done.tables.metrics)
        for line in done.notes(spec):
            report.print_line(line)
        print(output_dir() / METRICS)
    else:
        for line in done.notes(spec):
            log.info("%s", line)
    if done.verification is not None:
        done.verification.check()


def sweep_overrides(cfg: DictConfig, swept: set[str]) -> list[str]:
    """Overrides for the jobs of a sweep: one over n is a curve by itself, so each job reports its own n alone.

    Args:
        cfg: config of the sweep, with Hydra's part.
        swept: the keys and groups that have several values.
    """
    keys = {override.partition("=")[0] for override in cfg.hydra.overrides.task}
    given = "budget" in keys or cfg.hydra.runtime.choices.budget != "ladder"
    return [] if given or "n" not in swept else ["budget=fixed"]
