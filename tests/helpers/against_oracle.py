"""Compares rollouts of the engine with those of the oracle."""

from itertools import product

import pytest
import tiny
import torch
from oracle import Oracle

from latent_tts.engine.rollout import Engine
from latent_tts.sampler.dropout import Dropout
from latent_tts.sampler.gaussian import Gaussian
from latent_tts.sampler.greedy import Greedy

EVERYWHERE = ["prompt", "thoughts", "answer"]
NOISE = Gaussian(0.5, False)
MASKS = Dropout(0.2, "residual_embedding", EVERYWHERE, "fresh")
TOLERANCE = {"rtol": 0, "atol": 1e-9}  # of latents, in float64; logits are float32


def questions(prompts):
    """A question id per prompt, derived from its tokens, so that equal prompts have equal ids."""
    return [f"{len(prompt)}-{sum(prompt)}" for prompt in prompts]


def roll(engine, prompts, rollouts, sampler, donor_RTD=None):
    """Rollouts of the engine."""
    return engine.roll(prompts, tiny.draw(questions(prompts), rollouts), sampler, donor_RTD=donor_RTD)


def greedy_latents(reasoner, plan, prompts):
    return roll(Engine(reasoner, plan), prompts, range(1), Greedy()).latents_RTD


def check_against_oracle(family, sampler, lengths, rollouts, plan, *, check_every=1, next_latent=lambda hidden: hidden):
    reasoner, prompts = tiny.reasoner(family, next_latent=next_latent), tiny.prompts(lengths)
    oracle, donor_QTD = Oracle(reasoner, plan), [None] * len(prompts)
    if sampler.needs_donor:
        donor_QTD = greedy_latents(reasoner, plan, prompts[1:] + prompts[:1])
    donor_RTD = donor_QTD.repeat_interleave(rollouts, 0) if sampler.needs_donor else None
    result = roll(Engine(reasoner, plan), prompts, range(rollouts), sampler, donor_RTD)
    rows = list(product(range(len(prompts)), range(rollouts)))
    for row in range(0, len(rows), check_every):
        question, number = rows[row]
        wanted = oracle.roll(
            prompts[question],
            sampler,
            question_id=questions(prompts)[question],
            rollout=number,
            donor_TD=donor_QTD[question],
        )
        steps = len(wanted.latents_TD)
        assert int(result.steps_R[row]) == steps
        torch.testing.assert_close(result.latents_RTD[row, :steps], wanted.latents_TD, **TOLERANCE)
        assert not result.latents_RTD[row, steps:].any()
        assert result.answer_ids[row] == wanted.answer_ids
        assert bool(result.stopped_R[row]) == wanted.stopped
        assert float(result.answer_logprob_R[row]) == pytest.approx(wanted.logprob, abs=1e-5)
        assert float(result.answer_margin_R[row]) == pytest.approx(wanted.margin, abs=1e-5)
    return result


def name(value):
    if isinstance(value, Dropout):
        return f"{value.site} {value.mask} {'+'.join(value.where)}"
    return None if isinstance(value, str | int) else str(value)


def assert_rows_equal(result, row, other, other_row):
    torch.testing.assert_close(result.latents_RTD[row], other.latents_RTD[other_row], **TOLERANCE)
    assert result.answer_ids[row] == other.answer_ids[other_row]
    assert result.stopped_R[row] == other.stopped_R[other_row]
    torch.testing.assert_close(result.answer_logprob_R[row], other.answer_logprob_R[other_row], rtol=0, atol=1e-5)
    torch.testing.assert_close(result.answer_margin_R[row], other.answer_margin_R[other_row], rtol=0, atol=1e-5)


def base_passes(lm):
    """A list that collects the shape (rows, tokens) of every later pass through the backbone."""
    shapes = []
    lm.base_model.register_forward_pre_hook(
        lambda _module, _args, kwargs: shapes.append(tuple(kwargs["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    return shapes
