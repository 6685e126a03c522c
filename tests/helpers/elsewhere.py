"""The engine on a device that is not the CPU, for machines without one: `python tests/elsewhere.py`.

Tensors of the device `elsewhere` compute on the CPU, and are refused what a GPU's are: an operation with tensors of the
CPU, NumPy's view. So the engine takes the ways it takes on CUDA (random numbers by torch, no packed weights), in
float64, where its results must be those of the CPU. Speed, memory and CUDA's own rounding are not tested by this.

A process of its own, since torch knows one such device for good.
"""

from __future__ import annotations

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

import devices  # noqa: E402

from latent_tts.engine import head, prompts  # noqa: E402
from latent_tts.random import draw as rng  # noqa: E402

CPU, ELSEWHERE = torch.device("cpu"), torch.device("elsewhere:0")
head.VALUES_AT_ONCE["elsewhere"] = head.VALUES_AT_ONCE["cuda"]
head.SORTED_AT_ONCE["elsewhere"] = head.SORTED_AT_ONCE["cuda"]
rng.BLOCKS_AHEAD["elsewhere"] = rng.BLOCKS_AHEAD["cuda"]
prompts.TOKENS_AT_ONCE["elsewhere"] = 40  # some of the prompts come in pieces
prompts.PADDING["elsewhere"] = 10


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
    name = function.overloadpacket.__name__
    there = any(isinstance(leaf, There) for leaf in tree_leaves((args, kwargs)))
    if there and name not in ("_to_copy", "copy_"):  # which take tensors of the CPU on a GPU as well
        places = name in ("index", "index_put_") and isinstance(args[0], There)  # which take places of the CPU there
        tensors = [leaf for leaf in tree_leaves((args[::2] if places else args, kwargs)) if isinstance(leaf, Tensor)]
        foreign = [tensor for tensor in tensors if not isinstance(tensor, There) and not goes_along(function, tensor)]
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


def goes_along(function: Any, tensor: Tensor) -> bool:
    """Whether a GPU takes a number from the CPU there: pointwise operators do."""
    return tensor.dim() == 0 and torch.Tag.pointwise in function.tags


def moved(module: nn.Module) -> Any:
    """The module with its weights on that device."""
    for part in module.modules():
        for name, weight in part._parameters.items():
            part._parameters[name] = None if weight is None else nn.Parameter(There(weight.data), False)
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else There(buffer)
    return module


def main() -> None:
    """Compare both devices."""
    place = devices.Place(ELSEWHERE, moved, Dispatch)
    for name, case in devices.cases():
        print(name, end="", flush=True)
        devices.same(case, place, tolerance=1e-9)
        print(": same", flush=True)


if __name__ == "__main__":
    main()
