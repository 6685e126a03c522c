"""Checks that a resumed training run has the same weights as one that was never stopped."""

import pytest
import torch
from safetensors.torch import load_file

from latent_tts.task.arith import Arith
from latent_tts.training.reasoner import train as training
from latent_tts.training.reasoner.optimization import ReasonerOptimization
from latent_tts.training.states import last_state


def check_resume(recipe, adapter, folder, own: str) -> None:
    """Train 5 updates twice, once with Ctrl-C after 3; `own` is a tensor of the family that the state must contain."""
    optimization = ReasonerOptimization(
        batch=4, accumulation=2, lr=1e-2, cosine_updates=10, warmup=2, weight_decay=0.01, clip=1.0, bf16=False
    )

    def stop(done, figures):
        if done == 3:
            raise KeyboardInterrupt

    def train(name, report=lambda *a: None):
        arguments = training.trainer_arguments(recipe, optimization, folder / name, seed=0, device="cpu")
        valid = Arith("valid", 4, None, 0).questions()
        stream = Arith("train", None, None, 0).stream()
        training.train(recipe, adapter, stream, valid, optimization, arguments, seed=0, save_every=100, report=report)

    with pytest.raises(KeyboardInterrupt, match="the state after update 3 of 5 is saved"):
        train("stopped", stop)
    train("stopped")
    train("whole")
    a, b = (load_file(last_state(folder / name) / "model.safetensors") for name in ("stopped", "whole"))
    assert own in b
    assert all(torch.equal(a[name], b[name]) for name in b)
