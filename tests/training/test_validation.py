"""What the engine says of weights in training: the figures of `ltts run`."""

from dataclasses import replace

import pytest
import scripted

from latent_tts.errors import UsageError
from latent_tts.model.coconut import Coconut
from latent_tts.text.answer import AnswerRule
from latent_tts.training.reasoner.curriculum import Stage
from latent_tts.training.reasoner.validation import Validation
from latent_tts.types import Question

RULE = AnswerRule("decimal")
SETTINGS = Validation(every=1, rollouts=3, sigma=0.5, temperature=1.0, max_answer_tokens=3, share=1.0, dtype="float32")
QUESTIONS = [Question(str(place), f"Question {place}?", str(17 + place % 4)) for place in range(8)]  # two have 18


def measured(tmp_path, *texts, latents=2, settings=SETTINGS):
    folder = scripted.make(tmp_path / "model", "coconut", *texts)
    adapter = Coconut(name="own", checkpoint=str(folder), latents=latents, recommended={})
    reasoner = adapter.load(device="cpu", dtype=settings.dtype)
    return settings.measure(reasoner, adapter, Stage(1, latents, None), QUESTIONS, RULE)


def test_accuracy_is_the_share_of_questions_that_greedy_decoding_answers(tmp_path):
    assert measured(tmp_path, "### 18") == {"eval_greedy_accuracy": 0.25, "eval_coverage_at_3": 0.25}


def test_coverage_counts_questions_that_any_rollout_answers(tmp_path):
    """Two answers are equally likely, so without latents some of many drawn rollouts give each of them."""
    settings = replace(SETTINGS, rollouts=30, sigma=0.0)
    figures = measured(tmp_path, "### 18", "### 19", latents=0, settings=settings)
    assert figures["eval_greedy_accuracy"] == 0.25
    assert figures["eval_coverage_at_30"] == 0.5


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"every": 0}, r"validation\.every=0: must be"),
        ({"rollouts": 0}, r"validation\.rollouts=0: must be"),
        ({"sigma": -1}, r"validation\.sigma=-1: must be"),
        ({"dtype": "int8"}, r"validation\.dtype=int8: must be"),
    ],
)
def test_values_that_mean_nothing_are_refused(values, words):
    with pytest.raises(UsageError, match=words):
        Validation(**vars(SETTINGS) | values)
