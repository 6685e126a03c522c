"""The published checkpoint layout and the official implementation's numbers: tests/parity.

Token ids are compared exactly, latents to 1e-4, and the two stochastic samplers by mean and variance over many
rollouts against 20,000 of the official code (ModalityDance/LatentTTS at 6657f20).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from latent_tts.engine.official_positions import position_offsets
from latent_tts.engine.rollout import Engine, RolloutPlan, Rollouts
from latent_tts.engine.scoring import LatentScorer
from latent_tts.model.coconut import Coconut
from latent_tts.random.draw import Draw
from latent_tts.sampler import Sampler
from latent_tts.sampler.dropout import Dropout
from latent_tts.sampler.gaussian import Gaussian
from latent_tts.sampler.greedy import Greedy
from latent_tts.scorer.latent_rm import LatentRM
from latent_tts.types import Forward, Question, Reasoner, Site

FOLDER = Path(__file__).parents[1] / "parity" / "coconut"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())
LATENTS, ANSWER = 6, 12
ROWS = 250  # rollouts of one batch: a prompt of its own for each takes memory
OFFICIAL_ROLLOUTS = 20_000


@pytest.fixture(scope="module")
def model() -> Coconut:
    return Coconut(name="coconut", checkpoint=str(FOLDER), latents=LATENTS, recommended={})


@pytest.fixture(scope="module")
def reasoner(model: Coconut) -> Reasoner:
    return model.load(device="cpu", dtype="float32")


def engine(model: Coconut, reasoner: Reasoner, answer: int = ANSWER) -> Engine:
    return Engine(reasoner, RolloutPlan(model.latents, model.thinking_end_ids, model.eos_id, answer))


def greedy(model: Coconut, reasoner: Reasoner, questions: int) -> Rollouts:
    draw = Draw.of(0, [str(q) for q in range(questions)], torch.zeros(questions, 1, dtype=torch.long), 64)
    return engine(model, reasoner).roll(EXPECTED["prompt_ids"][:questions], draw, Greedy())


def generated(model: Coconut, answer_ids: list[int]) -> list[int]:
    """The ids as the official code returns them."""
    return [model.latent_id] * LATENTS + model.thinking_end_ids + answer_ids


def test_token_ids_are_read_by_name(model: Coconut) -> None:
    model.check()
    assert [model.start_id, *model.thinking_end_ids, model.latent_id] == [
        EXPECTED["start_id"],
        EXPECTED["end_id"],
        EXPECTED["latent_id"],
    ]


@pytest.mark.parametrize("number", range(5))
def test_prompt_ids_are_the_official_ones(model: Coconut, number: int) -> None:
    text = EXPECTED["prompts"][number].removesuffix("\n<|start-latent|>")
    assert model.encode(Question(id="q", text=text, answer="")) == EXPECTED["prompt_ids"][number]


def test_five_questions_in_one_batch_give_the_official_ids_and_latents(model: Coconut, reasoner: Reasoner) -> None:
    rollouts = greedy(model, reasoner, 5)
    latents = load_file(FOLDER / "expected.safetensors")["latents"]
    assert [generated(model, ids) for ids in rollouts.answer_ids] == EXPECTED["generated_ids"]
    assert not rollouts.stopped_R.any()
    torch.testing.assert_close(rollouts.latents_RTD, latents, rtol=0, atol=1e-4)


def test_the_answer_ids_read_as_the_official_text(model: Coconut, reasoner: Reasoner) -> None:
    ids = [generated(model, ids) for ids in greedy(model, reasoner, 5).answer_ids]
    assert [model.answer_text(row) for row in ids] == EXPECTED["generated_text"]


def test_the_first_two_questions_alone_give_the_official_ids(model: Coconut, reasoner: Reasoner) -> None:
    rollouts = greedy(model, reasoner, 2)
    assert [generated(model, ids) for ids in rollouts.answer_ids] == EXPECTED["single_generated_ids"]


@dataclass(frozen=True)
class Fit:
    """How far a sample's means are from others' means, in standard errors z.

    Attributes:
        z_square: mean of z^2 over all elements, 1 in expectation.
        spread: standard deviation of that mean, from the elements' correlations.
        z_max: the largest |z|.
    """

    z_square: float
    spread: float
    z_max: float

    @property
    def plausible(self) -> bool:
        return abs(self.z_square - 1) < 5 * self.spread and self.z_max < 5


def fit(samples_RE: Tensor, mean_E: Tensor, squared_error_E: Tensor) -> Fit:
    """Compare the means of samples (float64) with means that have squared standard errors of their own."""
    squared_error_E = squared_error_E + samples_RE.var(0) / samples_RE.shape[0]
    z_E = (samples_RE.mean(0) - mean_E) / squared_error_E.sqrt()
    correlation = samples_RE.T.corrcoef().nan_to_num()  # an element that never varies has none
    spread = (2 * correlation.square().sum()).sqrt() / z_E.numel()  # of a mean of dependent chi-squares
    return Fit(z_E.square().mean().item(), spread.item(), z_E.abs().max().item())


def fits(latents_RTD: Tensor, kind: str) -> tuple[Fit, Fit]:
    """Mean and variance of rollouts against the official ones of `kind`."""
    official = load_file(FOLDER / "sampling.safetensors")
    mean_E, variance_E = (official[f"{kind}_{name}_TD"].double().flatten() for name in ("mean", "var"))
    samples_RE = latents_RTD.double().flatten(1)
    squares_RE = (samples_RE - samples_RE.mean(0)).square()
    return (
        fit(samples_RE, mean_E, variance_E / OFFICIAL_ROLLOUTS),
        fit(squares_RE, variance_E, squares_RE.var(0) / OFFICIAL_ROLLOUTS),
    )


def stochastic_latents(model: Coconut, reasoner: Reasoner, sampler: Sampler, rollouts: int) -> Tensor:
    """Latents (rollouts, T, D) of question 0."""
    thinker, latents = engine(model, reasoner, answer=0), []
    for start in range(0, rollouts, ROWS):
        numbers = torch.arange(start, min(start + ROWS, rollouts))[None]
        draw = Draw.of(0, ["question 0"], numbers, thinker.width)
        latents.append(thinker.roll(EXPECTED["prompt_ids"][:1], draw, sampler).latents_RTD)
    return torch.cat(latents)


NOISE = Gaussian(0.5, False)
DROPOUT = Dropout(0.2, "residual", ["prompt", "thoughts"], "fresh")


@pytest.mark.parametrize(
    ("kind", "sampler", "rollouts"), [("noise", NOISE, 4000), ("dropout", DROPOUT, 1250)], ids=["noise", "dropout"]
)
def test_stochastic_latents_have_the_official_mean_and_variance(
    model: Coconut, reasoner: Reasoner, kind: str, sampler: Sampler, rollouts: int
) -> None:
    mean, variance = fits(stochastic_latents(model, reasoner, sampler, rollouts), kind)
    assert mean.plausible, mean
    assert variance.plausible, variance


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "sampler"), [("noise", NOISE), ("dropout", DROPOUT)], ids=["noise", "dropout"])
def test_20000_stochastic_latents_have_the_official_mean_and_variance(
    model: Coconut, reasoner: Reasoner, kind: str, sampler: Sampler
) -> None:
    latents_RTD = stochastic_latents(model, reasoner, sampler, OFFICIAL_ROLLOUTS)
    mean, variance = fits(latents_RTD, kind)
    assert mean.plausible, mean
    assert variance.plausible, variance
    ratio = latents_RTD.double().var(0) / load_file(FOLDER / "sampling.safetensors")[f"{kind}_var_TD"]
    assert ratio.sub(1).square().mean().sqrt() < 0.02
    assert ratio.sub(1).abs().max() < 0.07


class Unscaled(Dropout):
    """Forgets 1 / (1 - rate)."""

    def factors(self, site: Site, layer: int, draw: Draw, forward: Forward) -> Tensor | None:
        factors = super().factors(site, layer, draw, forward)
        return None if factors is None else factors.sign()


class FixedFirst(Dropout):
    """Leaves the prompt and the pass that makes h_1 clean."""

    def factors(self, site: Site, layer: int, draw: Draw, forward: Forward) -> Tensor | None:
        clean = forward.phase == "prompt" or forward.step == 0
        return None if clean else super().factors(site, layer, draw, forward)


WRONG = {
    "another site": ("dropout", Dropout(0.2, "ffn", ["prompt", "thoughts"], "fresh")),
    "the embedding too": ("dropout", Dropout(0.2, "residual_embedding", ["prompt", "thoughts"], "fresh")),
    "a clean prompt": ("dropout", Dropout(0.2, "residual", ["thoughts"], "fresh")),
    "one mask for all passes": ("dropout", Dropout(0.2, "residual", ["prompt", "thoughts"], "locked")),
    "no 1/(1-p)": ("dropout", Unscaled(0.2, "residual", ["prompt", "thoughts"], "fresh")),
    "a fixed h_1": ("dropout", FixedFirst(0.2, "residual", ["prompt", "thoughts"], "fresh")),
    "less noise": ("noise", Gaussian(0.47, False)),
}


@pytest.mark.parametrize(("kind", "sampler"), WRONG.values(), ids=WRONG.keys())
def test_the_statistic_rejects_wrong_sampling(model: Coconut, reasoner: Reasoner, kind: str, sampler: Sampler) -> None:
    mean, variance = fits(stochastic_latents(model, reasoner, sampler, 150), kind)
    assert not (mean.plausible and variance.plausible)


# The LatentRM: tests/parity/latent_rm, over the latents and prompts of tests/parity/coconut

SCORER = Path(__file__).parents[1] / "parity" / "latent_rm"


@pytest.fixture(scope="module")
def official_scores() -> dict[str, Tensor]:
    return load_file(SCORER / "expected.safetensors")


@pytest.fixture(scope="module")
def scorer() -> LatentScorer:
    return LatentScorer(LatentRM(str(SCORER), None, "correct").load(device="cpu", dtype="float32"))


def test_the_published_layout_of_a_latent_rm_is_read(model: Coconut) -> None:
    latent_rm = LatentRM(str(SCORER), None, "official")
    assert latent_rm.check(model, {}) == []
    assert (latent_rm.temperature, latent_rm.reduction) == (1.0, "sum")


def test_correct_positions_give_the_official_unpadded_scores(
    scorer: LatentScorer, official_scores: dict[str, Tensor]
) -> None:
    steps_RT = scorer.score(EXPECTED["prompt_ids"], official_scores["latents"])
    torch.testing.assert_close(steps_RT, official_scores["step_logits_unpadded"], rtol=0, atol=1e-4)
    scores = LatentRM(str(SCORER), "sum", "correct").score_rollouts(steps_RT.tolist())
    torch.testing.assert_close(torch.tensor(scores), official_scores["scores_unpadded"].double(), rtol=0, atol=1e-4)


def test_official_positions_give_the_official_left_padded_scores(
    model: Coconut, scorer: LatentScorer, official_scores: dict[str, Tensor]
) -> None:
    latent_rm = LatentRM(str(SCORER), "sum", "official")
    lengths = [
        len(prompt) + LATENTS + 1 + latent_rm.count_tokens(model.answer_text(ids[LATENTS + 1 :]))
        for prompt, ids in zip(EXPECTED["prompt_ids"], EXPECTED["generated_ids"], strict=True)
    ]
    texts = json.loads((SCORER / "expected.json").read_text())["texts_compat"]
    assert lengths == [latent_rm.count_tokens(text) for text in texts]
    position_offset_Q = torch.tensor(position_offsets([lengths])[0])
    steps_RT = scorer.score(EXPECTED["prompt_ids"], official_scores["latents"], position_offset_Q=position_offset_Q)
    scores = torch.tensor(latent_rm.score_rollouts(steps_RT.tolist()))
    expected = official_scores["scores_left_padded_compat"].double()
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-4)
    assert (scores - official_scores["scores_unpadded"]).abs().max() > 1  # the two modes are far apart
