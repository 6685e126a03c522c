"""`ltts rescore`: the rollouts of a completed run, scored by another scorer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latent_tts.budget import is_adaptive
from latent_tts.errors import require
from latent_tts.pipeline.keys import rollout_key
from latent_tts.pipeline.rollouts import CachedRollouts, RunRollouts, entries, gather_rollouts
from latent_tts.pipeline.spec import RunSpec
from latent_tts.results.run_folder import RUN_JSON, is_complete, read_run_json

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


def rescore_rollouts(spec: RunSpec, source: Path) -> RunRollouts:
    """Score the rollouts of a run, which are read from the cache.

    Args:
        spec: the run.
        source: its folder.

    Raises:
        UsageError: the cache lacks some.
        RunError: scoring failed.
    """
    wanted = spec.wanted()
    there = any(CachedRollouts.read(spec, cache, wanted, scored=False).complete for cache in entries(spec))
    allowed = f"its rollouts are not in the cache {spec.cache}\nre-run its command with cache=on to draw them again"
    require("run", source, there, allowed)
    return gather_rollouts(spec, rollout_key, wanted)
