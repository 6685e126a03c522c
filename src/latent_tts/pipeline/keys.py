"""What determines a rollout: the keys of the caches."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from latent_tts.checkpoint.adapter import CheckpointAdapter
from latent_tts.errors import bad_value
from latent_tts.pipeline.code import (
    DRAWING,
    FIELDS_NOT_IN_KEY,
    PACKAGE,
    SCORING,
    code_digests,
    computed_attributes,
)
from latent_tts.pipeline.spec import RunSpec
from latent_tts.scorer.latent_rm import LatentRM
from latent_tts.types import Computation

# of cache entries; those of others are not read. Raised when the same settings give other rollouts or scores for a
# reason that is not in their code
FORMAT = 4


def rollout_key(spec: RunSpec, computation: Computation, scoring: Computation | None) -> dict[str, Any]:
    """Everything that determines a rollout besides its question and number; for a search also its scorer.

    Args:
        spec: the run.
        computation: how the loaded model is computed.
        scoring: how the loaded scorer is computed; read only where it chooses the rollouts.

    Raises:
        UsageError: a field of the model has a value that cannot be told from another.
    """
    key = {
        "format": FORMAT,
        **model_key(spec.adapter),
        "computation": computation.way,
        "code": code_digests(
            (spec.adapter, spec.sampler, spec.schedule, spec.search), map(spec.config.get, DRAWING), DRAWING
        ),
        "sampler": spec.config["sampler"],
        "seed": spec.seed,
        "schedule": spec.schedule.key,
        "search": spec.config["search"],
        **({"draft": spec.draft.digest} if spec.draft is not None else {}),
        "dtype": spec.engine.dtype,
        "max_answer_tokens": spec.max_answer_tokens,
        **({"answer": spec.answers.settings} if spec.answers.random else {}),
        **({"forced_ids": spec.forced_ids} if spec.forced_ids else {}),
        **({"quantize": spec.engine.quantize} if spec.engine.quantize is not None else {}),
    }
    if not spec.guided:
        return key
    assert scoring is not None
    scorer = spec.given_scorer
    return key | {"scorer": score_key(scorer, spec.engine.dtype, spec.n, scoring), "reduce": scorer.reduction}


def is_current(key: Mapping[str, Any]) -> bool:
    """Whether this version of the code reads cache entries of a key; code of other packages is not asked for."""
    own = code_digests([], [], DRAWING)[PACKAGE]
    return key.get("format") == FORMAT and (key.get("code") or {}).get(PACKAGE) == own


def latents_key(spec: RunSpec, computation: Computation, scoring: Computation | None) -> dict[str, Any]:
    """The key of latents alone: without what determines answers."""
    key = rollout_key(spec, computation, scoring) | {"answers": "none"}
    return {name: key[name] for name in key if name not in ("max_answer_tokens", "answer", "forced_ids")}


def model_key(adapter: CheckpointAdapter) -> dict[str, Any]:
    """What a model contributes to a rollout, but for its code: weights, prompts, end tokens, and its own fields.

    Raises:
        UsageError: a field has a value that cannot be told from another.
    """
    return {
        "checkpoint": adapter.digest,
        "prompt": adapter.prompt_recipe,
        "adapter": f"{type(adapter).__module__}.{type(adapter).__qualname__}",
        "fields": own_fields("model", adapter),
        "eos": list(adapter.eos_ids),
        "latents": adapter.latents,
    }


def score_key(scorer: LatentRM, dtype: str, n: int, computation: Computation) -> dict[str, Any]:
    """Everything that determines a rollout's step scores besides the rollout.

    Args:
        scorer: the scorer.
        dtype: that it is computed in.
        n: rollouts of each question; with official positions the others of its question determine a score, too.
        computation: how the loaded scorer is computed.

    Raises:
        UsageError: a field of the scorer has a value that cannot be told from another.
    """
    return {
        "format": FORMAT,
        "computation": computation.attention,
        "checkpoint": scorer.digest,
        "scorer": f"{type(scorer).__module__}.{type(scorer).__qualname__}",
        "fields": own_fields("scorer", scorer),
        "code": code_digests([scorer], [], SCORING),
        "positions": scorer.positions,
        "dtype": dtype,
        **({"n": n} if scorer.positions == "official" else {}),
    }


def own_fields(group: str, option: Any) -> dict[str, Any]:
    """The fields and attributes of an option that may change a rollout, as JSON has them; none that is a path.

    Raises:
        UsageError: a value cannot be told from another.
    """
    ignored = FIELDS_NOT_IN_KEY[group] | computed_attributes(type(option))
    return {
        name: _plain(f"{group}.{name}", getattr(option, name))
        for name in sorted({field.name for field in fields(option)} | vars(option).keys())
        if name not in ignored and not isinstance(getattr(option, name), Path)
    }


def _plain(key: str, value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(name): _plain(key, each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(key, each) for each in value]
    if isinstance(value, set | frozenset):
        return sorted(map(repr, value))
    try:
        return hashlib.sha256(pickle.dumps(value)).hexdigest()[:16]
    except Exception as error:  # pickle raises whatever the object's own methods do
        raise bad_value(
            key, type(value).__name__, "a value that can be pickled: it is part of the cache's key"
        ) from error
