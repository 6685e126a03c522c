"""Recorders of operators, in place of CUDA graphs of kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


def _memory_of(value: object) -> set[int]:
    return {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(value) if isinstance(leaf, Tensor)}


def _replaced(made: dict[int, object], value: object) -> object:
    return made.get(id(value), value)


class Recording(TorchDispatchMode):
    """Records the operators of a pass and the tensors that they are given, as a CUDA graph records kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []
        self.recorded = 0
        self.given: set[int] = set()  # memory that is not the recording's own
        self.own: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.given |= _memory_of((args, kwargs)) - self.own
        out = func(*args, **(kwargs or {}))
        self.own |= _memory_of(out) - self.given
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def overwrite(self) -> None:
        """Overwrite what the recording made: others share its memory, so nothing may be read after it."""
        for *_, out in self.calls:
            for tensor in tree_leaves(out):
                if isinstance(tensor, Tensor) and _memory_of(tensor) <= self.own:
                    torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).fill_(1)

    def record(self, run: Callable[[], None], tensors: list[Tensor]) -> Callable[[], object]:
        self.recorded += 1
        before, self.calls = [tensor.clone() for tensor in tensors], []
        self.given, self.own = _memory_of(tensors), set()
        with self:
            run()
        self.overwrite()
        for tensor, value in zip(tensors, before, strict=True):
            tensor.copy_(value)  # a GPU runs nothing while it records
        calls = self.calls

        def replay() -> None:
            made: dict[int, object] = {}
            for func, args, kwargs, out in calls:
                args, kwargs = tree_map(partial(_replaced, made), (args, kwargs))
                result = func(*args, **kwargs)
                made |= {id(old): new for old, new in zip(tree_leaves(out), tree_leaves(result), strict=True)}

        return replay


class Tracer(Recording):
    """The same by `make_fx`, which is slower."""

    def record(self, run: Callable[[], None], tensors: list[Tensor]) -> Callable[[], object]:
        def traced(*tensors):
            run()
            return tensors

        self.recorded += 1
        before = [tensor.clone() for tensor in tensors]
        module = make_fx(traced)(*tensors)
        for tensor, value in zip(tensors, before, strict=True):
            tensor.copy_(value)
        return lambda: module(*tensors)
