"""The records that every room shares, and the shape legend.

Shape legend (the name of a tensor ends in the letters of its axes):
    Q questions, N rollouts per question, R = Q*N rows (question-major), L prompt tokens, T latents, D width,
    A answer tokens, V vocabulary, S tokens of one forward pass.
    In statistics: D rollouts drawn per question, S subsets of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


Floats: TypeAlias = NDArray[np.floating]
Bools: TypeAlias = NDArray[np.bool_]
Int64: TypeAlias = NDArray[np.int64]
Float32: TypeAlias = NDArray[np.float32]
Float64: TypeAlias = NDArray[np.float64]
Phase = Literal["prompt", "thoughts", "answer"]
MAX_QUOTED = 80  # characters of a question in an error
PHASES: tuple[Phase, ...] = ("prompt", "thoughts", "answer")
Site = Literal["embedding", "attention", "ffn"]
UnmixedReason = Literal["all_correct", "all_wrong"]


def text_digest(text: str) -> str:
    """First 16 hex digits of the sha256 of a text: the id of a question."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_digest(path: Path) -> str:
    """The same of a file, which need not fit into memory; raises OSError."""
    return file_sha256(path).hex()[:16]


def file_sha256(path: Path) -> bytes:
    """The sha256 of a file, whole; raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one where the file is missing, damaged or holds something else."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


@dataclass(frozen=True)
class Question:
    """One example of a task.

    Attributes:
        id: content hash of the text (a repeat of the same text gets `-2`, `-3`, ...).
        text: what is asked.
        answer: the gold answer, canonical; None where it is not known.
        steps: written-out reasoning, one string per step; empty if the task has none.
    """

    id: str
    text: str
    answer: str | None
    steps: tuple[str, ...] = ()

    @property
    def quoted(self) -> str:
        """The beginning of the text in quotes, as errors name a question."""
        text = " ".join(self.text.split())
        return repr(text if len(text) <= MAX_QUOTED else f"{text[:MAX_QUOTED]}...")

    @property
    def gold(self) -> str:
        """The gold answer of a question that has one."""
        assert self.answer is not None, f"question {self.id} has no gold answer"
        return self.answer


@dataclass(frozen=True)
class Computation:
    """How a loaded model is computed, as `engine.proof` found it to be right.

    Attributes:
        attention: `shared-prefix`, the engine's own, or `transformers`, the model's.
        logits: `head`, the LM head alone, or `model`: what the model makes of a final hidden state, as where it scales
            or caps the head's logits.
        reason: why not the first of each; empty where it is.
    """

    attention: Literal["shared-prefix", "transformers"] = "shared-prefix"
    logits: Literal["head", "model"] = "head"
    reason: str = ""

    @property
    def way(self) -> dict[str, str]:
        """What is computed, without the reason."""
        return {"attention": self.attention, "logits": self.logits}


COMPUTATIONS = tuple(
    Computation(attention, logits) for attention in ("shared-prefix", "transformers") for logits in ("head", "model")
)
SCORING_COMPUTATIONS = tuple(each for each in COMPUTATIONS if each.logits == "head")  # of models without an LM head


@dataclass(frozen=True)
class Reasoner:
    """A loaded model.

    Attributes:
        lm: the causal LM of transformers, in evaluation mode.
        next_latent: turns final hidden states (..., D) into the latents (..., D) that are fed back.
        latent_spread: turns final hidden states (..., D) into the standard deviations (..., D) of the latents; None
            unless the latent head predicts a Gaussian.
        computation: how the engine computes it.
    """

    lm: PreTrainedModel
    next_latent: Callable[[Tensor], Tensor]
    latent_spread: Callable[[Tensor], Tensor] | None = None
    computation: Computation = Computation()


@dataclass(frozen=True)
class RewardModel:
    """A loaded LatentRM.

    Attributes:
        backbone: the transformer without a language-model head, in evaluation mode.
        classifier: turns final hidden states (..., D) into step scores (...), in float32 or wider.
        computation: how the engine computes it.
    """

    backbone: PreTrainedModel
    classifier: Callable[[Tensor], Tensor]
    computation: Computation = Computation()


@dataclass(frozen=True)
class Forward:
    """The place of a forward pass in a rollout.

    Attributes:
        phase: `prompt` (prompt tokens except the last), `thoughts` (the T passes that compute h_1..h_T) or `answer`.
        step: in `thoughts` the index (from 0) of the latent that the pass computes, in `answer` T plus the number of
            answer tokens so far, in `prompt` 0.
        tokens: S, the number of tokens in the pass.
    """

    phase: Phase
    step: int
    tokens: int


@dataclass(frozen=True)
class RolloutArrays:
    """The input of aggregators: Q questions with D rollouts each.

    Attributes:
        prediction_QD: equal integers where canonical predictions of one question are equal, -1 where unreadable.
        correct_QD: whether the prediction is right; None where gold answers are not known.
        answer_logprob_QD: summed log-probability of the answer.
        score_QD: trajectory score, NaN if a rollout has none.
    """

    prediction_QD: NDArray[np.int64]
    correct_QD: Bools | None
    answer_logprob_QD: Floats
    score_QD: Floats

    def questions(self, part: slice) -> RolloutArrays:
        """The arrays of a slice of the questions."""
        correct_QD = None if self.correct_QD is None else self.correct_QD[part]
        return RolloutArrays(self.prediction_QD[part], correct_QD, self.answer_logprob_QD[part], self.score_QD[part])


@dataclass(frozen=True)
class LabelledQuestion:
    """A question whose rollouts are labelled step by step, as by `ltts annotate`.

    Attributes:
        question_id: as in `Question`.
        index: position of the question in the task, from 0.
        input_ids_NL: prompt, latent ids and end-of-thinking ids of each rollout; see `written_ids`.
        latents_NTD: the latents that were fed back; zeros for steps that a rollout does not have.
        labels_NT: share in [0, 1] of right completions of each prefix; NaN for steps that a rollout does not have.
        corrects_N: whether each rollout's own answer is right.
    """

    question_id: str
    index: int
    input_ids_NL: Int64
    latents_NTD: Float32
    labels_NT: Float32
    corrects_N: Bools

    def prompt_ids(self, latent_id: int, pad_id: int | None = None) -> list[int]:
        """Ids of the prompt: everything before the first latent id, without padding on the left."""
        rows = self.input_ids_NL.tolist()
        row = next((row[: row.index(latent_id)] for row in rows if latent_id in row), rows[0])
        start = next((place for place, token in enumerate(row) if token != pad_id), len(row))
        return row[start:]


@dataclass(frozen=True)
class UnmixedQuestion:
    """A question without labels, because its rollouts are all right or all wrong.

    Attributes:
        question_id, index: as in `LabelledQuestion`.
        reason: `all_correct` or `all_wrong`.
        rollouts: number of rollouts drawn.
    """

    question_id: str
    index: int
    reason: UnmixedReason
    rollouts: int


def written_ids(
    prompt: Sequence[int], steps_N: Sequence[int], latent_id: int, end_ids: Sequence[int], pad_id: int
) -> Int64:
    """`input_ids` (N, L) of rollouts with `steps_N` latents each, padded on the right."""
    rows = [[*prompt, *[latent_id] * steps, *end_ids] for steps in steps_N]
    width = max(map(len, rows))
    return np.array([[*row, *[pad_id] * (width - len(row))] for row in rows], dtype=np.int64)
