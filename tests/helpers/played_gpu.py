"""A GPU played by the CPU: `python tests/helpers/played_gpu.py run engine.device=cuda ...` runs a command on it.

Tensors on the device `elsewhere` compute on the CPU, and refuse what tensors on a GPU refuse: operations with tensors
on the CPU, and views by NumPy. What is copied without waiting arrives when it is waited for; until then there are
zeros. What is captured as a CUDA graph does not run. Replays run its operators in the same memory, and leave nothing of
what they made on the way. A capture fails where the host waits or copies. So commands run the code that they run on
CUDA, but for Triton's kernels. Speed, memory and the rounding of CUDA are not played.

It needs its own process, since it changes torch, which registers such a device permanently.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch._dynamo  # imported before what they look at is changed
import transformers.integrations.hub_kernels
import transformers.modeling_utils  # noqa: F401
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


_setup_privateuseone_for_python_backend("elsewhere", _Backend())
CPU, GPU = torch.device("cpu"), torch.device("elsewhere:0")
FREE = 8 << 30  # bytes
GARBAGE = 0x5A  # of each byte of memory that holds nothing
MAY_WAIT = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim",
            "unique_consecutive", "repeat_interleave", "bincount"}  # fmt: skip

torch.inference_mode = torch.no_grad  # tensor subclasses cannot be sliced under inference_mode
torch._C._set_only_lift_cpu_tensors(True)  # otherwise torch.tensor(numbers, device=...) skips the dispatch


class There(Tensor):
    """A tensor on the played GPU, which wraps a tensor on the CPU."""

    here: Tensor
    is_cuda = True  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, here: Tensor) -> There:
        made = Tensor._make_wrapper_subclass(
            cls, here.shape, here.stride(), here.storage_offset(), dtype=here.dtype, device=GPU
        )
        made.here = here
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return computed(function, args, kwargs or {})

    def tolist(self) -> Any:
        return self.cpu().tolist()


class Dispatch(TorchDispatchMode):
    """Handles operators that create tensors on the played GPU."""

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return computed(function, args, kwargs or {})


# --- waiting


class Queue:
    """What the GPU was told to copy to the host and was not waited for."""

    def __init__(self) -> None:
        self.copies: list[Callable[[], object]] = []
        self.done = 0

    def later(self, target: Tensor, source: Tensor) -> None:
        """Copy at the next wait; there are zeros until then, as if no row went on."""
        kept = source.clone()
        target.zero_()
        self.copies.append(lambda: target.copy_(kept))

    def wait(self, until: int | None = None) -> None:
        """Wait until so many copies are done."""
        refuse_in_capture("the host waits")
        while self.done < (len(self.copies) if until is None else until):
            self.copies[self.done]()
            self.copies[self.done] = lambda: None
            self.done += 1


QUEUE = Queue()
PINNED: set[int] = set()


class Event:
    """A CUDA event."""

    def __init__(self, **settings: object) -> None:
        self._until: int | None = None

    def record(self, stream: object = None) -> None:
        self._until = len(QUEUE.copies)

    def synchronize(self) -> None:
        if self._until is not None:
            QUEUE.wait(self._until)


class Stream:
    """A stream; there is one."""

    def __init__(self, *settings: object) -> None:
        pass


# --- graphs


class Graph:
    """A CUDA graph."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, tuple, dict, Any]] = []
        self.made: dict[int, Tensor] = {}  # memory of its own, by address
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # what other memory held

    def take(self, function: Any, args: tuple, kwargs: dict) -> Any:
        """Capture an operator; its result is what it computes, until the capture ends."""
        if function._schema.is_mutable:
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, Tensor) and address(leaf) not in self.made | self.before:
                    whole = memory(leaf)
                    self.before[address(leaf)] = whole, whole.clone()
        given = {address(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = function(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and address(leaf) not in given:
                self.made[address(leaf)] = memory(leaf)
        self.calls.append((function, args, kwargs, result))
        return result

    def end(self) -> None:
        """Nothing has run."""
        for whole, before in self.before.values():
            whole.copy_(before)
        self.before.clear()
        self.forget()

    def forget(self) -> None:
        """Other graphs use its memory."""
        for whole in self.made.values():
            whole.fill_(GARBAGE)

    def replay(self) -> None:
        """Run the operators where they ran."""
        refuse_in_capture("a graph is replayed")
        for function, args, kwargs, result in self.calls:
            found = function(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(found), strict=True):
                if isinstance(old, Tensor) and address(old) != address(new):
                    old.copy_(new)
        self.forget()


def address(tensor: Tensor) -> int:
    """Of a tensor's memory."""
    return tensor.untyped_storage().data_ptr()


def memory(tensor: Tensor) -> Tensor:
    """All bytes of a tensor's memory."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


CAPTURING: list[Graph] = []


def refuse_in_capture(what: str) -> None:
    """Fail where something is not permitted in a capture."""
    if CAPTURING:
        raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({what})")


@contextmanager
def captured(graph: Graph, pool: object, stream: object, capture_error_mode: str = "global") -> Iterator[None]:
    """`torch.cuda.graph`."""
    QUEUE.wait()
    CAPTURING.append(graph)
    try:
        yield
    finally:
        CAPTURING.pop()
        graph.end()


# --- operators


def computed(function: Any, args: tuple, kwargs: dict) -> Any:
    """Run an operator on the CPU and wrap its result if it belongs on the played GPU."""
    name = function.overloadpacket.__name__
    leaves = tree_leaves((args, kwargs))
    there = any(isinstance(leaf, There) for leaf in leaves)
    device = torch.device(kwargs.get("device") or (GPU if there else CPU))
    crosses = name in ("_to_copy", "copy_")  # between devices
    if there and not crosses:
        places = name in ("index", "index_put_") and isinstance(args[0], There)  # indices may be on the CPU
        tensors = [leaf for leaf in tree_leaves((args[::2] if places else args, kwargs)) if isinstance(leaf, Tensor)]
        foreign = [
            tensor for tensor in tensors if not isinstance(tensor, There) and not is_accepted_scalar(function, tensor)
        ]
        assert not foreign, f"{function} of tensors on two devices"
        if places and any(
            isinstance(leaf, Tensor) and (not isinstance(leaf, There) or leaf.dtype == torch.bool)
            for leaf in tree_leaves(args[1])
        ):
            QUEUE.wait()
        if name in MAY_WAIT and "output_size" not in kwargs:
            QUEUE.wait()
    inner_args, inner_kwargs = tree_map(lambda leaf: leaf.here if isinstance(leaf, There) else leaf, (args, kwargs))
    if "device" in kwargs:
        inner_kwargs["device"] = CPU
    pinned = inner_kwargs.pop("pin_memory", False)
    if crosses and crossing(name, args, inner_args, kwargs, device):
        return args[0]
    on_gpu = there or device.type == GPU.type
    run = CAPTURING[-1].take if CAPTURING and on_gpu else call
    result = run(function, inner_args, inner_kwargs)
    if pinned:
        PINNED.add(address(result))
    if function._schema.is_mutable:
        return kwargs.get("out", args[0])
    wrap = device.type == GPU.type
    return tree_map(lambda leaf: There(leaf) if wrap and isinstance(leaf, Tensor) else leaf, result)


def call(function: Any, args: tuple, kwargs: dict) -> Any:
    """Run an operator."""
    return function(*args, **kwargs)


def crossing(name: str, args: tuple, inner: tuple, kwargs: dict, device: torch.device) -> bool:
    """A copy between host and GPU, waited for unless memory is pinned; returns whether it is under way."""
    if name == "copy_":
        target, source, late = args[0], args[1], (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        to_host = isinstance(source, There) and not isinstance(target, There)
        to_gpu = isinstance(target, There) and isinstance(source, Tensor) and not isinstance(source, There)
        host = inner[0] if to_host else inner[1]
    else:
        to_host, to_gpu = isinstance(args[0], There) and device == CPU, not isinstance(args[0], There) and device != CPU
        late, host = kwargs.get("non_blocking", False), inner[0]
    if not (to_host or to_gpu):
        return False
    refuse_in_capture("a copy from the host" if to_gpu else "a copy to the host")
    if late and to_host and name == "copy_" and address(host) in PINNED:
        QUEUE.later(inner[0], inner[1])
        return True
    QUEUE.wait()
    return False


def is_accepted_scalar(function: Any, tensor: Tensor) -> bool:
    """Whether a GPU accepts this tensor from the CPU: pointwise operators accept scalars."""
    return tensor.dim() == 0 and torch.Tag.pointwise in function.tags


def moved(module: nn.Module, *, trained: bool = False) -> Any:
    """Move the weights of a module to the played GPU."""
    made: dict[int, nn.Parameter] = {}  # tied weights stay tied
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None and not isinstance(weight.data, There):
                there = made.setdefault(id(weight), nn.Parameter(There(weight.data), trained))
                part._parameters[name] = there
        for name, buffer in part._buffers.items():
            part._buffers[name] = buffer if buffer is None or isinstance(buffer, There) else There(buffer)
    return module


# --- torch


def play() -> None:
    """Let this process have the GPU."""
    from latent_tts.engine import attention, device, head, packing, prompts
    from latent_tts.pipeline import models
    from latent_tts.random import draw

    for limits in (
        head.VALUES_AT_ONCE,
        head.SORTED_AT_ONCE,
        draw.BLOCKS_AHEAD,
        prompts.TOKENS_AT_ONCE,
        prompts.PADDING,
    ):
        limits[GPU.type] = limits["cuda"]
    device.GPU_PRODUCT_ROWS, device.GPU_COPIED, device.GPU_CALLS = 8, 1 << 12, 1  # whose speed is not played
    asking: list[Any] = [device, packing, models]
    for module in asking:
        module.is_gpu = lambda place: torch.device(place).type == GPU.type
    launching: list[Any] = [attention, head]
    for module in launching:
        module.has_kernel = lambda like: False
    models.resolve_device = lambda key, wanted: str(GPU) if wanted.startswith("cuda") else "cpu"
    kind: Any = nn.Module
    to = kind.to

    def moved_to(module: nn.Module, *args: Any, **settings: Any) -> nn.Module:
        there = [place for place in (*args, *settings.values()) if isinstance(place, str | torch.device)]
        if not there or torch.device(there[0]).type != GPU.type:
            return to(module, *args, **settings)
        rest = [each for each in args if not isinstance(each, str | torch.device)]
        return moved(to(module, *rest) if rest else module)

    kind.to = moved_to
    cuda: Any = torch.cuda

    def nothing(*args: Any, **settings: Any) -> None:
        """As where there is nothing to do."""

    for name in ("_lazy_init", "empty_cache", "reset_peak_memory_stats", "get_rng_state", "set_rng_state"):
        setattr(cuda, name, nothing)
    for name in ("device", "device_of", "stream"):
        setattr(cuda, name, lambda *args: nullcontext())
    for name in ("memory_reserved", "memory_allocated", "max_memory_allocated"):
        setattr(cuda, name, lambda *args: 0)
    cuda.is_available, cuda.device_count = lambda: True, lambda: 1
    cuda.mem_get_info = lambda *args: (FREE, FREE)
    cuda.get_device_name, cuda.get_device_capability = lambda *args: "played GPU", lambda *args: (9, 0)
    cuda.synchronize = lambda *args: QUEUE.wait()
    cuda.current_stream, cuda.Stream, cuda.Event = nothing, Stream, Event
    cuda.CUDAGraph, cuda.graph, cuda.graph_pool_handle = Graph, captured, lambda: (0, 0)
    torch._C._cuda_endAllocateToPool = torch._C._cuda_releasePool = nothing


def main() -> int:
    """Run a command on the GPU."""
    from latent_tts import cli

    play()
    with Dispatch():
        return cli.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
