"""How rollouts are scored; one option of the group `scorer` per module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from latent_tts.checkpoint.adapter import CheckpointAdapter
from latent_tts.types import Floats, Reasoner, RewardModel


class Scorer(Protocol):
    """Gives every latent a step score, and every rollout a score made from its step scores."""

    @property
    def name(self) -> str:
        """The name of the scorer in tables."""
        ...

    @property
    def positions(self) -> str:
        """How the positions of a row are counted: `correct` or `official`."""
        ...

    @property
    def digest(self) -> str:
        """A digest of the files that determine scores."""
        ...

    @property
    def config(self) -> dict[str, Any]:
        """The checkpoint's `config.json`."""
        ...

    @property
    def sizes(self) -> dict[str, Any]:
        """The sizes of the backbone, as `checkpoint.files.sizes` gives them."""
        ...

    @property
    def reduction(self) -> str:
        """How step scores are reduced to the score of a rollout: `sum`, `mean` or `last`."""
        ...

    @property
    def temperature(self) -> float:
        """Temperature of the score-weighted vote, as chosen when the scorer was trained; 1 if none was chosen."""
        ...

    @property
    def range(self) -> Sequence[float] | None:
        """The lowest and the highest score that a rollout can have; None if that is not known."""
        ...

    def check(self, reasoner: CheckpointAdapter, sampler: Mapping[str, Any]) -> list[str]:
        """Check every file, reading only the headers of the weights; return warnings.

        Raises:
            UsageError: a file is not usable, or the scorer does not fit the reasoner.
        """
        ...

    def count_tokens(self, answer_text: str) -> int:
        """Number of tokens of a generated text, without special tokens."""
        ...

    def score_rollouts(self, step_scores: Sequence[Floats]) -> Floats:
        """The scores (R) of rollouts from their step scores; NaN for a rollout without any."""
        ...

    @property
    def base_digest(self) -> str | None:
        """The digest of the reasoner whose weights the scorer shares; None if it has weights of its own."""
        ...

    def load(self, *, device: str, dtype: str, base: Reasoner | None = None) -> RewardModel:
        """Load the weights; `base` is the reasoner with `base_digest`, loaded there in that dtype."""
        ...
