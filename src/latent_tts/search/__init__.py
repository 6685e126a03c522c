"""Which rollouts of a question are grown; one option of the group `search` per module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Protocol

from latent_tts.sampler import Sampler
from latent_tts.scorer import Scorer

if TYPE_CHECKING:
    from latent_tts.engine.packing import Job
    from latent_tts.engine.rollout import Engine, Rollouts
    from latent_tts.engine.scoring import LatentScorer


class Search(Protocol):
    """Which rollouts of a question are grown.

    Attributes:
        name: as tables show it.
        guided: whether it reads scores while it grows rollouts.
        rows_per_survivor: rows of a batch that each rollout it keeps needs.
    """

    name: ClassVar[str]
    guided: ClassVar[bool]

    @property
    def rows_per_survivor(self) -> int:
        """Rows of a batch that each kept rollout needs."""
        ...

    @property
    def survivors(self) -> int | None:
        """How many rollouts of a question are kept at the end; None: all n."""

    def check(self, n: int, sampler: Sampler, scorer: Scorer | None) -> None:
        """Raise UsageError unless the search can be run so."""

    def roll(
        self,
        engine: Engine,
        batch: Sequence[Job],
        sampler: Sampler,
        seed: int,
        *,
        scorer: LatentScorer | None = None,
        reduction: str | None = None,
        answers: bool = True,
    ) -> Rollouts:
        """Grow the rollouts of a batch.

        Args:
            engine: the loaded reasoner.
            batch: questions with equally many rollouts each: their numbers, or the places of those kept.
            sampler: what makes rollouts differ.
            seed: of the run.
            scorer: the loaded scorer, for a guided search.
            reduction: how its step scores make the score of a prefix.
            answers: whether to decode the answers, or to stop after the latents.

        Returns:
            The rollouts, question-major, in the order of the jobs.
        """
        ...
