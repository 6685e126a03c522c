"""What commands ask of the pipeline: their configs as objects and plain values."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from hydra.core.global_hydra import GlobalHydra
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from latent_tts.checkpoint.adapter import CheckpointAdapter
from latent_tts.config.build import build, changed_keys, compose, is_default, is_given
from latent_tts.config.recorded import TARGET, literal, recorded
from latent_tts.engine.decoding import AnswerSampling
from latent_tts.errors import bad_value, require
from latent_tts.pipeline.annotation_spec import AnnotationSpec
from latent_tts.pipeline.spec import EngineSettings, RunRequest, check_sampler
from latent_tts.results.annotations import SETTINGS, AnnotationFolder
from latent_tts.results.cache import MODES
from latent_tts.sampler import Sampler
from latent_tts.task import Task
from latent_tts.task.asked import Asked

log = logging.getLogger(__name__)
AS_ANNOTATED = {"temperature": 0.0, "top_p": 1.0, "decode": "all", "forced_prefix": ""}  # unless annotations say more
NUMBER = re.compile(r"-?[0-9]+(\.[0-9]*)?(e-?[0-9]+)?")


def run_request(cfg: DictConfig) -> RunRequest:
    """The request of `ltts run`.

    Raises:
        UsageError: an option refuses a value.
    """
    require(
        "aggregator",
        cfg.aggregator,
        OmegaConf.is_dict(cfg.aggregator),
        "must be options of the group, as in aggregator=[majority]",
    )
    require("paths.cache", cfg.paths.cache, cfg.paths.cache != "", "must be a folder")
    require("cache", cfg.cache, cfg.cache in MODES, 'must be on, refresh or off (in YAML in quotes: "on", "off")')
    chosen = {key for key in ("schedule", "budget", "scorer.checkpoint") if is_given(key)}
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
        executor=build("executor", cfg.executor),
        decode=cfg.answer.decode,
        forced_prefix=cfg.answer.forced_prefix,
        n=cfg.n,
        seed=cfg.seed,
        max_answer_tokens=cfg.max_answer_tokens,
        cache=Path(cfg.paths.cache).expanduser(),
        refresh=cfg.cache == "refresh",
        config=plain(cfg),
        chosen=frozenset(chosen if is_default("aggregator", cfg) else {*chosen, "aggregator"}),
    )


def with_texts(request: RunRequest, texts: list[str]) -> RunRequest:
    """A request whose questions are these texts; unchanged for none.

    Raises:
        UsageError: the task has questions of its own, or a text is empty.
    """
    if not texts:
        return request
    if not isinstance(request.task, Asked):
        raise bad_value("question", ",".join(texts), "the chosen task has questions of its own; leave one out")
    for text in texts:
        require("question", repr(text), bool(text.strip()), "is empty; ask something")
    config = {**request.config, "task": {**request.config["task"], "texts": texts}}
    return replace(request, task=replace(request.task, texts=texts), config=config)


def drawing_options(cfg: DictConfig) -> tuple[Sampler, Task, CheckpointAdapter]:
    """The options of a command that draws rollouts of a model on its own, not for a run.

    Raises:
        UsageError: an option refuses a value, or the sampler does not fit.
    """
    sampler: Sampler = build("sampler", cfg.sampler)
    require("sampler", sampler.name, not sampler.needs_donor, "must draw rollouts: greedy, gaussian or dropout")
    task, adapter = build("task", cfg.task), build("model", cfg.model)
    adapter.check()
    check_sampler(sampler, adapter)
    return sampler, task, adapter


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
        executor=build("executor", cfg.executor),
        n=cfg.n,
        completions=cfg.completions,
        keep=cfg.keep,
        seed=cfg.seed,
        max_answer_tokens=cfg.max_answer_tokens,
        output=Path(cfg.output).expanduser(),
        config=plain(cfg),
        chosen=frozenset({"schedule"} if is_given("schedule") else ()),
    )


def default_annotation_spec(cfg: DictConfig, key: str) -> AnnotationSpec:
    """What `ltts train-rm` annotates where it is given no folder.

    Args:
        cfg: config of `ltts train-rm`.
        key: `annotations` or `valid_annotations`.
    """
    part, wanted = compose("annotate"), cfg.annotate[key]
    part.model, part.sampler = plain(cfg)["model"], plain(cfg)["sampler"]
    part.seed, part.output = cfg.seed, str(Path(cfg.output).expanduser() / key)
    part.task.split, part.task.limit = wanted.split, wanted.limit
    part.n, part.completions = wanted.n, wanted.completions
    return annotation_spec(part)


def annotated_run(cfg: DictConfig, valid: AnnotationFolder) -> DictConfig | None:
    """The run whose rollouts were annotated, on which the temperature of the weighted vote is to be chosen.

    Args:
        cfg: config of the training command, for the model.
        valid: annotations of the questions to choose on.

    Returns:
        The config of `ltts run`; None for annotations (official shards) that do not say which task they are of.

    Raises:
        UsageError: the settings of the annotations describe no run.
    """
    made = valid.settings
    if valid.task is None:
        log.warning("%s: task unknown, so the temperature of the weighted vote stays 1", valid.path)
        return None
    run = compose("run", ["scorer=latent_rm", "search=independent", "budget=fixed"])  # whatever local/default.yaml says
    try:
        run.model = OmegaConf.to_container(cfg.model, resolve=True)
        run.task, run.sampler = recorded("task", valid.task, cfg), recorded("sampler", made["sampler"], cfg)
        run.task.limit = 1 + max(row["index"] for row in valid.index())  # not all of them, where `annotate` was stopped
        run.n, run.seed, run.max_answer_tokens = made["n"], made["seed"], made["max_answer_tokens"]
        run.engine.dtype, run.engine.quantize = made["dtype"], made.get("quantize")
        run.answer = OmegaConf.merge(run.answer, AS_ANNOTATED, literal(made.get("answer", {})))
    except (KeyError, TypeError, ValueError, OmegaConfBaseException) as error:
        reason = f"has no {error}" if type(error) is KeyError else str(error).splitlines()[0]
        raise bad_value("valid_annotations", valid.path / SETTINGS, reason) from error
    build("task", run.task)
    build("sampler", run.sampler)
    return run


def beside_option(cfg: DictConfig, beside: str | None, own: Sampler) -> tuple[Sampler, dict[str, Any]] | None:
    """The sampler that `beside` of `ltts trace` names, with its config; None for none.

    Args:
        cfg: the config of the run, whose model says what its parameter is by default.
        beside: `NAME`, `NAME:VALUE`, `auto` or None.
        own: the run's sampler.

    Raises:
        UsageError: there is no such sampler, or it refuses the value.
    """
    if beside is None:
        return None
    if beside == "auto":
        beside, strength = ("dropout", "rate") if own.name == "gaussian" else ("gaussian", "sigma")
        if strength not in (cfg.model.get("recommended") or ()):
            return None
    name, colon, value = beside.partition(":")
    known = GlobalHydra.instance().config_loader().get_group_options("sampler")
    require(
        "beside",
        beside,
        name in known,
        f"must be auto, null or a sampler, as in gaussian:0.2; one of {', '.join(known)}",
    )
    node = OmegaConf.to_container(compose("run", [f"sampler={name}"]).sampler, resolve=False)
    merged: Any = OmegaConf.create({"model": literal(plain(cfg)["model"]), "sampler": node})
    if colon:
        param = get_class(merged.sampler[TARGET]).param
        require("beside", beside, param is not None, f"{name} has no parameter")
        merged.sampler[param] = float(value) if NUMBER.fullmatch(value) else value
    return build("sampler", merged.sampler), plain(merged)["sampler"]


def engine_settings(node: DictConfig) -> EngineSettings:
    """The keys `engine.*`.

    Raises:
        UsageError: a value is not allowed.
    """
    return EngineSettings(node.dtype, node.device, node.rows, node.quantize, node.graph)


def changed_settings(cfg: DictConfig) -> dict[str, Any]:
    """The keys of a job that differ from their defaults and have no column of their own."""
    aggregators = {f"aggregator.{name}._target_" for name in cfg.aggregator}
    own_columns = {
        "n", "seed", "model.name", "model.checkpoint", "model.latent_rm", "task.split", "task.path", "task.texts",
        "task._target_", "question", "json", "cache", "sampler._target_", "budget", "scorer._target_",
        "scorer.checkpoint", "scorer.latents", "paths",
        "engine.dtype", "engine.rows", "engine.device", "engine.graph", "executor", "keep_latents", "run",
        "search._target_", "beside", "maps", "top", "threshold", "directions",
        "schedule._target_", "schedule.verify", "schedule.probe",
    }  # fmt: skip
    return changed_keys(cfg, own_columns | aggregators)


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The resolved config as plain values."""
    return cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))
