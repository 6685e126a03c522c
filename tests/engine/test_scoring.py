"""Scores over a shared prefix: against a plain forward pass of one row, and whatever the batch."""

import numpy as np
import pytest
import tiny
import torch
from oracle import plain_scores

from latent_tts.engine.official_positions import position_offsets
from latent_tts.engine.scoring import LatentScorer

LENGTHS, ROLLOUTS, STEPS = [9, 4, 6], 3, 5


@pytest.fixture(params=["gpt2", "llama", "qwen3"])
def family(request):
    return request.param


@pytest.fixture
def latents_RTD():
    return torch.randn(len(LENGTHS) * ROLLOUTS, STEPS, tiny.WIDTH, generator=torch.Generator().manual_seed(0)).double()


@pytest.mark.every_other
@pytest.mark.parametrize("shifts", [None, [0, 7, 40]], ids=["correct", "official"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "mistral", "gpt_neo"])
def test_scores_equal_a_plain_forward_pass_of_each_row(family, latents_RTD, shifts):
    prompts = tiny.prompts(LENGTHS)
    scorer = LatentScorer(tiny.proven(tiny.reward_model(family)))
    scores_RT = scorer.score(prompts, latents_RTD, position_offset_Q=None if shifts is None else torch.tensor(shifts))
    assert scores_RT.dtype == torch.float64
    for row in range(len(latents_RTD)):
        question = row // ROLLOUTS
        expected = plain_scores(family, prompts[question], latents_RTD[row], 0 if shifts is None else shifts[question])
        torch.testing.assert_close(scores_RT[row], expected, rtol=0, atol=1e-6 if family == "gpt_neo" else 1e-9)


def test_a_shift_moves_the_scores_of_learned_positions_and_not_of_rotary_ones(latents_RTD):
    shifts = torch.tensor([11, 11, 11])
    for family, moves in (("gpt2", True), ("llama", False)):
        scorer = LatentScorer(tiny.reward_model(family))
        prompts = tiny.prompts(LENGTHS)
        moved = scorer.score(prompts, latents_RTD, position_offset_Q=shifts) - scorer.score(prompts, latents_RTD)
        assert (moved.abs().max() > 1e-3) == moves


def test_one_latent_at_a_time_gives_the_same_scores_as_all_at_once(family, latents_RTD):
    prompts = tiny.prompts(LENGTHS)
    scorer = LatentScorer(tiny.reward_model(family))
    state = scorer.open(prompts, ROLLOUTS, STEPS)
    one_by_one = [scorer.extend(state, latents_RTD[:, step : step + 1]) for step in range(STEPS)]
    torch.testing.assert_close(torch.cat(one_by_one, 1), scorer.score(prompts, latents_RTD), rtol=0, atol=1e-9)


def test_a_score_depends_on_no_other_row_and_on_no_later_latent(family, latents_RTD):
    prompts = tiny.prompts(LENGTHS)
    scorer = LatentScorer(tiny.reward_model(family))
    together = scorer.score(prompts, latents_RTD)
    for row in (0, 4, 8):
        alone = scorer.score([prompts[row // ROLLOUTS]], latents_RTD[row : row + 1, :3])
        torch.testing.assert_close(together[row : row + 1, :3], alone, rtol=0, atol=1e-9)


def test_rows_of_fewer_latents_have_no_scores_beyond_them(latents_RTD):
    prompts = tiny.prompts(LENGTHS)
    scorer = LatentScorer(tiny.reward_model("llama"))
    steps = torch.tensor([5, 1, 3, 2, 4, 5, 1, 1, 3])
    changed = latents_RTD.clone()
    for row, count in enumerate(steps.tolist()):
        changed[row, count:] = 0
    scores = scorer.score(prompts, changed, steps_R=steps)
    there = torch.arange(STEPS) < steps[:, None]
    assert scores.isnan().equal(~there)
    torch.testing.assert_close(scores[there], scorer.score(prompts, latents_RTD)[there], rtol=0, atol=1e-9)


def test_official_offsets_are_the_padding_on_the_left():
    texts = [[4, 9, 7], [5, 5, 5]]
    assert position_offsets(texts) == [[5, 0, 2], [0, 0, 0]]
    padded = [np.pad(np.arange(own), (9 - own, 0)) for own in texts[0]]
    assert [int((row == 0).sum() - 1) for row in padded] == position_offsets(texts)[0]
