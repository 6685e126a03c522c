"""What describes a run: the keys of its caches, the columns of its tables, the versions behind it."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from latent_tts.config import build as config
from latent_tts.pipeline.spec import Prepared
from latent_tts.results import store
from latent_tts.scorer import Scorer

# part of every cache key: raised when the same settings give other rollouts
ENGINE_SEMANTICS = {"float32": 2, "bfloat16": 3, "float16": 3}
SCORING_SEMANTICS = 2  # the same for step scores


def cache_key(cfg: DictConfig, prepared: Prepared) -> dict[str, Any]:
    """Everything that determines a rollout besides its question and number."""
    return {
        "semantics": ENGINE_SEMANTICS[cfg.engine.dtype],
        "checkpoint": prepared.adapter.digest,
        "prompt": prepared.adapter.prompt_recipe,
        "adapter": cfg.model._target_,
        "eos": prepared.adapter.eos_id,
        "sampler": OmegaConf.to_container(cfg.sampler, resolve=True),
        "latents": prepared.adapter.latents,
        "seed": cfg.seed,
        "schedule": prepared.schedule.key,
        "dtype": cfg.engine.dtype,
        "max_answer_tokens": cfg.max_answer_tokens,
        **({"answer": prepared.answers.settings} if prepared.answers.random else {}),
        **({"forced_ids": prepared.forced_ids} if prepared.forced_ids else {}),
        **({"quantize": cfg.engine.quantize} if cfg.engine.quantize is not None else {}),
    }


def beams_key(cfg: DictConfig, prepared: Prepared, scorer: Scorer) -> dict[str, Any]:
    """The same for the beams that a search leaves, which the scorer determines as well."""
    search = OmegaConf.to_container(cfg.search, resolve=True)
    scored_by = {"scorer": score_key(scorer, cfg.engine.dtype, prepared.n), "reduce": scorer.reduction}
    return cache_key(cfg, prepared) | {"search": search, **scored_by}


def thoughts_key(cfg: DictConfig, prepared: Prepared) -> dict[str, Any]:
    """The same for latents without answers, which nothing about answers determines."""
    key = cache_key(cfg, prepared)
    del key["max_answer_tokens"]
    key.pop("answer", None)
    key.pop("forced_ids", None)
    return key | {"answers": "none"}


def score_key(scorer: Scorer, dtype: str, n: int) -> dict[str, Any]:
    """Everything that determines a rollout's step scores besides the rollout; in official positions also its mates."""
    key = {
        "semantics": SCORING_SEMANTICS,
        "checkpoint": scorer.digest,
        "positions": scorer.positions,
        "dtype": dtype,
    }
    return key | ({"n": n} if scorer.positions == "official" else {})


def changed_settings(cfg: DictConfig) -> dict[str, Any]:
    """The keys of a job that differ from their defaults and have no column of their own."""
    aggregators = {f"aggregator.{name}._target_" for name in cfg.aggregator}
    own_columns = {
        "n", "seed", "model.name", "model.checkpoint", "model.latent_rm", "task.split", "task.path", "task._target_",
        "sampler._target_", "budget", "scorer._target_", "scorer.checkpoint", "scorer.latents", "paths",
        "engine.dtype", "engine.rows", "engine.device", "keep_latents", "run", "search._target_",
        "schedule._target_",
    }  # fmt: skip
    return config.non_defaults(cfg, own_columns | aggregators)


def run_columns(cfg: DictConfig, prepared: Prepared, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The columns that say which run a metrics row belongs to."""
    sampler, scorer = prepared.sampler, prepared.scorer
    shown = {key: value for key, value in settings.items() if key != f"sampler.{sampler.param}"}
    columns = {
        "model": prepared.adapter.name,
        "checkpoint": prepared.adapter.checkpoint,
        "task": prepared.task.name,
        "split": prepared.task.split or "",
        "sampler": sampler.name,
        "sampler_param": sampler.param or "",
        "sampler_value": "" if sampler.value is None else str(sampler.value),
        "settings": ",".join(f"{key}={value}" for key, value in sorted(shown.items())),
        "schedule": prepared.schedule.name,
        "search": "" if prepared.search.survivors is None else prepared.search.name,
        "budget": prepared.budget.name,
        "scorer": "" if scorer is None else scorer.name,
        "seed": str(cfg.seed),
        "dtype": cfg.engine.dtype,
    }
    identity = {
        **columns,
        "n": prepared.n,
        "weights": prepared.adapter.digest,
        "questions": [[q.id, q.answer] for q in prepared.questions],
    }
    if scorer is not None:
        identity["scorer_weights"] = scorer.digest
    return {"run_id": store.settings_digest(identity)[:12], **columns}


def versions(cfg: DictConfig) -> dict[str, str]:
    """Versions of what a result depends on, and the commit where there is one."""
    names = ["latent-tts", "torch", "transformers", "tokenizers", "numpy", "pandas", "hydra-core"]
    names += [name for name in ("numba", "math-verify") if find_spec(name.replace("-", "_")) is not None]
    names += [] if cfg.engine.quantize is None else ["torchao"]
    return {"python": platform.python_version(), **{name: version(name) for name in names}, **commit()}


def machine() -> dict[str, str]:
    """The system, the processor, and the GPUs with their libraries where torch has been in use and found some."""
    found = {"system": platform.platform(), "processor": platform.processor() or platform.machine()}
    if "torch" in sys.modules:
        from latent_tts.engine.device import gpu_versions

        found |= gpu_versions()
    return found


def commit() -> dict[str, str]:
    """The commit of a source checkout (`-dirty` if it has changes); nothing for an installed package."""
    import subprocess

    here = Path(__file__).resolve().parents[3]
    if not (here / ".git").exists():
        return {}
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=here, capture_output=True, text=True, check=False
    )
    return {"commit": done.stdout.strip()} if done.returncode == 0 else {}
