"""How far a batch has come: the first one of a large model on a CPU may take minutes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from latent_tts.engine.cost import Shape
from latent_tts.engine.packing import RolloutJob
from latent_tts.results.report import ProgressBar

MAX_SHARE = 0.98  # of a batch that is not done yet


class BatchProgress:
    """Moves a bar after each forward pass of a model.

    A pass counts by the operations of its blocks. What a batch takes is estimated at first as if every answer were as
    long as allowed, then by what the batches before it took.
    """

    def __init__(
        self, bar: ProgressBar, model: nn.Module, shape: Shape, max_flops: Callable[[RolloutJob], float]
    ) -> None:
        """Prepare the bar of a stage.

        Args:
            bar: its total is the number of rollouts.
            model: whose passes count.
            shape: of the model.
            max_flops: operations that a job takes at most.
        """
        self._bar, self._model, self._shape, self._max_flops = bar, model, shape, max_flops
        self._ratio = 1.0  # of what a batch took to what it takes at most
        self._flops = 0.0  # of the batch so far

    @contextmanager
    def batch(self, jobs: Sequence[RolloutJob]) -> Iterator[None]:
        """Move the bar while a batch is computed, and to its end afterwards."""
        rows, most = sum(len(job.rollouts) for job in jobs), sum(map(self._max_flops, jobs))
        self._flops = 0.0

        def count(_module: nn.Module, _arguments: Any, output: Any) -> None:
            positions = output[0].shape[0] * output[0].shape[1]
            self._flops += positions * self._shape.pass_flops(1, 0)
            self._bar.show_part(rows * min(MAX_SHARE, self._flops / (most * self._ratio)))

        if not self._bar.visible:
            yield
        else:
            hook = self._model.register_forward_hook(count)
            try:
                yield
            finally:
                hook.remove()
            self._ratio = self._flops / most or 1.0
        self._bar.advance(rows)
