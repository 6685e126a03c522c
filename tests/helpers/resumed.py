"""A training that was stopped goes on to the weights of one that was not."""

import pytest
import torch
from safetensors.torch import load_file

from latent_tts.task.arith import Arith
from latent_tts.training.reasoner import loop


def check_resume(recipe, adapter, folder, own: str) -> None:
    """Train 5 updates twice, once stopped after 3; `own` is a tensor of the family's that the state has to hold."""
    optimization = loop.Optimization(4, 1e-2, 10, 2, 0.01, 1.0, bf16=False)

    class Stop(Exception):
        pass

    def stop(done, record):
        if done == 3:
            raise Stop

    def train(name, report=lambda *a: None):
        (folder / name).mkdir(exist_ok=True)
        valid = Arith("valid", 4, None, 0).questions()
        stream = Arith("train", None, None, 0).stream()
        return loop.train(
            recipe, adapter, stream, valid, optimization,
            seed=0, output=folder / name, settings={}, save_every=1, report=report,
        )  # fmt: skip

    with pytest.raises(Stop):
        train("stopped", stop)
    assert train("stopped")["update"] == train("whole")["update"] == 5
    a, b = (load_file(folder / name / "state.safetensors") for name in ("stopped", "whole"))
    assert own in b
    assert all(torch.equal(a[name], b[name]) for name in b)
