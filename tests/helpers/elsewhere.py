"""Tests engine and training on a simulated device, for machines without a GPU: `python tests/helpers/elsewhere.py`.

Tensors on the device `elsewhere` compute on the CPU, but refuse what tensors on a GPU refuse: operations with tensors
on the CPU, and views by NumPy. The engine therefore runs the same code as on CUDA (random numbers by torch, no packed
weights), in float64, and its results must equal those on the CPU. Speed, memory and the rounding of CUDA are not
tested.

It needs its own process, since torch registers such a device permanently.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend


class _Backend(_DummyBackendModule):
    """The module of the device, as torch requires it; it has no random number generator."""

    def device_count(self) -> int:
        return 0

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


torch.inference_mode = torch.no_grad  # tensor subclasses cannot be sliced under inference_mode
_setup_privateuseone_for_python_backend("elsewhere", _Backend())
torch._C._set_only_lift_cpu_tensors(True)  # otherwise torch.tensor(numbers, device=...) skips the dispatch

import devices  # noqa: E402
import objectives  # noqa: E402
import tiny  # noqa: E402

from latent_tts.engine import head, prompts  # noqa: E402
from latent_tts.random import bits  # noqa: E402
from latent_tts.random import draw as rng  # noqa: E402
from latent_tts.task.arith import Arith, words  # noqa: E402
from latent_tts.training.reasoner.backbone import BackboneConfig, word_level_tokenizer  # noqa: E402
from latent_tts.training.reasoner.train import ReasonerModule  # noqa: E402
from latent_tts.training.reward_model.loss import RewardLoss  # noqa: E402
from latent_tts.training.reward_model.model import LatentRMModule  # noqa: E402

CPU, ELSEWHERE = torch.device("cpu"), torch.device("elsewhere:0")
head.VALUES_AT_ONCE["elsewhere"] = head.VALUES_AT_ONCE["cuda"]
head.SORTED_AT_ONCE["elsewhere"] = head.SORTED_AT_ONCE["cuda"]
rng.BLOCKS_AHEAD["elsewhere"] = rng.BLOCKS_AHEAD["cuda"]
prompts.TOKENS_AT_ONCE["elsewhere"] = 40  # so that some prompts run in pieces
prompts.PADDING["elsewhere"] = 10


class There(Tensor):
    """A tensor on the simulated device, which wraps a tensor on the CPU."""

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
    """Handles operators that create tensors on the simulated device."""

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return computed(function, args, kwargs or {})


def computed(function: Any, args: tuple, kwargs: dict) -> Any:
    """Run an operator on the CPU and wrap its result if it belongs on the simulated device."""
    name = function.overloadpacket.__name__
    there = any(isinstance(leaf, There) for leaf in tree_leaves((args, kwargs)))
    if there and name not in ("_to_copy", "copy_"):  # these accept both devices on a GPU too
        places = name in ("index", "index_put_") and isinstance(args[0], There)  # indices may be on the CPU
        tensors = [leaf for leaf in tree_leaves((args[::2] if places else args, kwargs)) if isinstance(leaf, Tensor)]
        foreign = [
            tensor for tensor in tensors if not isinstance(tensor, There) and not is_accepted_scalar(function, tensor)
        ]
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


def is_accepted_scalar(function: Any, tensor: Tensor) -> bool:
    """Whether a GPU accepts this tensor from the CPU: pointwise operators accept scalars."""
    return tensor.dim() == 0 and torch.Tag.pointwise in function.tags


def moved(module: nn.Module, *, trained: bool = False) -> Any:
    """Move the weights of a module to the simulated device."""
    made: dict[int, nn.Parameter] = {}  # tied weights stay tied
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                there = made.setdefault(id(weight), nn.Parameter(There(weight.data), trained))
                part._parameters[name] = there
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else There(buffer)
    return module


def training_losses(family: str, checkpoint: Path, folder: Path, *, there: bool) -> list[Tensor]:
    """The loss of each stage and its gradients, and the numbers of exact answers, in float64 without dropout."""
    recipe, adapter = objectives.made(family, checkpoint, folder)
    module = ReasonerModule(recipe.objective(adapter)).double().eval()
    module = moved(module, trained=True) if there else module
    questions, values = Arith("valid", 5, None, 0).questions(), []
    for stage in recipe.stages():
        loss = module(questions, stage)
        gradients = torch.autograd.grad(loss, list(module.parameters()), allow_unused=True)
        with torch.no_grad():
            hits = module.objective.exact_matches(questions, stage)
        values += [loss, *(gradient for gradient in gradients if gradient is not None), torch.tensor(float(hits))]
    return [value.here if isinstance(value, There) else value for value in values]


def reward_loss(*, there: bool) -> list[Tensor]:
    """The loss of a LatentRM and its gradients, in float64."""
    module = LatentRMModule(tiny.reasoner("llama").lm, seed=0)
    module = moved(module, trained=True) if there else module
    random = torch.Generator().manual_seed(0)
    batch = [torch.tensor([[3, 4, 5], [6, 7, 0]]), torch.tensor([3, 2])]
    latents_QNTD = torch.randn(2, 4, 3, tiny.WIDTH, generator=random).double()
    batch += [latents_QNTD, torch.rand(2, 4, 3, generator=random).double()]
    batch += [torch.tensor([[True, False, True, False]] * 2)]
    if there:
        batch = [There(value) for value in batch]
    loss = RewardLoss("contrastive", False)(module(*batch[:3]), *batch[3:])
    gradients = torch.autograd.grad(loss, list(module.parameters()), allow_unused=True)
    values = [loss, *(gradient for gradient in gradients if gradient is not None)]
    return [value.here if isinstance(value, There) else value for value in values]


def check_training() -> None:
    """Check the objective of every family, and that of LatentRM."""
    expected = reward_loss(there=False)
    with Dispatch():
        found = reward_loss(there=True)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    print("LatentRM, training: same", flush=True)
    with TemporaryDirectory() as place:
        checkpoint = Path(place) / "checkpoint"
        checkpoint.mkdir()
        BackboneConfig(2, 16, 2, 128, 0.0, 0.5).create(word_level_tokenizer(words()), checkpoint, seed=3)
        for family in objectives.RECIPES:
            expected = training_losses(family, checkpoint, Path(place) / family, there=False)
            with Dispatch():
                found = training_losses(family, checkpoint, Path(place) / family, there=True)
            for ours, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-5, atol=1e-6)  # losses are float32
            print(f"{family}, training: same", flush=True)


def check_tests_of_graphs() -> None:
    """Run the tests of graphs that are for a GPU, whose own lines may mix devices; nothing is recorded."""
    sys.path.append(str(Path(__file__).parents[1] / "engine"))
    test_graphs, test_graph_scoring = map(import_module, ("test_graphs", "test_graph_scoring"))
    to, decide = nn.Module.to, bits.decide
    nn.Module.to = lambda module, place: moved(module) if place == ELSEWHERE else to(module, place)
    bits.decide = test_graphs.decide
    with Dispatch():
        for case in test_graphs.FEW:
            test_graphs.check_on(ELSEWHERE, devices.Runs, *case)
            print(f"{', '.join(case)}, as tested on a GPU: same", flush=True)
        test_graph_scoring.check("gpt2", devices.Runs, device=ELSEWHERE)
        print("gpt2, scores, as tested on a GPU: same", flush=True)
    nn.Module.to, bits.decide = to, decide


def main() -> None:
    """Check all cases."""
    check_training()
    check_tests_of_graphs()
    place = devices.Place(ELSEWHERE, moved, Dispatch)
    for name, case in devices.cases():
        print(name, end="", flush=True)
        devices.check_same(case, place, tolerance=1e-9)
        print(": same", flush=True)


if __name__ == "__main__":
    main()
