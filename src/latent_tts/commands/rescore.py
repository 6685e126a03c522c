"""`ltts rescore RUN`: score the rollouts that a run kept with another scorer; none is drawn again."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from latent_tts.config.build import in_sweep, output_dir
from latent_tts.config.recorded import finish_sweep as finish_sweep  # hydra_plugins/tolerant_sweeper.py calls it
from latent_tts.config.recorded import recorded_run
from latent_tts.config.requests import changed_settings, run_request
from latent_tts.errors import bad_value, check_fields
from latent_tts.pipeline import rescoring
from latent_tts.pipeline.running import replacing_run, write_run_folder
from latent_tts.pipeline.scores import own_step_scores
from latent_tts.pipeline.spec import check_run
from latent_tts.pipeline.tables import make_tables
from latent_tts.results import report
from latent_tts.results.files import locked_folder
from latent_tts.results.run_folder import METRICS, write_scores
from latent_tts.scorer.none import NoScorer

SCORING_KEYS = ("scorer.", "aggregator.")


def main(cfg: DictConfig) -> None:
    """Score the rollouts of `cfg.run` and write a run folder of their own for them.

    Raises:
        UsageError: no complete run there, the cache lacks its rollouts, or there is no scorer.
        RunError: a failure while scoring; what was scored stays in the cache.
    """
    started = time.perf_counter()
    source = Path(cfg.run).expanduser()
    record = rescoring.read_record(source)
    check_fields("engine", cfg.engine, rows="a positive integer, or null")
    request = run_request(merged_config(cfg, record))
    if isinstance(request.scorer, NoScorer):
        raise bad_value(
            "scorer", "auto" if request.scorer.reason else "none",
            f"{request.scorer.reason or 'nothing to do'}; name one, as in scorer=latent_rm "
            "scorer.checkpoint=FOLDER_OR_HUB_ID",
        )  # fmt: skip
    spec = check_run(replace(request, keep_steps=True))
    rescoring.check_spec(spec, source, record)
    folder, own = output_dir(), changed_settings(cfg)
    kept = {key: value for key, value in record["settings"].items() if not key.startswith(SCORING_KEYS)}
    settings = kept | {key: value for key, value in own.items() if key.startswith(SCORING_KEYS)}
    with locked_folder(folder, "hydra.run.dir"), replacing_run(folder):
        rollouts = rescoring.rescore_rollouts(spec, source)
        tables = make_tables(spec, rollouts, settings)
        assert rollouts.scores is not None
        assert rollouts.scores.step_scores_RT is not None
        write_scores(folder, tables.rollouts, own_step_scores(rollouts.scores.step_scores_RT))
        write_run_folder(
            folder, spec, rollouts, tables, settings, started, rescored=str(source),
            cache=str(rollouts.cache.folder.resolve()),
        )  # fmt: skip
    if not in_sweep():
        report.print_metrics(tables.metrics)
        print(folder / METRICS)


def merged_config(cfg: DictConfig, record: dict[str, Any]) -> DictConfig:
    """The run's config with this command's scorer, aggregators, device, rows and cache in it."""
    merged = recorded_run(record, cfg, own=["scorer", "aggregator"])
    merged.paths.cache = cfg.paths.cache or merged.paths.cache
    return merged
