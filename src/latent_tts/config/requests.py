"""What commands ask of the pipeline: their configs as objects and plain values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from latent_tts.config.build import build, changed_keys, is_default, is_given
from latent_tts.engine.decoding import AnswerSampling
from latent_tts.errors import require
from latent_tts.pipeline.annotation import AnnotationSpec
from latent_tts.pipeline.spec import EngineSettings, RunRequest


def run_request(cfg: DictConfig) -> RunRequest:
    """The request of `ltts run`.

    Raises:
        UsageError: an option refuses a value.
    """
    allowed = "options of the group, as in aggregator=[majority]"
    require("aggregator", cfg.aggregator, OmegaConf.is_dict(cfg.aggregator), allowed)
    chosen = {key for key in ("schedule", "scorer.checkpoint") if is_given(key)}
    return RunRequest(
        engine=engine_settings(cfg.engine),
        sampler=build("sampler", cfg.sampler),
        answers=AnswerSampling(cfg.answer.temperature, cfg.answer.top_p),
        budget=build("budget", cfg.budget),
        aggregators=[build(f"aggregator.{name}", node) for name, node in cfg.aggregator.items()],
        scorer=build("scorer", cfg.scorer),
        task=build("task", cfg.task),
        adapter=build("model", cfg.model),
        schedule=build("schedule", cfg.schedule),
        search=build("search", cfg.search),
        decode=cfg.answer.decode,
        forced_prefix=cfg.answer.forced_prefix,
        n=cfg.n,
        seed=cfg.seed,
        max_answer_tokens=cfg.max_answer_tokens,
        cache=Path(cfg.paths.cache).expanduser(),
        config=plain(cfg),
        chosen=frozenset(chosen if is_default("aggregator", cfg) else {*chosen, "aggregator"}),
    )


def annotation_spec(cfg: DictConfig) -> AnnotationSpec:
    """What `ltts annotate` is to label.

    Raises:
        UsageError: an option refuses a value.
    """
    return AnnotationSpec(
        engine=engine_settings(cfg.engine),
        answers=AnswerSampling(cfg.answer.temperature, cfg.answer.top_p),
        sampler=build("sampler", cfg.sampler),
        task=build("task", cfg.task),
        adapter=build("model", cfg.model),
        schedule=build("schedule", cfg.schedule),
        n=cfg.n,
        completions=cfg.completions,
        keep=cfg.keep,
        seed=cfg.seed,
        max_answer_tokens=cfg.max_answer_tokens,
        output=Path(cfg.output).expanduser(),
        config=plain(cfg),
        schedule_chosen=is_given("schedule"),
    )


def engine_settings(node: DictConfig) -> EngineSettings:
    """The keys `engine.*`.

    Raises:
        UsageError: a value is not allowed.
    """
    return EngineSettings(node.dtype, node.device, node.rows, node.quantize)


def changed_settings(cfg: DictConfig) -> dict[str, Any]:
    """The keys of a job that differ from their defaults and have no column of their own."""
    aggregators = {f"aggregator.{name}._target_" for name in cfg.aggregator}
    own_columns = {
        "n", "seed", "model.name", "model.checkpoint", "model.latent_rm", "task.split", "task.path", "task._target_",
        "sampler._target_", "budget", "scorer._target_", "scorer.checkpoint", "scorer.latents", "paths",
        "engine.dtype", "engine.rows", "engine.device", "keep_latents", "run", "search._target_",
        "schedule._target_",
    }  # fmt: skip
    return changed_keys(cfg, own_columns | aggregators)


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The resolved config as plain values."""
    values: Any = OmegaConf.to_container(cfg, resolve=True)
    return values
