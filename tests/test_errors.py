"""Failures while computing."""

import weakref

import pytest
import torch

from latent_tts.errors import RunError, computing


def test_what_failed_leaves_no_tensors_behind_for_whoever_keeps_the_error():
    left = []

    def draw():
        caches = torch.zeros(3)
        left.append(weakref.ref(caches))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried\nmore")

    with (
        pytest.raises(RunError, match="drawing failed: CUDA out of memory") as kept,
        computing("drawing", "kept"),
    ):
        draw()
    assert kept.value.__cause__ is not None
    assert left[0]() is None
