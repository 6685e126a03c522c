import copy

import pytest
import tiny
import torch
from torch import nn

from latent_tts.engine.backbone import prepare_backbone
from latent_tts.engine.prompts import pad_prompts


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_a_prepared_activation_is_the_same_function_and_rounds_no_more_than_before(dtype):
    lm = tiny.reasoner("gpt2", dtype).lm
    before = [copy.deepcopy(block.mlp.act) for block in lm.transformer.h]
    prepare_backbone(lm)
    x = torch.linspace(-9, 9, 4001, dtype=dtype)
    exact = nn.functional.gelu(x.double(), approximate="tanh")
    for old, block in zip(before, lm.transformer.h, strict=True):
        assert type(old) is not type(block.mlp.act)
        error, old_error = ((act(x).double() - exact).abs().max() for act in (block.mlp.act, old))
        assert error <= max(old_error, 1e-12)


def test_prompts_are_padded_on_the_right():
    ids_QL, lengths_Q = pad_prompts([[5, 6, 7], [], [8]], torch.device("cpu"))
    assert ids_QL.tolist() == [[5, 6, 7], [0, 0, 0], [8, 0, 0]]
    assert lengths_Q.tolist() == [3, 0, 1]
    assert pad_prompts([[], []], torch.device("cpu"))[0].shape == (2, 1)
