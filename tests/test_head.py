"""Choosing tokens by pieces against the plain way, over all logits at once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_tts.engine import head
from latent_tts.engine.head import BLOCK, choose


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


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 9),
    vocabulary=st.one_of(st.integers(2, 200), st.sampled_from([BLOCK, 2 * BLOCK, 2 * BLOCK + 1])),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    levels=st.sampled_from([2, 5, 1000]),
    seed=st.integers(0, 99),
)
def test_the_choice_is_that_of_all_logits_at_once(rows, vocabulary, dtype, levels, seed):
    generator = torch.Generator().manual_seed(seed)
    logits_RV = torch.randint(levels, (rows, vocabulary), generator=generator).to(dtype) * (20 / levels)
    before = logits_RV.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(head.VALUES_AT_ONCE, "cpu", 3 * vocabulary)
        assert_equal(choose(logits_RV, lambda logits_CV, part: None), plain(logits_RV))
    assert torch.equal(logits_RV, before)


def test_a_token_of_the_sampler_is_reported_with_its_own_probability():
    logits_RV = torch.randn(7, 130, generator=torch.Generator().manual_seed(0))
    wanted_R = torch.tensor([0, 129, 64, 63, 1, 128, 5])
    seen = []

    def token(logits_CV, part):
        seen.append((part.start, part.stop))
        assert torch.equal(logits_CV, logits_RV[part])
        return wanted_R[part]

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(head.VALUES_AT_ONCE, "cpu", 2 * 130)
        assert_equal(choose(logits_RV, token), plain(logits_RV, wanted_R))
    assert seen == [(0, 2), (2, 4), (4, 6), (6, 7)]


def test_logits_far_from_zero_keep_their_probabilities():
    logits_RV = torch.tensor([[1e4, 1e4 - 1, -1e4], [-1e4, -1e4 - 3, -2e4]])
    assert_equal(choose(logits_RV, lambda logits_CV, part: None), plain(logits_RV))
