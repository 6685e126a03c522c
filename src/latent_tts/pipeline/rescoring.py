"""The rollouts of a completed run, to be scored by another scorer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from latent_tts.errors import RunError, UsageError, bad_value
from latent_tts.pipeline.keys import rollout_key
from latent_tts.pipeline.rollouts import CachedRollouts, RunRollouts, about, entries, gather_rollouts
from latent_tts.pipeline.scores import open_scores, reduce_scores, score_positions
from latent_tts.pipeline.spec import RunSpec
from latent_tts.results.cache import MEASURED, SCORE_FIELDS, RolloutCache
from latent_tts.results.parts import GatheredRows
from latent_tts.results.run_folder import LATENTS, RUN_JSON, KeptLatents, is_complete, read_run_json
from latent_tts.results.run_folder import (
    read_rollouts as read_rollout_table,
)
from latent_tts.types import COMPUTATIONS, Computation

if TYPE_CHECKING:
    import torch

    from latent_tts.engine.packing import RolloutJob

NEEDED = {
    **dict.fromkeys(("config.model", "config.task", "config.sampler", "config.search", "config.budget"), dict),
    **dict.fromkeys(("config.answer", "config.engine", "config.paths", "settings"), dict),
    **dict.fromkeys(("config.answer.decode", "config.paths.cache", "checkpoint_digest"), str),
}


def read_run(source: Path) -> dict[str, Any]:
    """The `run.json` of a run folder.

    Raises:
        UsageError: there is none, or it is damaged.
    """
    if not is_complete(source):
        raise bad_value("run", source, f"no {RUN_JSON} there: the folder of a run that completed is wanted")
    return read_run_json(source, NEEDED)


def read_record(source: Path) -> dict[str, Any]:
    """The `run.json` of a run folder whose rollouts can be scored by others.

    Raises:
        UsageError: there is none, it is damaged, or its rollouts cannot be scored.
    """
    record = read_run(source)
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
    if spec.budget.adaptive:
        raise bad_value("run", source, f"its rollouts are those that budget={spec.budget.name} asked for, one by one")
    if spec.scorer is None:
        raise bad_value(
            "scorer", "auto", "the model's own was trained for other weights; name one, as in scorer.checkpoint=FOLDER"
        )
    check_weights(spec, source, record)


def check_weights(spec: RunSpec, source: Path, record: Mapping[str, Any]) -> None:
    """Check that the checkpoint is the one that a run was drawn from.

    Raises:
        UsageError: it has changed since.
    """
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
        UsageError: neither has them.
        RunError: the questions are not those of the run, or a failure while scoring.
    """
    wanted = spec.wanted()
    if any(CachedRollouts.read(spec, cache, wanted, scored=False).complete for cache in entries(spec)):
        return gather_rollouts(spec, rollout_key, wanted)
    if not (source / LATENTS).is_file():
        raise bad_value(
            "run", source,
            f"its rollouts are not in the cache {spec.cache}, nor their latents in {LATENTS}\n"
            "the run's own command draws them again; with keep_latents=true they stay in the run folder",
        )  # fmt: skip
    kept = read_rollout_table(source)
    ids = [question.id for question in spec.questions for _ in range(spec.n)]
    if list(kept["question_id"]) != ids:
        raise RunError(f"run={source}: its questions are not those of its task any more")
    # what was measured when they were drawn is not kept beside the tables
    found = kept.assign(row_key=wanted["row_key"], **dict.fromkeys(MEASURED, np.nan))
    way = next((each for each in COMPUTATIONS if each.way.items() <= record.items()), Computation())
    cache = RolloutCache(spec.cache, rollout_key(spec, way), about(spec))
    return _score_kept(spec, cache, found, KeptLatents(source, len(kept)))


def _score_kept(spec: RunSpec, cache: RolloutCache, rows: pd.DataFrame, latents: KeptLatents) -> RunRollouts:
    """Rollouts of a run folder, scored from the latents beside them."""
    import torch

    from latent_tts.engine.diversity import DirectionSums
    from latent_tts.pipeline.drawing import score_kept

    n, steps_R = spec.n, rows["latent_steps"].to_numpy()
    first = {spec.row_key(question): place * n for place, question in enumerate(spec.questions)}

    def read_latents(batch: Sequence[RolloutJob]) -> tuple[torch.Tensor, torch.Tensor]:
        begins = [(first[job.row_key] + job.rollouts[0], len(job.rollouts)) for job in batch]
        steps = np.concatenate([steps_R[row : row + count] for row, count in begins])
        return torch.cat([latents.rows(row, count) for row, count in begins]), torch.from_numpy(steps)

    offsets, scores = score_positions(spec, rows), GatheredRows(spec.wanted(), SCORE_FIELDS)
    score_cache = open_scores(spec, cache.folder)
    score_cache.gather(scores)
    lacking = scores.missing()
    if len(lacking):
        score_kept(spec, score_cache, lacking, offsets, read_latents)
        score_cache.gather(scores)
    compared = [DirectionSums().add([key], latents.rows(row, n)).numpy() for key, row in first.items()]
    beyond_RT = np.arange(spec.adapter.latents) >= steps_R[:, None]
    dissimilarity_RT = np.where(beyond_RT, np.float32(np.nan), np.concatenate(compared))
    return RunRollouts(rows, dissimilarity_RT, reduce_scores(spec, scores, offsets, len(lacking)), cache, drawn_now=0)
