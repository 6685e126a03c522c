"""What determines a rollout: the keys of the caches."""

from __future__ import annotations

from typing import Any

from latent_tts.pipeline.spec import RunSpec
from latent_tts.scorer import Scorer

# part of every cache key: raised when the same settings give other rollouts
ENGINE_SEMANTICS = {"float32": 2, "bfloat16": 3, "float16": 3}
SCORING_SEMANTICS = 2  # the same for step scores


def rollout_key(spec: RunSpec) -> dict[str, Any]:
    """Everything that determines a rollout besides its question and number; for a search also its scorer."""
    key = {
        "semantics": ENGINE_SEMANTICS[spec.engine.dtype],
        "checkpoint": spec.adapter.digest,
        "prompt": spec.adapter.prompt_recipe,
        "adapter": spec.config["model"]["_target_"],
        "eos": list(spec.adapter.eos_ids),
        "sampler": spec.config["sampler"],
        "latents": spec.adapter.latents,
        "seed": spec.seed,
        "schedule": spec.schedule.key,
        "dtype": spec.engine.dtype,
        "max_answer_tokens": spec.max_answer_tokens,
        **({"answer": spec.answers.settings} if spec.answers.random else {}),
        **({"forced_ids": spec.forced_ids} if spec.forced_ids else {}),
        **({"quantize": spec.engine.quantize} if spec.engine.quantize is not None else {}),
    }
    if spec.search.survivors is None or spec.scorer is None:
        return key
    scored_by = {"scorer": score_key(spec.scorer, spec.engine.dtype, spec.n), "reduce": spec.scorer.reduction}
    return key | {"search": spec.config["search"], **scored_by}


def latents_key(spec: RunSpec) -> dict[str, Any]:
    """The same for latents without answers, which nothing about answers determines."""
    about_answers = ("max_answer_tokens", "answer", "forced_ids")
    key = {name: value for name, value in rollout_key(spec).items() if name not in about_answers}
    return key | {"answers": "none"}


def score_key(scorer: Scorer, dtype: str, n: int) -> dict[str, Any]:
    """Everything that determines a rollout's step scores besides the rollout.

    With official positions the other rollouts of its question do too, so n is part of the key.
    """
    key = {
        "semantics": SCORING_SEMANTICS,
        "checkpoint": scorer.digest,
        "positions": scorer.positions,
        "dtype": dtype,
    }
    return key | ({"n": n} if scorer.positions == "official" else {})
