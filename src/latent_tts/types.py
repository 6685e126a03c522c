"""The words every room shares: records, Protocols and the shape legend.

Shape legend (tensor names end in their letters):
    Q questions, N rollouts a question, R = Q*N rows (question-major), L prompt tokens, T latents, D width,
    A answer tokens, V vocabulary, S tokens of one forward pass. In statistics: D rollouts drawn, S subsets of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel

    from latent_tts.rng import Draw
    from latent_tts.thoughts import Schedule

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


class Sampler(Protocol):
    """What makes the rollouts of one question differ. Classes inherit these defaults: nothing random at all.

    Attributes:
        name, param: as tables show the sampler and its parameter.
    """

    name: ClassVar[str]
    param: ClassVar[str | None] = None

    @property
    def value(self) -> float | str | None:
        """The parameter's value, None where there is no parameter."""
        return None

    @property
    def random_phases(self) -> frozenset[Phase]:
        """Phases whose forward passes are random; they run once a rollout instead of once a question."""
        return frozenset()

    @property
    def random_latents(self) -> bool:
        """Whether latents of a question's rollouts may differ; a sampler whose own `latent` is not random denies it."""
        return type(self).latent is not Sampler.latent or bool(self.random_phases & {"prompt", "thoughts"})

    @property
    def random_answers(self) -> bool:
        """Whether answers to the same thoughts may differ."""
        return "answer" in self.random_phases or self.chooses_tokens

    @property
    def deterministic(self) -> bool:
        """Whether all rollouts of a question are the same, so that one is enough."""
        return not (self.random_latents or self.random_answers)

    @property
    def needs_donor(self) -> bool:
        """Whether it reads the latents of another question."""
        return False

    @property
    def chooses_tokens(self) -> bool:
        """Whether `token` is asked for answer tokens; otherwise they are those of the highest logits."""
        return False

    @property
    def needs_spread(self) -> bool:
        """Whether it reads the spread that the model's own latent head predicts."""
        return False

    @property
    def only_latents(self) -> bool:
        """Whether all that it changes are latents and the passes that make them, so that it takes a model with some."""
        return False

    def latent(self, h_RD: Tensor, draw: Draw, step: int) -> Tensor:
        """The latent (R, D) fed back in place of `h_RD`, the model's own; `step` counts from 0."""
        del draw, step
        return h_RD

    def factors(self, site: Site, layer: int, draw: Draw, forward: Forward) -> Tensor | None:
        """Factors (R, S, D) for the output of a site in a forward pass, or None for all ones."""
        del site, layer, draw, forward

    def token(self, logits_RV: Tensor, draw: Draw, step: int) -> Tensor:
        """Ids (R) of the next answer tokens; asked only where `chooses_tokens`."""
        del draw, step
        return logits_RV.argmax(-1)


class ModelAdapter(Protocol):
    """A family of reasoners: its checkpoint layout, prompt recipe and answer format."""

    @property
    def name(self) -> str:
        """What tables call the model."""
        ...

    @property
    def checkpoint(self) -> str:
        """Folder, `shipped:NAME` or hub id."""
        ...

    @property
    def latents(self) -> int:
        """T, the number of latent thoughts."""
        ...

    @property
    def prompt_recipe(self) -> str:
        """A text that stands for how prompts are made; part of every cache key."""
        ...

    @property
    def folder(self) -> Path:
        """The local checkpoint folder."""
        ...

    @property
    def config(self) -> dict[str, Any]:
        """The checkpoint's `config.json`."""
        ...

    @property
    def digest(self) -> str:
        """What identifies weights, shape and tokenizer."""
        ...

    @property
    def positions(self) -> int:
        """The longest sequence the backbone takes."""
        ...

    @property
    def thinking_end_ids(self) -> list[int]:
        """Tokens forced after the last latent."""
        ...

    @property
    def latent_id(self) -> int:
        """Placeholder of a latent thought where a rollout is written as ids."""
        ...

    @property
    def stop_id(self) -> int | None:
        """A rollout stops thinking where this token is the most probable; None for a fixed number of latents."""

    @property
    def has_spread(self) -> bool:
        """Whether its latent head predicts a Gaussian."""
        ...

    @property
    def own_schedule(self) -> Schedule | None:
        """The schedule that is part of the model; None where the user chooses."""

    @property
    def eos_id(self) -> int:
        """The token that ends an answer."""
        ...

    def check(self) -> None:
        """Read everything but the weights; raises UsageError."""

    def encode(self, question: Question) -> list[int]:
        """Token ids of the prompt; raises UsageError for text the model cannot read."""
        ...

    def forced_ids(self, text: str) -> list[int]:
        """Ids of a text that every answer begins with; raises UsageError for one the model cannot read."""
        ...

    def answer_text(self, answer_ids: list[int]) -> str:
        """Text of answer ids, special tokens kept."""
        ...

    def raw_answer(self, answer_text: str) -> str | None:
        """The part of an answer's text that the task should read."""

    def load(self, *, device: str, dtype: str) -> Reasoner:
        """Load the weights."""
        ...


class Search(Protocol):
    """Which rollouts of a question are grown."""

    name: ClassVar[str]

    @property
    def survivors(self) -> int | None:
        """How many rollouts of a question are left at the end; None: all n."""

    def check(self, n: int, sampler: Sampler, scorer: Scorer | None) -> None:
        """Raises UsageError unless the search can be run so."""


class Scorer(Protocol):
    """Gives every latent of a rollout a step score, and the rollout a score out of them."""

    @property
    def name(self) -> str:
        """What tables call the scorer."""
        ...

    @property
    def positions(self) -> str:
        """`correct` or `official`: how the positions of a row are counted."""
        ...

    @property
    def digest(self) -> str:
        """What identifies weights and shape."""
        ...

    @property
    def config(self) -> dict[str, Any]:
        """The checkpoint's `config.json`."""
        ...

    @property
    def reduction(self) -> str:
        """How step scores make the score of a rollout: `sum`, `mean` or `last`."""
        ...

    @property
    def temperature(self) -> float:
        """Of the score-weighted vote, as chosen when the scorer was trained; 1 if nothing was chosen."""
        ...

    def check(self, reasoner: ModelAdapter, sampler: Mapping[str, Any]) -> list[str]:
        """Read everything but the weights; raises UsageError, returns warnings."""
        ...

    def text_tokens(self, answer_text: str) -> int:
        """How many tokens an answer's text has, special tokens left out."""
        ...

    def reduced(self, step_scores: Sequence[Floats]) -> Floats:
        """The trajectory score (R) of each row's step scores; NaN for a row without any."""
        ...

    def load(self, *, device: str, dtype: str) -> RewardModel:
        """Load the weights."""
        ...


class Task(Protocol):
    """A set of questions and its rule for answers."""

    @property
    def name(self) -> str:
        """What tables call the task."""
        ...

    @property
    def split(self) -> str | None:
        """Which part of the task's questions these are."""

    def questions(self) -> list[Question]:
        """The questions, in file order."""
        ...

    def parse(self, raw: str | None) -> str | None:
        """The canonical prediction in a raw answer, None if it cannot be read."""

    def equal(self, prediction: str, gold: str) -> bool:
        """Whether a canonical prediction is right."""
        ...


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


class Aggregator(Protocol):
    """Picks one rollout's prediction out of a subset: the member with the highest value, ties to the lowest number.

    Attributes:
        name: as tables show it.
        needs_score: whether it reads `score_QD`, so that it takes a scorer.
    """

    name: ClassVar[str]
    needs_score: ClassVar[bool]

    def values(self, rollouts: RolloutArrays, members_SD: Bools) -> Floats:
        """How much speaks for each rollout in each subset (Q, S, D); -inf for one that cannot win."""
        ...


class Budget(Protocol):
    """How many rollouts a question gets."""

    name: ClassVar[str]

    def reported(self, n: int) -> list[int]:
        """The budgets, in [1, n] and ascending, that get rows in the metrics table; the last is n."""
        ...
