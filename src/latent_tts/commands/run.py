"""`ltts run`: draw rollouts, score them, pick answers, write tables and the scaling curve."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from omegaconf import DictConfig

from latent_tts import config, plot, report, store
from latent_tts.commands import drawing, scoring, seeds, tables, winners
from latent_tts.commands.identity import beams_key, cache_key, changed_settings, run_columns
from latent_tts.commands.prepared import Prepared, prepare

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
        store.write_latents(folder, found.latents)
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


@dataclass
class Gathered:
    """The rollouts of a run.

    Attributes:
        rows: as the cache has them.
        table: the same as `rollouts.parquet` has them, without scores.
        latents: of each rollout, (steps, D).
        scores: None without a scorer.
        folder: of the cache.
        drawn_now: how many were not in the cache yet.
    """

    rows: pd.DataFrame
    table: pd.DataFrame
    latents: list[np.ndarray]
    scores: scoring.Scores | None
    folder: Path
    drawn_now: int


def gather(cfg: DictConfig, prepared: Prepared) -> Gathered:
    """Draw and score what the cache has not got yet, then read all.

    Raises:
        RunError: a failure while drawing or scoring; what was computed stays in the cache.
    """
    wanted, scorer = prepared.wanted(), prepared.scorer
    root = Path(cfg.paths.cache).expanduser()
    if prepared.search.survivors is None or scorer is None:
        cache = store.RolloutCache(root, cache_key(cfg, prepared))
        drawn_now = drawing.draw_missing(cfg, prepared, cache, wanted)
    else:
        cache = store.RolloutCache(root, beams_key(cfg, prepared, scorer))
        drawn_now = drawing.search_missing(cfg, prepared, cache, wanted)
    rows = cache.read(wanted)
    table = tables.rollout_table(prepared, rows)
    latents = store.unpack_latents(rows["latents"], prepared.shape.width)
    scores = None
    if scorer is not None:
        scores = scoring.score(cfg, prepared, scorer, cache.folder, list(table["answer_text"]), latents)
    return Gathered(rows, table, latents, scores, cache.folder, drawn_now)


def _run_winners(cfg: DictConfig, prepared: Prepared, started: float) -> None:
    """The same with `answer.decode=winners`."""
    folder, settings = config.output_dir(), changed_settings(cfg)
    drawn = winners.draw(cfg, prepared)
    latents = store.unpack_latents(drawn.rows["latents"], prepared.shape.width)
    rollouts = tables.rollout_table(prepared, drawn.rows)
    table = tables.write_winner_tables(folder, prepared, rollouts, latents, drawn, run_columns(cfg, prepared, settings))
    if cfg.keep_latents:
        store.write_latents(folder, latents)
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
    joined, left_out, means = seeds.write_joined(folder / store.METRICS, jobs)
    for path in left_out:
        log.warning("%s did not complete: it is not in the joined table", path)
    if joined.empty:
        return
    table = store.read_metrics(means or folder / store.METRICS)
    if means is not None:
        report.print_metrics(table[table["seeds"] > 1])
        print(means)
    if table["n"].nunique() > 1:
        plot.scaling_curve(table, folder / tables.FIGURE)
        print(folder / tables.FIGURE)
    print(folder / store.METRICS)
