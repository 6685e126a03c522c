"""Recorded passes neither wait for the device nor copy to it: a recording of a GPU fails where one does.

Tensors of the device `meta` have no values: what asks for one fails. What comes from the host is seen as an operator.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from marks import slow
from recordable import FEW, PLANS, SAMPLERS
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from latent_tts.engine import attention, head, prompts
from latent_tts.engine.graph_scoring import FixedScores, StepScores
from latent_tts.engine.graphs import FirstToken, FixedRollouts, Latents, Move, NextToken, Passes
from latent_tts.engine.recording import Bucket, Prompts
from latent_tts.engine.rollout import Engine
from latent_tts.engine.scoring import LatentScorer
from latent_tts.engine.sites import SiteHooks
from latent_tts.random import bits
from latent_tts.random import draw as draws
from latent_tts.random.draw import Draw
from latent_tts.sampler import Sampler
from latent_tts.types import Reasoner, RewardModel

QUESTIONS, ROLLOUTS, LENGTH = 4, 4, 16
NOT_USED: Any = None  # a recorder
OTHERS = [case for case in product(["llama_tied"], SAMPLERS, PLANS) if case not in FEW]


class FromTheHost(TorchDispatchMode):
    """Collects operators that read or make tensors on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
        if any(tensor.device.type == "cpu" for tensor in tensors):
            self.found.append(str(func))
        return out

    def makes(self, name: str) -> Callable[..., Tensor]:
        """A function of torch that makes tensors of Python numbers, which no operator shows."""
        make = getattr(torch, name)

        def made(*args: Any, **kwargs: Any) -> Tensor:
            self.found.append(f"torch.{name}")
            return make(*args, **kwargs)

        return made


@pytest.fixture(params=["operators", slow("kernels")], autouse=True)
def way(request, monkeypatch):
    """Sizes for the device, and how it computes."""
    for limits in (
        head.VALUES_AT_ONCE,
        head.SORTED_AT_ONCE,
        draws.BLOCKS_AHEAD,
        prompts.TOKENS_AT_ONCE,
        prompts.PADDING,
    ):
        monkeypatch.setitem(limits, "meta", limits["cuda"])
    if request.param == "operators":
        return
    for module in (attention, head):
        monkeypatch.setattr(module, "has_kernel", lambda like: True)
    monkeypatch.setattr(bits, "has_kernels", lambda device: True)

    def look(logits_RP, bias_P):
        highest_2R = torch.empty(2, len(logits_RP), device="meta")
        return highest_2R, highest_2R.long(), highest_2R[0]

    def words(keys_R2, rollouts_R, blocks, *rest):
        return rollouts_R.new_empty(len(rollouts_R), 4, blocks)

    drawing = {"words": words, "drop": lambda output_RSD, *rest: output_RSD.clone()}
    stubs = {
        "engine.attention_kernel": {"attend_piece": lambda *rest: None},
        "engine.head_kernel": {"look": look},
        "random.triton_kernels": drawing,
    }
    for name, functions in stubs.items():
        monkeypatch.setitem(sys.modules, f"latent_tts.{name}", SimpleNamespace(**functions))


def passes_of(rollouts: FixedRollouts, sampler: Sampler) -> list[Passes]:
    """Every kind of pass of a bucket."""
    total, plan = rollouts.total, rollouts.engine.plan
    stride = total if plan.stop_id is None else 1
    found: list[Passes] = [Prompts()] if rollouts._records_prompts else []
    found += [Latents(first, first + stride) for first in range(0, total, max(stride, 1))]
    found.append(FirstToken(total))
    first = len(plan.forced_ids) + 1
    for grid in ((QUESTIONS, ROLLOUTS), (2, 2)):
        if grid == (2, 2):
            if sampler.random_answers or rollouts._all.grid != (QUESTIONS, ROLLOUTS):
                break
            found.append(Move((QUESTIONS, ROLLOUTS), grid))
        for position in range(first, plan.max_answer_tokens + 1):
            own = position if sampler.random_answers else None
            grid = grid if grid == (2, 2) else rollouts._all.grid
            found.append(NextToken(position == plan.max_answer_tokens, own, grid))
    return found


def check_passes(fixed: Bucket[Any, Any], found: Sequence[object]) -> None:
    for passes in found:
        fixed.run(passes)  # what is made once is made
        with FromTheHost() as host, pytest.MonkeyPatch.context() as patch:
            for name in ("tensor", "as_tensor"):
                patch.setattr(torch, name, host.makes(name))
            fixed.run(passes)
        assert not host.found, f"{passes}: {host.found}"


def check(family: str, sampler: Sampler, settings: dict[str, Any]) -> None:
    settings = {"latents": 2, "ends": True} | settings
    ends = tiny.EOS_IDS[family] if settings.pop("ends") else None
    lm = tiny.reasoner(family, torch.bfloat16).lm.to("meta")
    reasoner = Reasoner(lm, lambda hidden: hidden.tanh(), lambda hidden: hidden.square())
    engine = Engine(reasoner, tiny.plan(settings.pop("latents"), eos_id=ends, answer=3, **settings))
    numbers_QN = torch.arange(ROLLOUTS, device="meta").repeat(QUESTIONS, 1)
    with torch.inference_mode(), SiteHooks(lm, sampler) as hooks:
        draw = Draw.of(0, list("abcd"), numbers_QN, tiny.WIDTH, engine.blocks)
        if sampler.needs_donor:
            draw.donor_RTD = torch.zeros(numbers_QN.numel(), engine.plan.latents, tiny.WIDTH, device="meta").bfloat16()
        rollouts = FixedRollouts(engine, hooks, draw, QUESTIONS, LENGTH, NOT_USED)
        rollouts.load(tiny.prompts([9, 3, 1, 5]), draw, hooks)
        check_passes(rollouts, passes_of(rollouts, sampler))


@pytest.mark.every_other
@pytest.mark.parametrize(("family", "sampler", "plan"), [*FEW, *(slow(*case) for case in OTHERS)])
def test_recorded_passes_neither_wait_nor_copy(monkeypatch, family, sampler, plan):
    if PLANS[plan].get("latents") == 0 and SAMPLERS[sampler].only_latents:
        pytest.skip("there are no latents to change")
    check(family, SAMPLERS[sampler], PLANS[plan])


def test_neither_do_those_of_a_scorer():
    model = tiny.reward_model("gpt2")
    scorer = LatentScorer(RewardModel(model.backbone.bfloat16().to("meta"), lambda hidden: hidden[..., 0].float()))
    latents_RTD = torch.zeros(QUESTIONS * ROLLOUTS, 3, tiny.WIDTH, device="meta")
    with torch.inference_mode():
        scores = FixedScores(scorer, QUESTIONS, LENGTH, latents_RTD, NOT_USED)
        scores.load(tiny.prompts([9, 3, 1, 5]), latents_RTD)
        check_passes(scores, [Prompts(), StepScores()])


class Waits(Sampler):
    name = "waits"

    def latent(self, h_RD: Tensor, draw: Draw, step: int) -> Tensor:
        return h_RD if h_RD.any() else -h_RD


class Copies(Sampler):
    name = "copies"

    def latent(self, h_RD: Tensor, draw: Draw, step: int) -> Tensor:
        return h_RD * torch.tensor([2.0], device=h_RD.device)


class Selects(Sampler):
    name = "selects"

    def latent(self, h_RD: Tensor, draw: Draw, step: int) -> Tensor:
        h_RD[draw.rollouts_R > 0] *= 2
        return h_RD


@pytest.mark.parametrize("sampler", [Waits(), Copies(), Selects()])
def test_one_that_does_is_found(sampler):
    with pytest.raises((RuntimeError, NotImplementedError, AssertionError), match=r"meta|torch\.tensor"):
        check("gpt2", sampler, {})
