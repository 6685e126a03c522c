"""Choosing tokens piece by piece against the plain way, over all logits at once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from latent_tts.engine import head
from latent_tts.engine.head import BLOCK, choose

D = 3


def plain(logits_RV, token_R=None):
    logits_RV = logits_RV.float()
    token_R = logits_RV.argmax(-1) if token_R is None else token_R
    highest_R2 = logits_RV.topk(2).values
    logprob_R = logits_RV.log_softmax(-1).gather(1, token_R[:, None])[:, 0]
    return token_R, logprob_R, highest_R2[:, 0] - highest_R2[:, 1]


def assert_equal(choice, expected):
    token_R, logprob_R, margin_R = expected
    assert choice.token_R.tolist() == token_R.tolist()
    assert choice.margin_R.tolist() == margin_R.tolist()
    torch.testing.assert_close(choice.logprob_R, logprob_R, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def in_pieces(values, *args):
    with pytest.MonkeyPatch.context() as patch:
        for limits in (head.VALUES_AT_ONCE, head.SORTED_AT_ONCE):
            patch.setitem(limits, "cpu", values)
        return choose(*args)


def whole_numbers(lm_head, rows, levels, seed):
    """Weights and hidden states whose logits are exact in every precision, and often equal."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in lm_head.parameters():
        parameter.data = torch.randint(-levels, levels + 1, parameter.shape, generator=generator).to(parameter.dtype)
    return torch.randint(-levels, levels + 1, (rows, D), generator=generator).to(lm_head.weight.dtype)


@settings(derandomize=True, deadline=None, max_examples=80)
@given(
    rows=st.integers(1, 9),
    vocabulary=st.one_of(st.integers(2, 300), st.sampled_from([BLOCK, 2 * BLOCK, 2 * BLOCK + 1])),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    bias=st.booleans(),
    levels=st.sampled_from([1, 2, 5]),
    values=st.sampled_from([1, 600, 10**6]),
    seed=st.integers(0, 99),
)
def test_the_highest_logits_are_those_of_all_at_once(rows, vocabulary, dtype, bias, levels, values, seed):
    lm_head = nn.Linear(D, vocabulary, bias=bias, dtype=dtype).requires_grad_(False)
    hidden_RD = whole_numbers(lm_head, rows, levels, seed)
    assert_equal(in_pieces(values, lm_head, hidden_RD), plain(lm_head(hidden_RD)))


def test_a_head_of_another_kind_is_called_as_a_whole():
    lm_head = nn.Sequential(nn.Linear(D, 70), nn.Tanh()).requires_grad_(False)
    hidden_RD = torch.randn(5, D, generator=torch.Generator().manual_seed(0))
    assert_equal(in_pieces(150, lm_head, hidden_RD), plain(lm_head(hidden_RD)))


def test_a_token_of_the_sampler_is_reported_with_its_own_probability():
    lm_head = nn.Linear(D, 130).requires_grad_(False)
    hidden_RD = whole_numbers(lm_head, 7, 3, 0)
    logits_RV, wanted_R = lm_head(hidden_RD), torch.tensor([0, 129, 64, 63, 1, 128, 5])
    seen = []

    def token(logits_CV, rows):
        seen.append((rows.start, rows.stop))
        assert torch.equal(logits_CV, logits_RV[rows])
        return wanted_R[rows]

    assert_equal(in_pieces(2 * 130, lm_head, hidden_RD, token), plain(logits_RV, wanted_R))
    assert seen == [(0, 2), (2, 4), (4, 6), (6, 7)]


def test_logits_far_from_zero_keep_their_probabilities():
    lm_head = nn.Linear(1, 200, bias=False).requires_grad_(False)
    lm_head.weight[:, 0] = torch.arange(200.0).roll(77) * 100
    hidden_RD = torch.tensor([[1.0], [-1.0], [0.0], [0.001]])
    assert_equal(in_pieces(64 * 4, lm_head, hidden_RD), plain(lm_head(hidden_RD)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.inference_mode()
def test_log_probabilities_in_half_precision_are_of_the_logits_that_were_settled(dtype):
    generator = torch.Generator().manual_seed(1)
    lm_head = nn.Linear(64, 300, dtype=dtype)
    lm_head.weight[:] = torch.randn(lm_head.weight.shape, generator=generator) * 2
    hidden_RD = torch.randn(400, 64, generator=generator).to(dtype)
    choice = in_pieces(10**6, lm_head, hidden_RD)
    exact_R = (hidden_RD.double() @ lm_head.weight.double().t() + lm_head.bias.double()).log_softmax(-1).amax(-1)
    assert choice.logprob_R.max() <= 0
    assert (choice.logprob_R.double() - exact_R).abs().mean() < 0.01
    assert exact_R.max() > -1e-3, "no row is sure enough to come out above 0"


@pytest.mark.every_other
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.inference_mode()
def test_logits_that_rounding_makes_equal_are_ranked_in_float32(dtype, bias):
    generator, ties = torch.Generator().manual_seed(0), 0
    lm_head = nn.Linear(D, 3 * BLOCK + 5, bias=bias, dtype=dtype)
    for _ in range(200):
        if bias:
            lm_head.bias[:] = torch.rand(lm_head.out_features, generator=generator) * 1e-3
        lm_head.weight[:] = torch.randn(lm_head.weight.shape, generator=generator) * 1e-3
        hidden_RD = torch.randn(1, D, generator=generator).to(dtype)
        near_D = 1 + torch.finfo(dtype).eps * torch.randint(-1, 2, (D,), generator=generator)
        high = torch.randperm(lm_head.out_features, generator=generator)[:2]
        lm_head.weight[high] = torch.stack([hidden_RD[0], hidden_RD[0] * near_D]).to(dtype)
        logits_V = nn.functional.linear(hidden_RD, lm_head.weight, lm_head.bias)[0]
        exact_V = lm_head.weight.double() @ hidden_RD[0].double() + (lm_head.bias.double() if bias else 0)
        ties += int((logits_V == logits_V.max()).sum() > 1)
        choice = in_pieces(100, lm_head, hidden_RD)
        highest, second = exact_V.topk(2).values.tolist()
        assert choice.margin_R.item() == pytest.approx(highest - second, abs=1e-5)
        assert choice.token_R.item() == exact_V.argmax().item() or highest - second < 1e-5
    assert ties > 20
