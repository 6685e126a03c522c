import copy

import pytest
import tiny
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from latent_tts.engine.backbone import PackedLinear, can_be_packed, prepare_backbone

HALF = torch.bfloat16


def layer(kind, inputs=24, outputs=40, dtype=HALF, **options):
    made = kind(outputs, inputs) if kind is Conv1D else kind(inputs, outputs, **options)
    generator = torch.Generator().manual_seed(1)
    for parameter in made.parameters():
        nn.init.normal_(parameter, generator=generator)
    return made.to(dtype).requires_grad_(False)


needs_bfloat16 = pytest.mark.skipif(not can_be_packed(layer(nn.Linear)), reason="a CPU without bfloat16 products")


@needs_bfloat16
@pytest.mark.parametrize("shape", [(5, 24), (300, 24), (3, 2, 24), (1, 1, 24)], ids=str)
@pytest.mark.parametrize("plain", [layer(Conv1D), layer(nn.Linear), layer(nn.Linear, bias=False)], ids=str)
def test_a_packed_layer_is_the_same_product(plain, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(HALF)
    torch.testing.assert_close(PackedLinear(plain)(x), plain(x))


@needs_bfloat16
def test_with_gelu_it_rounds_no_more_than_the_two_in_turn():
    plain = layer(Conv1D)
    x = torch.randn(64, 24, generator=torch.Generator().manual_seed(0)).to(HALF)
    exact = nn.functional.gelu(x.double() @ plain.weight.double() + plain.bias.double(), approximate="tanh")
    in_turn = nn.functional.gelu(plain(x), approximate="tanh")
    packed = PackedLinear(plain, gelu=True)(x)
    assert (packed.double() - exact).abs().max() <= (in_turn.double() - exact).abs().max()


@needs_bfloat16
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_prepared_model_has_no_plain_products_in_its_blocks_and_the_same_hidden_states(family):
    lm = tiny.reasoner(family, HALF).lm.requires_grad_(False)
    exact = copy.deepcopy(lm).double()
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    plain, wanted = (model.base_model(ids).last_hidden_state.double() for model in (lm, exact))
    implementation = lm.config._attn_implementation
    prepare_backbone(lm)
    assert not any(can_be_packed(module) for module in lm.base_model.modules())
    assert sum(isinstance(module, PackedLinear) for module in lm.modules()) >= 4
    lm.set_attn_implementation(implementation)  # the engine's own needs its state
    packed = lm.base_model(ids).last_hidden_state.double()
    assert (packed - wanted).abs().max() <= 1.5 * (plain - wanted).abs().max()


@pytest.mark.parametrize(
    "plain", [layer(nn.Linear, dtype=torch.float32), nn.LayerNorm(4), layer(nn.Linear).requires_grad_(True)], ids=str
)
def test_what_cannot_be_packed(plain):
    assert not can_be_packed(plain)
