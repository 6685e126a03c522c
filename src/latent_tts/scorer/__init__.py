"""What gives a rollout a score; one option of the group `scorer` per module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from latent_tts.model import ModelAdapter
from latent_tts.types import Floats, RewardModel


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
