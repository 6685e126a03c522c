"""Tests engine and training on a played GPU, for machines without one: `python tests/helpers/elsewhere.py`.

In float64, where results must equal those on the CPU.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

import played_gpu  # isort: skip  # changes what others import
import devices
import objectives
import tiny
import torch
from played_gpu import GPU, Dispatch, There, moved
from torch import Tensor

from latent_tts.engine import prompts
from latent_tts.engine.recording import CudaRecorder
from latent_tts.task.arith import Arith, words
from latent_tts.training.reasoner.backbone import BackboneConfig, word_level_tokenizer
from latent_tts.training.reasoner.train import ReasonerModule
from latent_tts.training.reward_model.loss import RewardLoss
from latent_tts.training.reward_model.model import LatentRMModule


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
    """Run the tests of graphs that are for a GPU, whose own lines may mix devices."""
    sys.path.append(str(Path(__file__).parents[1] / "engine"))
    test_graphs, test_graph_scoring = map(import_module, ("test_graphs", "test_graph_scoring"))
    with Dispatch():
        for case in test_graphs.FEW:
            test_graphs.check_on(GPU, CudaRecorder, *case)
            print(f"{', '.join(case)}, as tested on a GPU: same", flush=True)
        test_graph_scoring.check("gpt2", CudaRecorder, device=GPU)
        print("gpt2, scores, as tested on a GPU: same", flush=True)


def main() -> None:
    """Check all cases."""
    played_gpu.play()
    check_training()
    check_tests_of_graphs()
    prompts.TOKENS_AT_ONCE[GPU.type], prompts.PADDING[GPU.type] = 40, 10  # so that some prompts run in pieces
    place = devices.Place(GPU, moved, Dispatch, CudaRecorder)
    for name, case in devices.cases():
        print(name, end="", flush=True)
        devices.check_same(case, place, tolerance=1e-9)
        print(": same", flush=True)


if __name__ == "__main__":
    main()
