import copy

import pytest
import tiny
import torch
from torch import nn

from latent_tts.engine.backbone import FusedRMSNorm, can_be_fused, prepare_backbone
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_norms_are_the_same_functions_and_round_no_more_than_before(family, dtype):
    lm = tiny.reasoner(family, dtype).lm
    norm = lm.model.layers[0].input_layernorm
    if family == "gemma2":  # its weights are added to 1
        norm.variance_epsilon = norm.eps
        assert not can_be_fused(norm)
        return
    norm.weight.copy_(torch.linspace(0.2, 3, len(norm.weight)))
    assert can_be_fused(norm)
    x = torch.randn(99, len(norm.weight), generator=torch.Generator().manual_seed(0)).to(dtype)
    wide = x.double()
    exact = wide * (wide.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt() * norm.weight.double()
    error, old_error = ((each(x).double() - exact).abs().max() for each in (FusedRMSNorm(norm), norm))
    assert error <= max(old_error, torch.finfo(dtype).eps)
    assert not can_be_fused(norm.requires_grad_(True))


@pytest.mark.gpu
def test_a_gpu_computes_them_as_one_kernel_each():
    lm = tiny.reasoner("qwen3", torch.bfloat16).lm.to("cuda:0")
    before = sum(hasattr(module, "variance_epsilon") for module in lm.model.layers.modules())
    prepare_backbone(lm)
    assert sum(type(module) is FusedRMSNorm for module in lm.modules()) == before == 4 * len(lm.model.layers)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_other_activations_stay(family):
    lm = tiny.reasoner(family).lm
    before = [type(module) for module in lm.modules()]
    prepare_backbone(lm)
    assert [type(module) for module in lm.modules()] == before


def test_prompts_are_padded_on_the_right():
    ids_QL, lengths_Q = pad_prompts([[5, 6, 7], [], [8]], torch.device("cpu"))
    assert ids_QL.tolist() == [[5, 6, 7], [0, 0, 0], [8, 0, 0]]
    assert lengths_Q.tolist() == [3, 0, 1]
    assert pad_prompts([[], []], torch.device("cpu"))[0].shape == (2, 1)
