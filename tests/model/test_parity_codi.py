"""CODI's published layout and the official implementation's numbers: tests/parity/codi.

Token ids are compared exactly, latents to 1e-4 (ModalityDance/LatentTTS at 6657f20).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from oracle import Oracle
from safetensors.torch import load_file

from latent_tts.engine.rollout import Engine, RolloutPlan, Rollouts
from latent_tts.model.codi import Codi
from latent_tts.random.draw import Draw
from latent_tts.sampler.greedy import Greedy
from latent_tts.types import Question, Reasoner

FOLDER = Path(__file__).parents[1] / "parity" / "codi"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())
LATENTS, ANSWER = 6, 12


@pytest.fixture(scope="module")
def model() -> Codi:
    return Codi(name="codi", checkpoint=str(FOLDER), latents=LATENTS, recommended={})


@pytest.fixture(scope="module")
def reasoner(model: Codi) -> Reasoner:
    return model.load(device="cpu", dtype="float32")


def plan(model: Codi) -> RolloutPlan:
    return RolloutPlan(model.latents, model.thinking_end_ids, model.eos_id, ANSWER)


def greedy(model: Codi, reasoner: Reasoner, questions: list[int]) -> Rollouts:
    draw = Draw.of(0, [str(q) for q in questions], torch.zeros(len(questions), 1, dtype=torch.long), 64)
    return Engine(reasoner, plan(model)).roll([EXPECTED["prompt_ids"][q] for q in questions], draw, Greedy())


def generated(model: Codi, answer_ids: list[int]) -> list[int]:
    """The ids as the official code returns them, filled up with eos."""
    row = [model.latent_id] * LATENTS + model.thinking_end_ids + answer_ids
    return row + [model.eos_id] * (LATENTS + 1 + ANSWER - len(row))


def test_token_ids_are_read_by_name(model: Codi) -> None:
    model.check()
    assert [model.start_id, *model.thinking_end_ids, model.latent_id] == [
        EXPECTED["start_id"],
        EXPECTED["end_id"],
        EXPECTED["latent_id"],
    ]


@pytest.mark.parametrize("number", range(5))
def test_prompt_ids_are_the_official_ones(model: Codi, number: int) -> None:
    text = EXPECTED["prompts"][number].removesuffix("<|start-latent|>")
    assert model.encode(Question(id="q", text=text, answer="")) == EXPECTED["prompt_ids"][number]


def test_five_questions_in_one_batch_give_the_official_ids_and_latents(model: Codi, reasoner: Reasoner) -> None:
    rollouts = greedy(model, reasoner, list(range(5)))
    latents = load_file(FOLDER / "expected.safetensors")["latents"]
    rows = [generated(model, ids) for ids in rollouts.answer_ids]
    assert rows == EXPECTED["generated_ids"]
    assert rollouts.stopped_R.tolist() == [False] * 4 + [True]
    torch.testing.assert_close(rollouts.latents_RTD, latents, rtol=0, atol=1e-4)
    assert [model.answer_text(row) for row in rows] == EXPECTED["generated_text"]


@pytest.mark.parametrize("number", range(2))
def test_a_question_alone_gives_the_official_ids(model: Codi, reasoner: Reasoner, number: int) -> None:
    rollouts = greedy(model, reasoner, [number])
    assert generated(model, rollouts.answer_ids[0]) == EXPECTED["single_generated_ids"][number]


def test_the_oracle_agrees_through_the_projector(model: Codi, reasoner: Reasoner) -> None:
    row = Oracle(reasoner, plan(model)).roll(EXPECTED["prompt_ids"][1], Greedy(), question_id="1", rollout=0)
    latents = load_file(FOLDER / "expected.safetensors")["latents"][1]
    torch.testing.assert_close(row.latents_TD, latents, rtol=0, atol=1e-4)


def test_the_latent_is_projected(model: Codi, reasoner: Reasoner) -> None:
    """Without the projector the latents are others, so the parity test would fail."""
    plain = Reasoner(lm=reasoner.lm, next_latent=lambda hidden: hidden)
    latents = load_file(FOLDER / "expected.safetensors")["latents"]
    assert (greedy(model, plain, list(range(5))).latents_RTD - latents).abs().max() > 0.1


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
def test_the_answer_is_the_last_number(model: Codi, text: str, answer: str | None) -> None:
    assert model.raw_answer(text) == answer
