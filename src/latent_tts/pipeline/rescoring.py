"""`ltts rescore`: the rollouts of a completed run, scored by another scorer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from latent_tts.budget import is_adaptive
from latent_tts.errors import RunError, require
from latent_tts.pipeline.keys import rollout_key
from latent_tts.pipeline.rollouts import CachedRollouts, RunRollouts, entries, entry_label, gather_rollouts
from latent_tts.pipeline.scores import cached_scores, reduce_scores, score_positions, settle_scores
from latent_tts.pipeline.spec import RunSpec
from latent_tts.results.cache import MEASURED, RolloutCache
from latent_tts.results.run_folder import LATENTS, RUN_JSON, is_complete, open_latents, read_rollouts, read_run_json
from latent_tts.types import COMPUTATIONS, Computation

if TYPE_CHECKING:
    import torch

    from latent_tts.engine.packing import RolloutJob

NEEDED = {
    **dict.fromkeys(("config.model", "config.task", "config.sampler", "config.search", "config.budget"), dict),
    **dict.fromkeys(("config.answer", "config.engine", "config.paths", "settings", "aggregators"), dict),
    **dict.fromkeys(("config.n", "config.max_answer_tokens"), int),
    **dict.fromkeys(("config.answer.decode", "config.paths.cache", "checkpoint_digest"), str),
}


def read_run(source: Path) -> dict[str, Any]:
    """The `run.json` of a run folder, which has the values `NEEDED`.

    Raises:
        UsageError: there is none, or it is damaged.
    """
    require("run", source, is_complete(source), f"must be the folder of a completed run, which has a {RUN_JSON}")
    return read_run_json(source, NEEDED)


def read_record(source: Path) -> dict[str, Any]:
    """The `run.json` of a run folder whose rollouts another scorer can score.

    Raises:
        UsageError: there is none, it is damaged, or its rollouts cannot be scored by another scorer.
    """
    record = read_run(source)
    require(
        "run",
        source,
        record["config"]["answer"]["decode"] != "winners",
        "it decoded only the picks of its own scorer (answer.decode=winners); others have no answers",
    )
    return record


def check_spec(spec: RunSpec, source: Path, record: Mapping[str, Any]) -> None:
    """Check that a run's rollouts can be scored by another scorer.

    Raises:
        UsageError: a scorer is missing; a search or a budget chose the rollouts; or the checkpoint has changed.
    """
    require("run", source, not spec.guided, f"its own scorer chose its rollouts (search={spec.search.name})")
    require(
        "run",
        source,
        not is_adaptive(spec.budget),
        f"its questions have different numbers of rollouts (budget={spec.budget.name})",
    )
    require(
        "scorer",
        "auto",
        spec.scorer is not None,
        "the model's LatentRM was trained for other weights; choose one: scorer.checkpoint=FOLDER",
    )
    require_same_weights(spec, source, record)


def require_same_weights(spec: RunSpec, source: Path, record: Mapping[str, Any]) -> None:
    """Check that the checkpoint is the one that drew a run.

    Raises:
        UsageError: it has changed since.
    """
    require(
        "run",
        source,
        spec.adapter.identity == record["checkpoint_digest"],
        f"model.checkpoint={spec.adapter.checkpoint} has changed since that run ({record['checkpoint_digest']} then, "
        f"{spec.adapter.identity} now)",
    )


def rescore_rollouts(spec: RunSpec, source: Path, record: Mapping[str, Any]) -> RunRollouts:
    """Score the rollouts of a run, which are read from the cache or from the run's folder.

    Args:
        spec: the run.
        source: its folder.
        record: its `run.json`.

    Raises:
        UsageError: neither has the rollouts.
        RunError: the questions are not those of the run, or scoring failed.
    """
    wanted = spec.wanted()
    if any(CachedRollouts.read(spec, cache, wanted, scored=False).complete for cache in entries(spec)):
        return gather_rollouts(spec, rollout_key, wanted)
    require(
        "run",
        source,
        (source / LATENTS).is_file(),
        f"its rollouts are not in the cache {spec.cache}, and its latents are not in {LATENTS}\n"
        "re-run the run's command to draw them again; keep_latents=true keeps latents in the run folder",
    )
    kept = read_rollouts(source)
    if list(kept["question_id"]) != [question.id for question in spec.questions for _ in range(spec.n)]:
        raise RunError(f"run={source}: the questions of its task have changed since that run")
    # a run folder does not have what was measured when rollouts were drawn
    found = kept.assign(row_key=wanted["row_key"], **dict.fromkeys(MEASURED, np.nan))
    way = next((each for each in COMPUTATIONS if each.way.items() <= record.items()), Computation())
    cache = RolloutCache(spec.cache, rollout_key(spec, way, None), entry_label(spec))
    return _score_kept(spec, cache, found, open_latents(source, len(kept)))


def _score_kept(spec: RunSpec, cache: RolloutCache, rows: pd.DataFrame, latents_RTD: Any) -> RunRollouts:
    """Rollouts of a run folder, scored from the latents beside them."""
    import torch

    from latent_tts.engine.diversity import DirectionSums
    from latent_tts.pipeline.drawing import score_kept
    from latent_tts.pipeline.models import load_scorer_of

    n, steps_R = spec.n, rows["latent_steps"].to_numpy()
    first = {spec.row_key(question): place * n for place, question in enumerate(spec.questions)}

    def read_latents(batch: Sequence[RolloutJob]) -> tuple[torch.Tensor, torch.Tensor]:
        begins = [(first[job.row_key] + job.rollouts[0], len(job.rollouts)) for job in batch]
        steps = np.concatenate([steps_R[row : row + count] for row, count in begins])
        return torch.cat([latents_RTD[row : row + count] for row, count in begins]), torch.from_numpy(steps)

    offsets, candidates = score_positions(spec, rows), cached_scores(spec, cache.folder, spec.wanted())
    for each in candidates:
        each.gather_rescored()
    scores = settle_scores(candidates, lambda: load_scorer_of(spec).computation)
    missing = scores.rows.missing()
    if len(missing):
        score_kept(spec, scores.open(), missing, offsets, read_latents)
        scores.gather_rescored()
    compared = [DirectionSums().add([key], latents_RTD[row : row + n], first=[0]).numpy() for key, row in first.items()]
    beyond_RT = np.arange(spec.adapter.latents) >= steps_R[:, None]
    dissimilarity_RT = np.where(beyond_RT, np.float32(np.nan), np.concatenate(compared))
    reduced = reduce_scores(spec, scores, rows, offsets, len(missing))
    return RunRollouts(rows, dissimilarity_RT, reduced, cache, drawn_now=0)
