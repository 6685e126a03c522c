"""`ltts run`: draw rollouts, score them, pick answers, write tables and the scaling curve."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from omegaconf import DictConfig

from latent_tts.config import build as config
from latent_tts.pipeline import seeds, tables, winners
from latent_tts.pipeline.keys import changed_settings, run_columns
from latent_tts.pipeline.rollouts import gather
from latent_tts.pipeline.spec import Prepared, prepare
from latent_tts.results import plot, report
from latent_tts.results.cache import unpack_latents
from latent_tts.results.run_folder import METRICS, read_metrics, write_latents

log = logging.getLogger(__name__)


def main(cfg: DictConfig) -> None:
    """Run one job.

    Raises:
        UsageError: something in the config is wrong; nothing has been loaded.
        RunError: a failure while drawing; what was drawn stays in the cache.
    """
    started = time.perf_counter()
    prepared = prepare(cfg)
    folder, settings = config.output_dir(), changed_settings(cfg)
    tables.clear(folder)
    if cfg.answer.decode == "winners":
        _run_winners(cfg, prepared, started)
        return
    found = gather(cfg, prepared)
    columns = run_columns(cfg, prepared, settings)
    table = tables.write_tables(folder, prepared, found.table, found.latents, found.scores, columns)
    if cfg.keep_latents:
        write_latents(folder, found.latents)
    seconds = {"drawing": float(found.rows["seconds"].sum()), "this_command": time.perf_counter() - started}
    counts = {"total": len(found.rows), "drawn_now": found.drawn_now}
    if found.scores is not None:
        seconds["scoring"] = float(found.scores.rows["seconds"].sum())
        counts["scored_now"] = found.scores.scored_now
    record = {
        "cache": str(found.folder.resolve()),
        "settings": settings,
        "devices": sorted(set(found.rows["device"])),
        "rows": sorted({int(value) for value in found.rows["rows"]}),
        "rollouts": counts,
        "seconds": seconds,
    }
    tables.finish(folder, cfg, prepared, table, record)


def _run_winners(cfg: DictConfig, prepared: Prepared, started: float) -> None:
    """The same with `answer.decode=winners`."""
    folder, settings = config.output_dir(), changed_settings(cfg)
    drawn = winners.draw(cfg, prepared)
    latents = unpack_latents(drawn.rows["latents"], prepared.shape.width)
    rollouts = tables.rollout_table(prepared, drawn.rows)
    table = tables.write_winner_tables(folder, prepared, rollouts, latents, drawn, run_columns(cfg, prepared, settings))
    if cfg.keep_latents:
        write_latents(folder, latents)
    record = {
        "cache": str(drawn.folder.resolve()),
        "settings": settings,
        "devices": sorted(set(drawn.rows["device"])),
        "rows": sorted({int(value) for value in drawn.rows["rows"]}),
        "rollouts": {
            "total": len(rollouts),
            "drawn_now": drawn.drawn_now,
            "scored_now": drawn.scores.scored_now,
            "decoded_now": drawn.decoded_now,
        },
        "seconds": {
            "thinking": float(drawn.rows["seconds"].sum()),
            "scoring": float(drawn.scores.rows["seconds"].sum()),
            "decoding": float(drawn.decoding["seconds"].sum()),
            "this_command": time.perf_counter() - started,
        },
    }
    tables.finish(folder, cfg, prepared, table, record)


def finish_sweep(folder: Path, jobs: list[Path]) -> None:
    """Join the tables of a sweep's jobs, show means over seeds, draw the curves; the joined table's path is last."""
    joined, left_out, means = seeds.write_joined(folder / METRICS, jobs)
    for path in left_out:
        log.warning("%s did not complete: it is not in the joined table", path)
    if joined.empty:
        return
    table = read_metrics(means or folder / METRICS)
    if means is not None:
        report.print_metrics(table[table["seeds"] > 1])
        print(means)
    if table["n"].nunique() > 1:
        plot.scaling_curve(table, folder / tables.FIGURE)
        print(folder / tables.FIGURE)
    print(folder / METRICS)
