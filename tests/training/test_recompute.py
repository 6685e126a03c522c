"""Gradient checkpointing: the same gradients from fewer kept activations."""

import pytest
import torch
from objectives import RECIPES, made
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM, LlamaConfig

from latent_tts.errors import UsageError
from latent_tts.task.arith import Arith
from latent_tts.training.reasoner.batch import Sequences
from latent_tts.training.reasoner.train import ReasonerModule
from latent_tts.training.recompute import recomputing_blocks


def gradients(module, questions, stage):
    """The loss, every gradient, and the bytes that the backward pass was kept."""
    kept = []

    def keep(tensor):
        kept.append(tensor.numel() * tensor.element_size())
        return tensor

    module.zero_grad()
    torch.manual_seed(0)  # of dropout
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = module(questions, stage)
    loss.backward()
    return loss, {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}, sum(kept)


@pytest.mark.parametrize("family", RECIPES)
def test_gradients_of_every_family_are_equal_and_less_is_kept(family, checkpoint, tmp_path):
    recipe, adapter = made(family, checkpoint, tmp_path / "initial")
    module, questions = ReasonerModule(recipe.objective(adapter)), Arith("valid", 5, None, 0).questions()
    for stage in recipe.stages():
        plain = gradients(module, questions, stage)
        module.recompute = True
        again = gradients(module, questions, stage)
        module.recompute = False
        assert again[0].equal(plain[0])
        assert again[1].keys() == plain[1].keys()
        for name, gradient in plain[1].items():  # sums of the same terms, in another order
            torch.testing.assert_close(again[1][name], gradient, rtol=1e-5, atol=1e-6)
        assert again[2] < 0.8 * plain[2]


def test_passes_over_a_growing_cache_of_several_blocks_are_equal():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=9, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
                         num_key_value_heads=2)  # fmt: skip
    lm = AutoModelForCausalLM.from_config(config)
    inputs = torch.randn(2, 5, 16)

    def gradient(recompute):
        lm.zero_grad()
        rows = Sequences(lm)
        with recomputing_blocks(lm, recompute):
            outputs = [rows.feed(inputs), *(rows.feed(inputs[:, :1]) for _ in range(3))]
            outputs += [rows.fork().feed(inputs), rows.feed(inputs)]
        sum(output.last_hidden_state.square().sum() for output in outputs).backward()
        return [p.grad.clone() for p in lm.parameters() if p.grad is not None]

    assert all(map(torch.equal, gradient(True), gradient(False)))
    assert not any("forward" in vars(block) for block in lm.modules())


def test_a_model_without_known_blocks_is_refused():
    with pytest.raises(UsageError, match=r"optimization\.gradient_checkpointing=true: must be false"):
        recomputing_blocks(torch.nn.Linear(2, 2)).__enter__()
