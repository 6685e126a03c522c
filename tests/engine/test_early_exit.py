"""`schedule.exit`: a rollout stops thinking where the next latent no longer moves its answer."""

from itertools import pairwise

import pytest
import tiny
import torch
from against_oracle import NOISE, roll

from latent_tts.engine.early_exit import TOKENS, AnswerMovement
from latent_tts.engine.rollout import Engine, RolloutPlan
from latent_tts.sampler.greedy import Greedy

LENGTHS, ROLLOUTS, LATENTS = [3, 7, 5], 4, 6
PLAN = RolloutPlan(LATENTS, [2], 1, 3)
PREFIX = [4]


def plan(exit, latents=LATENTS, stop_id=None):
    return RolloutPlan(latents, [2], 1, 3, stop_id, exit=exit, exit_ids=[2, *PREFIX])


def distribution(reasoner, sampler, prompts, steps):
    """Of the token after the prefix, if rollouts had `steps` latents: their answers begin with the prefix."""
    forced = RolloutPlan(steps, [2], None, 2, forced_ids=PREFIX)
    found = []

    class Watched(torch.nn.Module):
        def forward(self, hidden_RD):
            found.append(head(hidden_RD).double().softmax(-1))
            return head(hidden_RD)

    engine = Engine(reasoner, forced)
    head, engine.head = engine.head, Watched()
    roll(engine, prompts, range(ROLLOUTS), sampler)
    return found[0]


@pytest.mark.every_other
@pytest.mark.parametrize("sampler", [Greedy(), NOISE], ids=["greedy", "noise"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_rollout_stops_where_its_answer_settles_and_is_the_rollout_of_as_many_latents(family, sampler, monkeypatch):
    monkeypatch.setattr("latent_tts.engine.early_exit.TOKENS", tiny.VOCABULARY)  # all told apart
    reasoner, prompts = tiny.reasoner(family), tiny.prompts(LENGTHS)
    shares = [distribution(reasoner, sampler, prompts, steps) for steps in range(1, LATENTS)]
    moved = torch.stack([(b - a).abs().sum(1) / 2 for a, b in pairwise(shares)])
    values = moved.flatten().sort().values
    low, high = len(values) // 8, len(values) // 3
    gap = low + int((values[1:] - values[:-1])[low:high].argmax())
    threshold = float(values[gap : gap + 2].mean())  # rounding does not matter between two distances
    result = roll(Engine(reasoner, plan(threshold)), prompts, range(ROLLOUTS), sampler)
    settled = moved <= threshold
    expected = torch.where(settled.any(0), 2 + settled.int().argmax(0), LATENTS)
    assert result.steps_R.tolist() == expected.tolist()
    assert len(set(expected.tolist())) > 1
    for steps in set(expected.tolist()):
        fewer = roll(Engine(reasoner, RolloutPlan(steps, [2], 1, 3)), prompts, range(ROLLOUTS), sampler)
        rows = expected == steps
        torch.testing.assert_close(result.latents_RTD[rows, :steps], fewer.latents_RTD[rows], rtol=0, atol=1e-9)
        assert not result.latents_RTD[rows, steps:].any()


def test_the_answer_is_that_of_a_rollout_that_made_as_many_latents_as_it_stopped_after():
    reasoner, prompts = tiny.reasoner("gpt2"), tiny.prompts(LENGTHS)
    result = roll(Engine(reasoner, plan(0.999)), prompts, range(ROLLOUTS), NOISE)  # all stop after two
    assert set(result.steps_R.tolist()) == {2}
    fewer = roll(Engine(reasoner, RolloutPlan(2, [2], 1, 3)), prompts, range(ROLLOUTS), NOISE)
    assert result.answer_ids == fewer.answer_ids
    torch.testing.assert_close(result.answer_logprob_R, fewer.answer_logprob_R, rtol=0, atol=1e-5)


def test_where_nothing_settles_all_latents_are_made_and_rollouts_are_those_without_exit():
    reasoner, prompts = tiny.reasoner("gpt2"), tiny.prompts(LENGTHS)
    result = roll(Engine(reasoner, plan(0.0)), prompts, range(ROLLOUTS), NOISE)
    whole = roll(Engine(reasoner, PLAN), prompts, range(ROLLOUTS), NOISE)
    assert result.steps_R.tolist() == whole.steps_R.tolist()
    assert result.answer_ids == whole.answer_ids
    torch.testing.assert_close(result.latents_RTD, whole.latents_RTD, rtol=0, atol=1e-9)


def test_the_distance_is_total_variation():
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(5, TOKENS, bias=False)
    torch.nn.init.normal_(head.weight, std=2.0, generator=generator)
    hidden = torch.randn(2, 9, 5, generator=generator)
    shares = [head(each).softmax(-1) for each in hidden]
    movement = AnswerMovement(head)
    assert movement.since_last(hidden[0]) is None
    found = movement.since_last(hidden[1])
    torch.testing.assert_close(found, (shares[1] - shares[0]).abs().sum(1) / 2)
    assert (movement.since_last(hidden[1]) == 0).all()
