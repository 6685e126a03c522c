"""Independent rollouts of a batch are those that the engine draws."""

import pytest
import tiny
import torch

from latent_tts.engine.packing import RolloutJob
from latent_tts.engine.rollout import Engine
from latent_tts.random.draw import Draw
from latent_tts.sampler.control import Control
from latent_tts.sampler.gaussian import Gaussian
from latent_tts.sampler.greedy import Greedy
from latent_tts.search.beam import Beam
from latent_tts.search.independent import Independent

PROMPTS, NUMBERS = tiny.prompts([5, 2]), [3, 7]


@pytest.fixture
def engine():
    return Engine(tiny.reasoner("gpt2"), tiny.plan(3, answer=2))


def batch(**more):
    return [RolloutJob(key, key, prompt, NUMBERS, **more) for key, prompt in zip("ab", PROMPTS, strict=True)]


@pytest.mark.parametrize("answers", [True, False])
def test_rows_are_the_rollouts_asked_for(engine, answers):
    found = Independent().roll(engine, batch(), Gaussian(0.5, False), 4, answers=answers)
    draw = Draw.of(4, ["a", "b"], torch.tensor([NUMBERS, NUMBERS]), engine.width, engine.blocks)
    wanted = engine.roll(PROMPTS, draw, Gaussian(0.5, False), answers=answers)
    assert torch.equal(found.latents_RTD, wanted.latents_RTD)
    assert found.answer_ids == wanted.answer_ids
    assert all(len(ids) == 2 * answers for ids in found.answer_ids)
    assert bool(found.answer_logprob_R.isnan().all()) == (not answers)


def test_a_sampler_that_needs_a_donor_gets_its_greedy_latents(engine):
    found = Independent().roll(engine, batch(donor=[7, 7, 1]), Control("shuffle"), 0)
    draw = Draw.of(0, ["donor"], torch.tensor([[0]]), engine.width, engine.blocks)
    donor_TD = engine.roll([[7, 7, 1]], draw, Greedy()).latents_RTD[0]
    torch.testing.assert_close(found.latents_RTD, donor_TD.expand(4, -1, -1), rtol=0, atol=1e-6)


def test_searches_say_what_a_batch_holds():
    assert (Independent().survivors, Independent().rows_per_survivor) == (None, 1)
    beam = Beam(3, 4, False)
    assert (beam.survivors, beam.rows_per_survivor) == (3, 4)
