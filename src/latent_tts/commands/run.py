"""`ltts run`: draw rollouts, score them, pick answers, write tables and the scaling curve."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import numpy as np
from omegaconf import DictConfig

from latent_tts import config, plot, store
from latent_tts.commands import drawing, scoring, tables, winners
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
    if cfg.answer.decode == "winners":
        _run_winners(cfg, prepared, started)
        return
    wanted = prepared.wanted()
    root = Path(cfg.paths.cache).expanduser()
    if prepared.search.survivors is None or prepared.scorer is None:
        cache = store.RolloutCache(root, cache_key(cfg, prepared))
        drawn_now = drawing.draw_missing(cfg, prepared, cache, wanted)
    else:
        cache = store.RolloutCache(root, beams_key(cfg, prepared, prepared.scorer))
        drawn_now = drawing.search_missing(cfg, prepared, cache, wanted)
    rows = cache.read(wanted)
    latents = store.unpack_latents(rows["latents"], prepared.shape.width)
    rollouts = tables.rollout_table(prepared, rows)
    scores = None
    if prepared.scorer is not None:
        scores = scoring.score(cfg, prepared, prepared.scorer, cache.folder, list(rollouts["answer_text"]), latents)
    table = tables.write_tables(folder, prepared, rollouts, latents, scores, run_columns(cfg, prepared, settings))
    if cfg.keep_latents:
        store.write_latents(folder, latents)
    seconds = {"drawing": float(rows["seconds"].sum()), "this_command": time.perf_counter() - started}
    counts = {"total": len(rows), "drawn_now": drawn_now}
    if scores is not None:
        seconds["scoring"] = float(scores.rows["seconds"].sum())
        counts["scored_now"] = scores.scored_now
    record = {
        "cache": str(cache.folder),
        "settings": settings,
        "devices": sorted(set(rows["device"])),
        "rows": sorted({int(value) for value in rows["rows"]}),
        "rollouts": counts,
        "seconds": seconds,
    }
    tables.finish(folder, cfg, prepared, table, record)


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
        "cache": str(drawn.folder),
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
            "decoding": float(np.nansum(drawn.decoding)),
            "this_command": time.perf_counter() - started,
        },
    }
    tables.finish(folder, cfg, prepared, table, record)


def finish_sweep(folder: Path) -> None:
    """Join the tables of a sweep's jobs, draw their curves, and end with the joined table's path."""
    joined, left_out = store.join_metrics([path.parent for path in sorted(folder.glob("*/.hydra"))])
    for path in left_out:
        log.warning("%s did not complete: it is not in the joined table", path)
    if joined.empty:
        return
    store.write_metrics(folder / store.METRICS, joined)
    if joined["n"].nunique() > 1:
        plot.scaling_curve(store.read_metrics(folder / store.METRICS), folder / tables.FIGURE)
        print(folder / tables.FIGURE)
    print(folder / store.METRICS)
