"""Loaded models, kept for the next job of a sweep, with their engines; the device they are on."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from latent_tts.checkpoint.adapter import CheckpointAdapter
from latent_tts.engine import quantization
from latent_tts.engine.device import is_gpu, resolve_device
from latent_tts.engine.draft import DraftHead, load_draft
from latent_tts.engine.graph_scoring import GraphScorer
from latent_tts.engine.graphs import GraphEngine
from latent_tts.engine.proof import prove_reasoner, prove_reward_model
from latent_tts.engine.recording import ROLLOUTS_SHARE, SCORES_SHARE, Recordings
from latent_tts.engine.rollout import SEQUENTIAL, Engine, RolloutPlan
from latent_tts.engine.scoring import LatentScorer
from latent_tts.errors import RunError, UsageError, require
from latent_tts.pipeline.code import PACKAGE
from latent_tts.pipeline.keys import own_fields
from latent_tts.pipeline.spec import EngineSettings, RunSpec, exit_ids
from latent_tts.sampler import Sampler
from latent_tts.schedule import Schedule
from latent_tts.scorer.latent_rm import LatentRM
from latent_tts.types import Computation, Reasoner, RewardModel

log = logging.getLogger(__name__)
_loaded: dict[str, tuple[tuple[Any, ...], Any]] = {}
# what holds a model, or recordings of a sampler, goes with it
_HOLDERS = {"model": "engine", "sampler": "engine", "scorer": "scorer's engine"}
WORDS = {  # of a `Computation`, in a warning
    "shared-prefix": "shared-prefix attention",
    "transformers": "transformers' own attention and cache, which is slower",
    "head": "",
    "model": " and the model's own logits",
}


def load_reasoner(
    adapter: CheckpointAdapter, engine: EngineSettings, device: str, *, longest: int | None = None
) -> Reasoner:
    """The adapter's model, loaded, quantised and proven; the last one is kept, since jobs of a sweep mostly share it.

    Args:
        adapter: the model.
        engine: how it is computed.
        device: where.
        longest: tokens of the longest sequence that it will run; None for the longest that it takes.

    Raises:
        UsageError: it cannot be loaded, or the engine computes it in no way as it computes itself.
        RunError: its own values are not finite.
    """
    key = (_kind("model", adapter), adapter.digest, device, engine.dtype, engine.quantize)

    def load() -> Reasoner:
        reasoner = adapter.load(device=device, dtype=engine.dtype)
        if engine.quantize is not None:
            quantization.quantize(reasoner.lm, engine.quantize)
        return reasoner

    longest = adapter.positions if longest is None else longest
    return _keep_proven("model", f"model.checkpoint={adapter.checkpoint}", key, load, prove_reasoner, longest)


def load_reasoner_of(spec: RunSpec) -> Reasoner:
    """The model of a run, loaded and proven; it is kept for the next call."""
    return load_reasoner(spec.adapter, spec.engine, find_device(spec.engine), longest=spec.longest_sequence)


def load_scorer_of(spec: RunSpec) -> RewardModel:
    """The scorer of a run, loaded and proven; the last one is kept, see `load_reasoner`.

    A LoRA scorer shares the weights of the loaded reasoner.
    """
    scorer, dtype, device = spec.given_scorer, spec.engine.dtype, find_device(spec.engine)
    longest = max(map(len, spec.prompts.values())) + spec.adapter.latents
    shares = scorer.base_digest == spec.adapter.digest and spec.engine.quantize is None
    base = load_reasoner_of(spec) if shares else None
    key = (_kind("scorer", scorer), scorer.digest, device, dtype, None if base is None else str(id(base.lm)))
    return _keep_proven(
        "scorer",
        f"scorer={scorer.name}",
        key,
        partial(scorer.load, device=device, dtype=dtype, base=base),
        prove_reward_model,
        longest,
    )


def _kind(group: str, option: CheckpointAdapter | LatentRM) -> str:
    """The class of an option, and the fields that its model may depend on; in this package models depend on none."""
    kind = type(option)
    fields = {} if kind.__module__.startswith(f"{PACKAGE}.") else own_fields(group, option)
    return f"{kind.__module__}.{kind.__qualname__} {json.dumps(fields, sort_keys=True)}"


def _keep_proven(
    kind: str,
    where: str,
    key: tuple[str | None, ...],
    load: Callable[[], Any],
    prove: Callable[[Any, int], Computation],
    longest: int,
) -> Any:
    model = _keep(kind, key, load)

    def computation() -> Computation:
        try:
            found = prove(model, longest)
        except (UsageError, RunError) as error:
            raise type(error)(f"{where}: {error}") from error
        if found.reason:
            log.warning("%s: computed with %s%s: %s", where, WORDS[found.attention], WORDS[found.logits], found.reason)
        return found

    return replace(model, computation=_keep(f"{kind}'s proof", (*key, str(longest)), computation))


def _keep(kind: str, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
    if kind not in _loaded or _loaded[kind][0] != key:
        for gone in (kind, _HOLDERS.get(kind, kind)):
            _loaded.pop(gone, None)
        _loaded[kind] = key, make()
    return _loaded[kind][1]


def find_device(engine: EngineSettings) -> str:
    """The torch device of `engine.device`.

    Raises:
        UsageError: there is no such device, or it cannot do `engine.quantize`.
    """
    device = resolve_device("engine.device", engine.device)
    if not is_gpu(device):
        refuse_graphs(engine, f"graphs need CUDA, this is {device}")
    if engine.quantize is not None:
        quantization.check_products(engine.quantize, device)
    return device


def open_recordings(settings: EngineSettings, device: str, share: float) -> Recordings | None:
    """Where CUDA graphs are kept, in a share of the free memory; None on a CPU, and with `engine.graph=off`."""
    if not is_gpu(device) or settings.graph == "off":
        return None
    return Recordings(device, needed=settings.graph == "on", share=share)


def open_engine(
    reasoner: Reasoner, plan: RolloutPlan, settings: EngineSettings, draft: DraftHead | None = None
) -> Engine:
    """An engine that replays CUDA graphs where it can and `engine.graph` allows it.

    A schedule that guesses, or rollouts that stop early, decide on the way what is computed, so there are none then.

    Raises:
        RunError: `engine.graph=on`, and the model cannot be replayed.
    """
    recordings = open_recordings(settings, str(reasoner.lm.device), ROLLOUTS_SHARE)
    if recordings is None or not plan.schedule.stepwise or plan.exit is not None:
        return Engine(reasoner, plan, draft)
    return GraphEngine(reasoner, plan, recordings)


def open_scorer(model: RewardModel, settings: EngineSettings) -> LatentScorer:
    """A scorer that replays CUDA graphs where it can and `engine.graph` allows it.

    Raises:
        RunError: see `open_engine`.
    """
    recordings = open_recordings(settings, str(model.backbone.device), SCORES_SHARE)
    return LatentScorer(model) if recordings is None else GraphScorer(model, recordings)


def sampler_of(spec: RunSpec) -> Sampler:
    """The sampler of a run over its way to choose answers, the same object in all rounds of a budget.

    The engine of another one is dropped, with its recordings.
    """
    return _keep("sampler", (id(spec.sampler), spec.answers), partial(spec.answers.over, spec.sampler))


def open_engine_of(spec: RunSpec) -> Engine:
    """The engine of a run, the same in all rounds of a budget, so that later ones replay what earlier ones recorded.

    Raises:
        RunError: see `open_engine`.
    """
    reasoner = load_reasoner_of(spec)
    plan = rollout_plan(spec.adapter, spec.max_answer_tokens, spec.schedule, spec.forced_ids)

    def make() -> Engine:
        draft = None if spec.draft is None else load_draft(spec.draft.path, spec.draft.record, reasoner.lm.device)
        return open_engine(reasoner, plan, spec.engine, draft)

    return _keep("engine", (id(reasoner.lm), reasoner.computation, plan, spec.engine, spec.draft), make)


def open_scorer_of(spec: RunSpec) -> LatentScorer:
    """The scorer of a run, with its recordings; the last one is kept."""
    model = load_scorer_of(spec)
    key = id(model.backbone), model.computation, spec.engine
    return _keep("scorer's engine", key, partial(open_scorer, model, spec.engine))


def refuse_graphs(settings: EngineSettings, why: str) -> None:
    """Raise UsageError if `engine.graph=on` asks for graphs where there are none."""
    require("engine.graph", settings.graph, settings.graph != "on", f"must be auto or off: {why}")


def rollout_plan(
    adapter: CheckpointAdapter, max_answer_tokens: int, schedule: Schedule | None = None, forced_ids: Sequence[int] = ()
) -> RolloutPlan:
    """What a rollout of the adapter's model consists of; without a schedule one latent is made after another."""
    schedule = schedule or SEQUENTIAL
    return RolloutPlan(
        adapter.latents, adapter.thinking_end_ids, adapter.eos_id, max_answer_tokens, adapter.stop_id,
        latent_id=adapter.latent_id if schedule.guess == "token" else None, schedule=schedule,
        forced_ids=list(forced_ids), other_eos_ids=adapter.eos_ids[1:],
        exit=schedule.exit, exit_ids=exit_ids(adapter, schedule),
    )  # fmt: skip
