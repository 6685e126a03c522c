"""The words every room shares: records, Protocols and the shape legend.

Shape legend (tensor names end in their letters):
    Q questions, N rollouts a question, R = Q*N rows (question-major), L prompt tokens, T latents, D width,
    A answer tokens, V vocabulary, S tokens of one forward pass. In statistics: D rollouts drawn, S subsets of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


Floats: TypeAlias = NDArray[np.floating]
Bools: TypeAlias = NDArray[np.bool_]
Phase = Literal["prompt", "thoughts", "answer"]
PHASES: tuple[Phase, ...] = ("prompt", "thoughts", "answer")
Site = Literal["embedding", "attention", "ffn"]


def text_digest(text: str) -> str:
    """First 16 hex digits of the sha256 of a text: the id of a question."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Question:
    """One example of a task.

    Attributes:
        id: content hash of the text (a repeat of the same text gets `-2`, `-3`, ...).
        text: what is asked.
        answer: the gold answer, canonical.
        steps: written-out reasoning, one string a step; empty where a task has none.
    """

    id: str
    text: str
    answer: str
    steps: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reasoner:
    """A loaded model.

    Attributes:
        lm: the causal LM of transformers, in evaluation mode.
        next_latent: turns final hidden states (..., D) into the latents (..., D) that are fed back.
        latent_spread: the standard deviations (..., D) of a head that predicts a Gaussian; None where there is none.
    """

    lm: PreTrainedModel
    next_latent: Callable[[Tensor], Tensor]
    latent_spread: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class RewardModel:
    """A loaded LatentRM.

    Attributes:
        backbone: the transformer without a language-model head, in evaluation mode.
        classifier: turns final hidden states (..., D) into step scores (...), in float32 or wider.
    """

    backbone: PreTrainedModel
    classifier: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Forward:
    """Where in a rollout a forward pass stands.

    Attributes:
        phase: `prompt` (prompt tokens but the last), `thoughts` (the T passes that make h_1..h_T) or `answer`.
        step: in `thoughts` the index from 0 of the latent it makes, in `answer` T plus the number of answer tokens
            so far, in `prompt` 0.
        tokens: S, how many tokens it takes.
    """

    phase: Phase
    step: int
    tokens: int


@dataclass(frozen=True)
class RolloutArrays:
    """What aggregators see of Q questions with D rollouts each.

    Attributes:
        prediction_QD: equal integers where canonical predictions of one question are equal, -1 where unreadable.
        correct_QD: whether the prediction is right.
        answer_logprob_QD: summed log-probability of the answer.
        score_QD: trajectory score, NaN where there is none.
    """

    prediction_QD: NDArray[np.int64]
    correct_QD: Bools
    answer_logprob_QD: Floats
    score_QD: Floats

    def questions(self, part: slice) -> RolloutArrays:
        """The same for some of the questions."""
        return RolloutArrays(
            self.prediction_QD[part], self.correct_QD[part], self.answer_logprob_QD[part], self.score_QD[part]
        )
