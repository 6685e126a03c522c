"""The rollouts of a completed run, to be scored by another scorer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from latent_tts.errors import RunError, UsageError, bad_value
from latent_tts.pipeline.keys import rollout_key
from latent_tts.pipeline.rollouts import RunRollouts, about, entries, read_rollouts
from latent_tts.pipeline.scores import score_rollouts
from latent_tts.pipeline.spec import RunSpec
from latent_tts.results.cache import MEASURED, RolloutCache
from latent_tts.results.run_folder import (
    LATENTS,
    RUN_JSON,
    is_complete,
    read_latents,
    read_run_json,
)
from latent_tts.results.run_folder import (
    read_rollouts as read_rollout_table,
)
from latent_tts.types import COMPUTATIONS, Computation

NEEDED = {
    **dict.fromkeys(("config.model", "config.task", "config.sampler", "config.search", "config.budget"), dict),
    **dict.fromkeys(("config.answer", "config.engine", "config.paths", "settings"), dict),
    **dict.fromkeys(("config.answer.decode", "config.paths.cache", "checkpoint_digest"), str),
}


def read_record(source: Path) -> dict[str, Any]:
    """The `run.json` of a run folder.

    Raises:
        UsageError: there is none, it is damaged, or its rollouts cannot be scored by others.
    """
    if not is_complete(source):
        raise bad_value("run", source, f"no {RUN_JSON} there: the folder of a run that completed is wanted")
    record = read_run_json(source, NEEDED)
    if record["config"]["answer"]["decode"] == "winners":
        raise bad_value(
            "run", source, "it decoded only its own scorer's winners (answer.decode=winners); others have no answers"
        )
    return record


def check_spec(spec: RunSpec, source: Path, record: Mapping[str, Any]) -> None:
    """Check that a run can be scored as its record says that it was drawn.

    Raises:
        UsageError: there is no scorer for it, its own scorer chose its rollouts, or its checkpoint has changed.
    """
    if spec.search.survivors is not None:
        raise bad_value("run", source, f"its rollouts are those that its own scorer chose (search={spec.search.name})")
    if spec.scorer is None:
        raise bad_value(
            "scorer", "auto", "the model's own was trained for other weights; name one, as in scorer.checkpoint=FOLDER"
        )
    if spec.adapter.digest != record["checkpoint_digest"]:
        raise UsageError(
            f"run={source}: model.checkpoint={spec.adapter.checkpoint} has changed since that run "
            f"({record['checkpoint_digest']} then, {spec.adapter.digest} now)"
        )


def rescore_rollouts(spec: RunSpec, source: Path, record: Mapping[str, Any]) -> RunRollouts:
    """The run's rollouts as the cache or its folder has them, scored.

    Args:
        spec: the run.
        source: its folder.
        record: its `run.json`.

    Raises:
        UsageError: their latents are neither in the cache nor in the run folder.
        RunError: the questions are not those of the run, or a failure while scoring.
    """
    wanted = spec.wanted()
    for cache in entries(spec):
        if set(wanted.itertuples(index=False, name=None)) <= cache.present():
            return read_rollouts(spec, cache, drawn_now=0)
    if not (source / LATENTS).is_file():
        raise bad_value(
            "run", source,
            f"its latents are neither in the cache {spec.cache} nor in {LATENTS}\n"
            "the run's own command draws them again; with keep_latents=true they stay in the run folder",
        )  # fmt: skip
    kept = read_rollout_table(source)
    ids = [question.id for question in spec.questions for _ in range(spec.n)]
    if list(kept["question_id"]) != ids:
        raise RunError(f"run={source}: its questions are not those of its task any more")
    latents = read_latents(source, kept["latent_steps"])
    # what was measured when they were drawn is not kept beside the tables
    rows = kept.assign(row_key=wanted["row_key"], **dict.fromkeys(MEASURED, np.nan))
    way = next((each for each in COMPUTATIONS if each.way.items() <= record.items()), Computation())
    cache = RolloutCache(spec.cache, rollout_key(spec, way), about(spec))
    scores = score_rollouts(spec, cache.folder, rows["answer_ids"], latents)
    return RunRollouts(rows, latents, scores, cache, drawn_now=0)
