"""The published checkpoint layout and the official implementation's numbers: tests/parity.

Token ids are compared exactly, latents to 1e-4, and the two stochastic samplers by mean and variance over many
rollouts against 20,000 of the official code (ModalityDance/LatentTTS at 6657f20).
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import torch
from marks import slow
from safetensors.torch import load_file
from torch import Tensor

from latent_tts.engine.official_positions import position_offsets
from latent_tts.engine.rollout import Engine
from latent_tts.engine.scoring import LatentScorer
from latent_tts.random.draw import Draw
from latent_tts.sampler import Sampler
from latent_tts.sampler.dropout import Dropout
from latent_tts.sampler.gaussian import Gaussian
from latent_tts.scorer.latent_rm import LatentRM
from latent_tts.types import Forward, Question, Site
from parity import COCONUT, CODI, LATENTS, PARITY, Official

EXPECTED = COCONUT.expected
ROWS = 250  # rollouts of one batch: a prompt of its own for each takes memory
OFFICIAL_ROLLOUTS = 20_000
families = pytest.mark.parametrize("family", [COCONUT, CODI], ids=lambda family: family.adapter.__name__)


@families
def test_token_ids_are_read_by_name(family: Official) -> None:
    model = family.model
    model.check()
    ids = [model.start_id, *model.thinking_end_ids, model.latent_id]
    assert ids == [family.expected[name] for name in ("start_id", "end_id", "latent_id")]


@families
@pytest.mark.parametrize("number", range(5))
def test_prompt_ids_are_the_official_ones(family: Official, number: int) -> None:
    text = family.expected["prompts"][number].removesuffix(family.prompt_end)
    assert family.model.encode(Question(id="q", text=text, answer="")) == family.expected["prompt_ids"][number]


@families
def test_five_questions_in_one_batch_give_the_official_ids_latents_and_texts(family: Official) -> None:
    rollouts = family.greedy([0, 1, 2, 3, 4])
    rows = [family.generated(ids) for ids in rollouts.answer_ids]
    assert rows == family.expected["generated_ids"]
    assert rollouts.stopped_R.tolist() == [family is CODI and number == 4 for number in range(5)]
    torch.testing.assert_close(rollouts.latents_RTD, family.latents_QTD, rtol=0, atol=1e-4)
    assert [family.model.answer_text(row) for row in rows] == family.expected["generated_text"]


@families
@pytest.mark.parametrize("number", range(2))
def test_a_question_alone_gives_the_official_ids(family: Official, number: int) -> None:
    rollouts = family.greedy([number])
    assert family.generated(rollouts.answer_ids[0]) == family.expected["single_generated_ids"][number]


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
    official = load_file(COCONUT.folder / "sampling.safetensors")
    mean_E, variance_E = (official[f"{kind}_{name}_TD"].double().flatten() for name in ("mean", "var"))
    samples_RE = latents_RTD.double().flatten(1)
    squares_RE = (samples_RE - samples_RE.mean(0)).square()
    return (
        fit(samples_RE, mean_E, variance_E / OFFICIAL_ROLLOUTS),
        fit(squares_RE, variance_E, squares_RE.var(0) / OFFICIAL_ROLLOUTS),
    )


def stochastic_latents(sampler: Sampler, rollouts: int) -> Tensor:
    """Latents (rollouts, T, D) of question 0."""
    engine, latents = Engine(COCONUT.reasoner, COCONUT.plan(answer=0)), []
    for start in range(0, rollouts, ROWS):
        numbers = torch.arange(start, min(start + ROWS, rollouts))[None]
        draw = Draw.of(0, ["question 0"], numbers, engine.width)
        latents.append(engine.roll(EXPECTED["prompt_ids"][:1], draw, sampler).latents_RTD)
    return torch.cat(latents)


NOISE = Gaussian(0.5, False)
DROPOUT = Dropout(0.2, "residual", ["prompt", "thoughts"], "fresh")


@pytest.mark.parametrize(
    ("kind", "sampler", "rollouts"), [("noise", NOISE, 4000), slow("dropout", DROPOUT, 1250)], ids=["noise", "dropout"]
)
def test_stochastic_latents_have_the_official_mean_and_variance(kind: str, sampler: Sampler, rollouts: int) -> None:
    mean, variance = fits(stochastic_latents(sampler, rollouts), kind)
    assert mean.plausible, mean
    assert variance.plausible, variance


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "sampler"), [("noise", NOISE), ("dropout", DROPOUT)], ids=["noise", "dropout"])
def test_20000_stochastic_latents_have_the_official_mean_and_variance(kind: str, sampler: Sampler) -> None:
    latents_RTD = stochastic_latents(sampler, OFFICIAL_ROLLOUTS)
    mean, variance = fits(latents_RTD, kind)
    assert mean.plausible, mean
    assert variance.plausible, variance
    ratio = latents_RTD.double().var(0) / load_file(COCONUT.folder / "sampling.safetensors")[f"{kind}_var_TD"]
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


@pytest.mark.every_other
@pytest.mark.parametrize(("kind", "sampler"), WRONG.values(), ids=WRONG.keys())
def test_the_statistic_rejects_wrong_sampling(kind: str, sampler: Sampler) -> None:
    mean, variance = fits(stochastic_latents(sampler, 150), kind)
    assert not (mean.plausible and variance.plausible)


# The LatentRM: tests/parity/latent_rm, over the latents and prompts of tests/parity/coconut

SCORER = PARITY / "latent_rm"


@pytest.fixture(scope="module")
def official_scores() -> dict[str, Tensor]:
    return load_file(SCORER / "expected.safetensors")


@pytest.fixture(scope="module")
def scorer() -> LatentScorer:
    return LatentScorer(LatentRM(str(SCORER), None, "correct").load(device="cpu", dtype="float32"))


def test_the_published_layout_of_a_latent_rm_is_read() -> None:
    latent_rm = LatentRM(str(SCORER), None, "official")
    assert latent_rm.check(COCONUT.model, {}) == []
    assert (latent_rm.temperature, latent_rm.reduction) == (1.0, "sum")


def test_correct_positions_give_the_official_unpadded_scores(
    scorer: LatentScorer, official_scores: dict[str, Tensor]
) -> None:
    steps_RT = scorer.score(EXPECTED["prompt_ids"], official_scores["latents"])
    torch.testing.assert_close(steps_RT, official_scores["step_logits_unpadded"], rtol=0, atol=1e-4)
    scores = LatentRM(str(SCORER), "sum", "correct").score_rollouts(steps_RT.tolist())
    torch.testing.assert_close(torch.tensor(scores), official_scores["scores_unpadded"].double(), rtol=0, atol=1e-4)


def test_official_positions_give_the_official_left_padded_scores(
    scorer: LatentScorer, official_scores: dict[str, Tensor]
) -> None:
    latent_rm = LatentRM(str(SCORER), "sum", "official")
    lengths = [
        len(prompt) + LATENTS + 1 + latent_rm.count_tokens(COCONUT.model.answer_text(ids[LATENTS + 1 :]))
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
