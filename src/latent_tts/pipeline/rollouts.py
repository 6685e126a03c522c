"""The rollouts of a run: drawn and scored where the cache lacks them, then read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from omegaconf import DictConfig

from latent_tts.pipeline import drawing, scoring, tables
from latent_tts.pipeline.keys import beams_key, cache_key
from latent_tts.pipeline.spec import Prepared
from latent_tts.results.cache import RolloutCache, unpack_latents


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
        cache = RolloutCache(root, cache_key(cfg, prepared))
        drawn_now = drawing.draw_missing(cfg, prepared, cache, wanted)
    else:
        cache = RolloutCache(root, beams_key(cfg, prepared, scorer))
        drawn_now = drawing.search_missing(cfg, prepared, cache, wanted)
    rows = cache.read(wanted)
    table = tables.rollout_table(prepared, rows)
    latents = unpack_latents(rows["latents"], prepared.shape.width)
    scores = None
    if scorer is not None:
        scores = scoring.score(cfg, prepared, scorer, cache.folder, list(table["answer_text"]), latents)
    return Gathered(rows, table, latents, scores, cache.folder, drawn_now)
