"""What CODI has of its own, with the official implementation's numbers; what it shares with COCONUT: test_parity.py."""

from __future__ import annotations

import pytest
import torch
from oracle import Oracle

from latent_tts.sampler.greedy import Greedy
from latent_tts.types import Reasoner
from parity import CODI


def test_the_oracle_agrees_through_the_projector() -> None:
    prompt = CODI.expected["prompt_ids"][1]
    row = Oracle(CODI.reasoner, CODI.plan()).roll(prompt, Greedy(), question_id="1", rollout=0)
    torch.testing.assert_close(row.latents_TD, CODI.latents_QTD[1], rtol=0, atol=1e-4)


def test_the_latent_is_projected() -> None:
    """Without the projector the latents are others, so the parity test would fail."""
    plain = Reasoner(lm=CODI.reasoner.lm, next_latent=lambda hidden: hidden)
    latents_RTD = CODI.greedy([0, 1, 2, 3, 4], plain).latents_RTD
    assert (latents_RTD - CODI.latents_QTD).abs().max() > 0.1


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is: 18", "18"),
        ("5-2=3", "3"),
        ("x-3", "-3"),
        ("1,234,567", "1234567"),
        ("18.", "18."),
        ("-0.5 apples", "-0.5"),
        ("first 3, then .5", "5"),
        ("no number", None),
        ("", None),
    ],
)
def test_the_answer_is_the_last_number(text: str, answer: str | None) -> None:
    assert CODI.model.decimal_answer(text) == answer
