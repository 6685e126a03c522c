"""How far a batch has come: the first one of a large model on a CPU may take minutes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from latent_tts.engine.cost import Shape
from latent_tts.engine.packing import RolloutJob
from latent_tts.results.report import ProgressBar

MAX_SHARE = 0.98  # of a batch that is not done yet


@contextmanager
def batch_progress(
    bar: ProgressBar, model: nn.Module, shape: Shape, jobs: Sequence[RolloutJob], max_flops: float
) -> Iterator[None]:
    """Move a bar after each forward pass of a model while a batch is computed, and past the batch afterwards.

    A pass counts by the operations of its blocks.

    Args:
        bar: its total is the number of rollouts.
        model: whose passes count.
        shape: of the model.
        jobs: the batch.
        max_flops: operations that it takes at most.
    """
    rows, flops = sum(len(job.rollouts) for job in jobs), 0.0

    def count(_module: nn.Module, _arguments: Any, output: Any) -> None:
        nonlocal flops
        flops += output[0].shape[0] * output[0].shape[1] * shape.pass_flops(1, 0)
        bar.show_part(rows * min(MAX_SHARE, flops / max_flops))

    if bar.visible:
        with model.register_forward_hook(count):
            yield
    else:
        yield
    bar.advance(rows)
