"""Checks that a resumed training run has the same weights as one that was never stopped."""

import signal

import pytest
import torch
from safetensors.torch import load_file

from latent_tts.task.arith import Arith
from latent_tts.training.optimization import ReasonerOptimization
from latent_tts.training.reasoner import train as training
from latent_tts.training.reasoner.pace import Pace
from latent_tts.training.reasoner.questions import TrainingQuestions
from latent_tts.training.states import last_state, resumable_state


def train(recipe, adapter, output, optimization, *, valid=8, save_every=2, report=lambda *a: None):
    """Train on `arith` in a folder of states."""
    task = Arith("valid", valid, None, 0)
    return training.train(
        adapter,
        TrainingQuestions(Arith("train", None, None, 0).stream, task.questions(), task.rule),
        optimization,
        training.trainer_arguments(optimization, output, seed=0, device="cpu"),
        Pace(recipe, save_every),
        resumable_state(output),
        seed=0,
        report=report,
    )


def check_resume(recipe, adapter, folder, own: str) -> None:
    """Train 5 updates twice, once with Ctrl-C after 3; `own` is a tensor of the family that the state must contain."""
    optimization = ReasonerOptimization(
        batch=4, accumulation=2, lr=1e-2, cosine_updates=10, warmup=2, weight_decay=0.01, clip=1.0, bf16=False
    )

    def stop(done, figures):
        if done == 3:
            signal.raise_signal(signal.SIGINT)

    def run(name, **more):
        train(recipe, adapter, folder / name, optimization, valid=4, save_every=100, **more)

    with pytest.raises(KeyboardInterrupt, match="the state after update 3 of 5 is saved"):
        run("stopped", report=stop)
    run("stopped")
    run("whole")
    a, b = (load_file(last_state(folder / name) / "model.safetensors") for name in ("stopped", "whole"))
    assert own in b
    assert all(torch.equal(a[name], b[name]) for name in b)
