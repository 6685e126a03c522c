"""`ltts rescore RUN`: score the rollouts that a run kept with another scorer; none is drawn again."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from omegaconf import DictConfig, OmegaConf

from latent_tts.commands import run
from latent_tts.config import build as config
from latent_tts.errors import RunError, UsageError, bad_value
from latent_tts.pipeline import scoring, tables
from latent_tts.pipeline.keys import cache_key, changed_settings, run_columns
from latent_tts.pipeline.spec import Prepared, prepare
from latent_tts.results.cache import MEASURED, RolloutCache, unpack_latents
from latent_tts.results.run_folder import (
    LATENTS,
    RUN_JSON,
    is_complete,
    read_latents,
    read_rollouts,
    read_run_json,
    write_scores,
)
from latent_tts.scorer.none import NoScorer

log = logging.getLogger(__name__)
finish_sweep = run.finish_sweep
OF_SCORING = ("scorer.", "aggregator.")
NEEDED = {
    **dict.fromkeys(("config.model", "config.task", "config.sampler", "config.search", "config.budget"), dict),
    **dict.fromkeys(("config.answer", "config.engine", "config.paths", "settings"), dict),
    **dict.fromkeys(("config.answer.decode", "cache", "checkpoint_digest"), str),
}


def main(cfg: DictConfig) -> None:
    """Score the rollouts of `cfg.run` and write a run folder of their own for them.

    Raises:
        UsageError: no complete run there, its latents were not kept, or there is no scorer.
        RunError: a failure while scoring; what was scored stays in the cache.
    """
    started = time.perf_counter()
    source = Path(cfg.run).expanduser()
    record = _record(source)
    own_rows = cfg.engine.rows
    config.require("engine.rows", own_rows, own_rows is None or own_rows >= 1, "1 or more, or null")
    merged = _merged(cfg, record)
    built = config.build("scorer", merged.scorer)
    if isinstance(built, NoScorer):
        raise bad_value(
            "scorer", "auto" if built.reason else "none",
            f"{built.reason or 'nothing to do'}; name one, as in scorer=latent_rm scorer.checkpoint=FOLDER_OR_HUB_ID",
        )  # fmt: skip
    prepared = prepare(merged)
    if prepared.scorer is None:
        raise bad_value(
            "scorer", "auto", "the model's own was trained for other weights; name one, as in scorer.checkpoint=FOLDER"
        )
    if prepared.adapter.digest != record["checkpoint_digest"]:
        raise UsageError(
            f"run={source}: model.checkpoint={prepared.adapter.checkpoint} has changed since that run "
            f"({record['checkpoint_digest']} then, {prepared.adapter.digest} now)"
        )
    rows, latents, folder = _kept(source, merged, prepared)
    rollouts = tables.rollout_table(prepared, rows)
    scores = scoring.score(merged, prepared, prepared.scorer, folder, list(rollouts["answer_text"]), latents)
    settings = {k: v for k, v in record["settings"].items() if not k.startswith(OF_SCORING)}
    settings |= {k: v for k, v in changed_settings(cfg).items() if k.startswith(OF_SCORING)}
    output = config.output_dir()
    tables.clear(output)
    table = tables.write_tables(output, prepared, rollouts, latents, scores, run_columns(merged, prepared, settings))
    write_scores(output, rollouts, scores.rows["step_scores"].tolist())
    new_record = {
        "cache": str(folder.resolve()),
        "settings": settings,
        "rescored": str(source),
        "rollouts": {"total": len(rows), "drawn_now": 0, "scored_now": scores.scored_now},
        "seconds": {"scoring": float(scores.rows["seconds"].sum()), "this_command": time.perf_counter() - started},
    }
    tables.finish(output, merged, prepared, table, new_record)


def _record(source: Path) -> dict[str, Any]:
    """The `run.json` of a run folder.

    Raises:
        UsageError: there is none, it is damaged, or its rollouts are not to be scored by others.
    """
    if not is_complete(source):
        raise bad_value("run", source, f"no {RUN_JSON} there: the folder of a run that completed is wanted")
    record = read_run_json(source, NEEDED)
    if record["config"]["answer"]["decode"] == "winners":
        raise bad_value(
            "run", source, "it decoded its own scorer's winners alone (answer.decode=winners); others have no answers"
        )
    if record["config"]["search"].get("beams"):
        raise bad_value("run", source, "its rollouts are the beams that its own scorer chose (search=beam)")
    return record


def _merged(cfg: DictConfig, record: dict[str, Any]) -> DictConfig:
    """The run's config with this command's scorer, aggregators, device, rows and cache in it."""
    merged = config.node(record["config"])
    OmegaConf.set_struct(merged, False)
    for key in ("scorer", "aggregator"):
        # unresolved, so that `${model...}` finds the run's model
        merged[key] = OmegaConf.create(OmegaConf.to_container(cfg[key], resolve=False))
    # a run of before there were answer sampling, forced beginnings and schedules says nothing about them
    merged.answer = OmegaConf.merge({"temperature": 0.0, "top_p": 1.0, "forced_prefix": ""}, merged.answer)
    merged.schedule = merged.get("schedule", {"_target_": "latent_tts.schedule.sequential.Sequential"})
    # nor one of before there was quantisation
    merged.engine = OmegaConf.merge({"quantize": None}, merged.engine)
    merged.engine.device, merged.engine.rows = cfg.engine.device, cfg.engine.rows
    merged.paths.cache = cfg.paths.cache or str(Path(record["cache"]).parent)
    return merged


def _kept(source: Path, cfg: DictConfig, prepared: Prepared) -> tuple[pd.DataFrame, list[np.ndarray], Path]:
    """The run's rows as the cache has them, their latents, and the cache folder.

    Raises:
        UsageError: the latents are neither in the cache nor in the run folder.
    """
    cache = RolloutCache(Path(cfg.paths.cache).expanduser(), cache_key(cfg, prepared))
    wanted = prepared.wanted()
    if set(wanted.itertuples(index=False, name=None)) <= cache.present():
        rows = cache.read(wanted)
        return rows, unpack_latents(rows["latents"], prepared.shape.width), cache.folder
    if not (source / LATENTS).is_file():
        raise bad_value(
            "run", source,
            f"its latents are neither in the cache {cache.folder} nor in {LATENTS}\n"
            "the run's own command draws them again; with keep_latents=true they stay in the run folder",
        )  # fmt: skip
    kept = read_rollouts(source)
    ids = [question.id for question in prepared.questions for _ in range(prepared.n)]
    if list(kept["question_id"]) != ids:
        raise RunError(f"run={source}: its questions are not those of its task any more")
    latents = read_latents(source, kept["latent_steps"])
    # what was measured when they were drawn is not kept beside the tables
    rows = kept.assign(row_key=wanted["row_key"], **dict.fromkeys(MEASURED, np.nan))
    return rows, latents, cache.folder
