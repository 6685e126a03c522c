"""The engine on a device that is not the CPU, for machines without one: `python tests/elsewhere.py`.

Tensors of the device `elsewhere` compute on the CPU, and are refused what a GPU's are: an operation with tensors of the
CPU, NumPy's view. So the engine takes the ways it takes on CUDA (random numbers by torch, no packed weights), in
float64, where its results must be those of the CPU. Speed, memory and CUDA's own rounding are not tested by this.

A process of its own, since torch knows one such device for good.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend


class _Backend(_DummyBackendModule):
    """What torch asks a device's module for; random numbers of its own it has none."""

    def device_count(self) -> int:
        return 0


torch.inference_mode = torch.no_grad  # tensors of Python's making cannot be sliced under inference_mode
_setup_privateuseone_for_python_backend("elsewhere", _Backend())
torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(numbers, device=...) comes by here too

import tiny  # noqa: E402
from latent_tts.decoding import AnswerSampling  # noqa: E402
from latent_tts.engine import head, rollout  # noqa: E402
from latent_tts.engine.rollout import Engine, Plan, Rollouts  # noqa: E402
from latent_tts.engine.scoring import LatentScorer  # noqa: E402
from latent_tts.labelling import label_batch  # noqa: E402
from latent_tts.rng import Draw  # noqa: E402
from latent_tts.sampler.control import Control  # noqa: E402
from latent_tts.sampler.dropout import Dropout  # noqa: E402
from latent_tts.sampler.gaussian import Gaussian  # noqa: E402
from latent_tts.sampler.greedy import Greedy  # noqa: E402
from latent_tts.schedule.jacobi import Jacobi  # noqa: E402
from latent_tts.search.beam import Beam  # noqa: E402
from latent_tts.types import Reasoner, RewardModel  # noqa: E402
from test_labelling import jobs, labelling  # noqa: E402

CPU, ELSEWHERE = torch.device("cpu"), torch.device("elsewhere:0")
head.VALUES_AT_ONCE["elsewhere"] = head.VALUES_AT_ONCE["cuda"]
rollout.PROMPT_TOKENS_AT_ONCE["elsewhere"] = 40  # some of the prompts below come in pieces
rollout.PROMPT_PADDING["elsewhere"] = 10


class There(Tensor):
    """A tensor of that device, around one of the CPU."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> There:
        made = Tensor._make_wrapper_subclass(
            cls, here.shape, here.stride(), here.storage_offset(), dtype=here.dtype, device=ELSEWHERE
        )
        made.here = here
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return computed(function, args, kwargs or {})

    def tolist(self) -> Any:
        return self.here.tolist()


class Dispatch(TorchDispatchMode):
    """Makes what is asked for on that device."""

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return computed(function, args, kwargs or {})


def computed(function: Any, args: tuple, kwargs: dict) -> Any:
    """An operator's result, on the device it should be on."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    name = function.overloadpacket.__name__
    there = any(isinstance(tensor, There) for tensor in tensors)
    if there and name not in ("_to_copy", "copy_", "index"):  # which take tensors of the CPU on a GPU as well
        foreign = [tensor for tensor in tensors if not isinstance(tensor, There) and tensor.dim() > 0]
        assert not foreign, f"{function} of tensors on two devices"
    device = torch.device(kwargs.get("device") or (ELSEWHERE if there else CPU))
    inner_args, inner_kwargs = tree_map(lambda leaf: leaf.here if isinstance(leaf, There) else leaf, (args, kwargs))
    if "device" in kwargs:
        inner_kwargs["device"] = CPU
    result = function(*inner_args, **inner_kwargs)
    if function._schema.is_mutable:
        return kwargs.get("out", args[0])
    wrap = device.type == ELSEWHERE.type
    return tree_map(lambda leaf: There(leaf) if wrap and isinstance(leaf, Tensor) else leaf, result)


def moved(module: nn.Module, device: torch.device) -> Any:
    """The module with its weights on a device."""
    if device == ELSEWHERE:
        for part in module.modules():
            for name, weight in part._parameters.items():
                part._parameters[name] = None if weight is None else nn.Parameter(There(weight.data), False)
            for name, buffer in part._buffers.items():
                part._buffers[name] = None if buffer is None else There(buffer)
    return module


def reasoner(family: str, device: torch.device) -> Reasoner:
    made = tiny.reasoner(family)
    return Reasoner(moved(made.lm, device), made.next_latent)


def scorer(family: str, device: torch.device) -> LatentScorer:
    return LatentScorer(RewardModel(moved(tiny.reward_model(family).backbone, device), lambda hidden: hidden[..., 0]))


def check(name: str, values_on: Callable[[torch.device], list[Tensor | list]]) -> None:
    """Compare what is computed on both devices."""
    expected = values_on(CPU)
    with Dispatch():
        found = values_on(ELSEWHERE)
    for ours, theirs in zip(found, expected, strict=True):
        assert type(ours) is type(theirs), name
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9, equal_nan=True, msg=lambda text: f"{name}: {text}")
    print("same:", name, flush=True)


def values(rollouts: Rollouts) -> list[Tensor | list]:
    latents = rollouts.latents_RTD.double().mul(1e-3)  # kept in float32
    return [latents, rollouts.steps_R, [float(i) for ids in rollouts.answer_ids for i in ids], rollouts.stopped_R]


def rolled(family: str, plan: Plan, sampler: Any) -> Callable[[torch.device], list]:
    prompts, ids = tiny.prompts([1, 9, 4]), ["a", "b", "c"]

    def values_on(device: torch.device) -> list:
        engine, rollouts_QN = Engine(reasoner(family, device), plan), torch.arange(4).repeat(3, 1).to(device)
        donor_RTD = None
        if sampler.needs_donor:
            donor_RTD = torch.ones(12, plan.latents, tiny.WIDTH, dtype=torch.float64).to(device)
        draw = Draw.of(0, ids, rollouts_QN, tiny.WIDTH, engine.blocks)
        return values(engine.roll(prompts, draw, sampler, donor_RTD=donor_RTD))

    return values_on


def labelled(family: str, sampler: Any) -> Callable[[torch.device], list]:
    def values_on(device: torch.device) -> list:
        engine = Engine(reasoner(family, device), tiny.plan(3, eos_id=tiny.EOS_IDS[family], answer=3))
        return [torch.from_numpy(entry.labels_NT) for entry in label_batch(jobs(), engine, sampler, labelling())[0]]

    return values_on


def scored(family: str) -> Callable[[torch.device], list]:
    latents_RTD = torch.randn(9, 5, tiny.WIDTH, generator=torch.Generator().manual_seed(0)).double()

    def values_on(device: torch.device) -> list:
        prompts, steps_R = tiny.prompts([9, 4, 6]), torch.arange(9) % 6
        shifts_Q = torch.tensor([0, 7, 40]).to(device)
        scores = scorer(family, device).score(prompts, latents_RTD, steps_R=steps_R, shifts_Q=shifts_Q)
        return [scores.cpu()]

    return values_on


def searched(family: str, sampler: Any) -> Callable[[torch.device], list]:
    def values_on(device: torch.device) -> list:
        engine = Engine(reasoner(family, device), tiny.plan(3, eos_id=tiny.EOS_IDS[family], answer=2))
        ids, prompts = ["a", "b"], tiny.prompts([5, 1])
        return values(Beam(2, 2, False).roll(engine, scorer(family, device), "sum", prompts, ids, sampler, 0))

    return values_on


def main() -> None:
    """Compare both devices."""
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
                check(f"{family}, {name}, {sampler}", rolled(family, plan, sampler))
        check(f"{family}, scores", scored(family))
        for sampler in (noise, masks):
            check(f"{family}, labels, {sampler}", labelled(family, sampler))
            check(f"{family}, beams, {sampler}", searched(family, sampler))


if __name__ == "__main__":
    main()
