"""Computations whose results on a device must equal those on the CPU: rollouts, scores, labels and beams."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import tiny
import torch
from label_jobs import jobs, labelling
from torch import Tensor, nn

from latent_tts.engine.decoding import AnswerSampling
from latent_tts.engine.graph_scoring import GraphScorer
from latent_tts.engine.graphs import GraphEngine
from latent_tts.engine.labelling import label_batch
from latent_tts.engine.packing import RolloutJob
from latent_tts.engine.recording import CudaRecorder, Recordings
from latent_tts.engine.rollout import Engine, RolloutPlan, Rollouts
from latent_tts.engine.scoring import LatentScorer
from latent_tts.random.draw import Draw
from latent_tts.sampler.control import Control
from latent_tts.sampler.dropout import Dropout
from latent_tts.sampler.gaussian import Gaussian
from latent_tts.sampler.greedy import Greedy
from latent_tts.schedule.jacobi import Jacobi
from latent_tts.search.beam import Beam
from latent_tts.types import Reasoner, RewardModel


class Runs:
    """Runs passes again in place of replaying them."""

    def record(self, run: Callable[[], None], tensors: list[Tensor]) -> Callable[[], object]:
        return run


class Place(NamedTuple):
    """A device: how to move a model to it, the context manager in which it computes, and what records its passes."""

    device: torch.device
    moved: Callable[[nn.Module], Any]
    computing: Callable[[], AbstractContextManager] = nullcontext
    recorder: Callable[[], CudaRecorder] = Runs

    def reasoner(self, family: str) -> Reasoner:
        made = tiny.reasoner(family)
        return Reasoner(self.moved(made.lm), made.next_latent)

    def scorer(self, family: str) -> LatentScorer:
        backbone = self.moved(tiny.reward_model(family).backbone)
        return LatentScorer(RewardModel(backbone, lambda hidden: hidden[..., 0]))


CPU = Place(torch.device("cpu"), lambda module: module)
Values = list[Tensor | list]
Case = Callable[[Place], Values]


def check_same(case: Case, place: Place, tolerance: float) -> None:
    """Check that a computation has the same results on a device as on the CPU, in float64."""
    expected = case(CPU)
    with place.computing():
        found = case(place)
    for ours, theirs in zip(found, expected, strict=True):
        assert type(ours) is type(theirs)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance, equal_nan=True)


def cases() -> Iterator[tuple[str, Case]]:
    """All samplers and schedules, scores, labels and beams, in three families, and what is replayed in one."""
    noise, masks = Gaussian(0.5, False), Dropout(0.3, "residual", ["thoughts"], "fresh")
    everywhere = Dropout(0.3, "residual_embedding", ["prompt", "thoughts", "answer"], "locked")
    samplers = [Greedy(), noise, masks, everywhere, AnswerSampling(1.5, 0.9).over(noise), Control("shuffle")]
    for family in ("gpt2", "llama", "qwen3"):
        eos_id = tiny.EOS_IDS[family]
        plans = {
            "plain": tiny.plan(3, eos_id=eos_id),
            "stops by a token": tiny.plan(3, eos_id=eos_id, stop_id=11),
            "forced beginning": tiny.plan(3, eos_id=eos_id, forced_ids=[5]),
            "sweeps": tiny.plan(3, eos_id=eos_id, schedule=Jacobi(2, None, "token"), latent_id=59),
        }
        for name, plan in plans.items():
            for sampler in samplers:
                yield f"{family}, {name}, {sampler}", _rolled(family, plan, sampler)
        yield f"{family}, scores", _scored(family)
        for sampler in (noise, masks):
            yield f"{family}, labels, {sampler}", _labelled(family, sampler)
            yield f"{family}, beams, {sampler}", _searched(family, sampler)
    plan = tiny.plan(3, eos_id=tiny.EOS_IDS["gpt2"], stop_id=11)
    for sampler in samplers[1:]:
        yield f"gpt2, stops by a token, {sampler}, replayed", _replayed("gpt2", plan, sampler)
    yield "gpt2, scores, replayed", _scored_again("gpt2")


def _values(rollouts: Rollouts) -> Values:
    latents = rollouts.latents_RTD.cpu().double().mul(1e-3)  # of float32
    return [latents, rollouts.steps_R, [float(i) for ids in rollouts.answer_ids for i in ids], rollouts.stopped_R]


def _rolled(family: str, plan: RolloutPlan, sampler: Any) -> Case:
    prompts, ids = tiny.prompts([1, 9, 4]), ["a", "b", "c"]

    def values(place: Place) -> Values:
        engine, rollouts_QN = Engine(place.reasoner(family), plan), torch.arange(4).repeat(3, 1).to(place.device)
        donor_RTD = None
        if sampler.needs_donor:
            donor_RTD = torch.ones(12, plan.latents, tiny.WIDTH, dtype=torch.float64).to(place.device)
        draw = Draw.of(0, ids, rollouts_QN, tiny.WIDTH, engine.blocks)
        return _values(engine.roll(prompts, draw, sampler, donor_RTD=donor_RTD))

    return values


def _recordings(place: Place) -> Recordings:
    return Recordings(place.device, needed=True, new_recorder=place.recorder, max_bytes=1e9)


def _replayed(family: str, plan: RolloutPlan, sampler: Any) -> Case:
    """Batches of the same sizes, which the CPU draws as usual."""

    def values(place: Place) -> Values:
        reasoner, found = place.reasoner(family), []
        engine = Engine(reasoner, plan) if place == CPU else GraphEngine(reasoner, plan, _recordings(place))
        for batch in range(3):  # recorded, compared, replayed
            rollouts_QN = torch.arange(batch, batch + 4).repeat(3, 1).to(place.device)
            donor_RTD = None
            if sampler.needs_donor:
                donor_RTD = torch.full((12, plan.latents, tiny.WIDTH), 1.0 + batch).double().to(place.device)
            draw = Draw.of(batch, ["a", "b", "c"], rollouts_QN, tiny.WIDTH, engine.blocks)
            prompts = tiny.prompts([1 + batch, 9, 4])
            for answers in (True, False):
                found += _values(engine.roll(prompts, draw, sampler, donor_RTD=donor_RTD, answers=answers))
        return found

    return values


def _scored_again(family: str) -> Case:
    def values(place: Place) -> Values:
        scorer, found = place.scorer(family), []
        if place != CPU:
            scorer = GraphScorer(scorer.model, _recordings(place))
        for batch in range(3):
            latents_RTD = torch.randn(9, 5, tiny.WIDTH, generator=torch.Generator().manual_seed(batch)).double()
            prompts, steps_R = tiny.prompts([9 - batch, 4, 6]), 1 + (torch.arange(9) + batch) % 5
            found.append(scorer.score(prompts, latents_RTD.to(place.device), steps_R=steps_R).cpu())
        return found

    return values


def _labelled(family: str, sampler: Any) -> Case:
    def values(place: Place) -> Values:
        engine = Engine(place.reasoner(family), tiny.plan(3, eos_id=tiny.EOS_IDS[family], answer=3))
        return [torch.from_numpy(entry.labels_NT) for entry in label_batch(jobs(), engine, sampler, labelling())[0]]

    return values


def _scored(family: str) -> Case:
    latents_RTD = torch.randn(9, 5, tiny.WIDTH, generator=torch.Generator().manual_seed(0)).double()

    def values(place: Place) -> Values:
        prompts, steps_R = tiny.prompts([9, 4, 6]), torch.arange(9) % 6
        position_offset_Q = torch.tensor([0, 7, 40]).to(place.device)
        scores = place.scorer(family).score(prompts, latents_RTD, steps_R=steps_R, position_offset_Q=position_offset_Q)
        return [scores.cpu()]

    return values


def _searched(family: str, sampler: Any) -> Case:
    def values(place: Place) -> Values:
        engine = Engine(place.reasoner(family), tiny.plan(3, eos_id=tiny.EOS_IDS[family], answer=2))
        batch = [RolloutJob(key, key, prompt, [0, 1]) for key, prompt in zip("ab", tiny.prompts([5, 1]), strict=True)]
        scorer = place.scorer(family)
        return _values(Beam(2, 2, False).roll(engine, batch, sampler, 0, scorer=scorer, reduction="sum"))

    return values
