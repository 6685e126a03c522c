"""Which rollouts of a question are grown; one option of the group `search` per module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Protocol

from latent_tts.sampler import Sampler
from latent_tts.scorer import Scorer

if TYPE_CHECKING:
    from latent_tts.engine.packing import RolloutJob
    from latent_tts.engine.rollout import Engine, Rollouts
    from latent_tts.engine.scoring import LatentScorer


class Search(Protocol):
    """Which rollouts of a question are grown.

    Attributes:
        name: as tables show it.
        guided: whether `roll` needs a scorer, because scores decide what is grown.
    """

    name: ClassVar[str]
    guided: ClassVar[bool]

    @property
    def survivors(self) -> int | None:
        """How many rollouts of a question are left at the end; None: all n."""
        ...

    @property
    def rows_per_survivor(self) -> int:
        """How many rows of a batch are grown for each rollout that is left at the end."""
        ...

    def check(self, n: int, sampler: Sampler, scorer: Scorer | None) -> None:
        """Raises UsageError unless the search can be run so."""
        ...

    def roll(
        self,
        engine: Engine,
        batch: Sequence[RolloutJob],
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
            batch: questions, all with equally many rollouts.
            sampler: what makes rollouts differ.
            seed: of the run.
            scorer: the loaded LatentRM, where the search is guided.
            reduction: how step scores make the score of a prefix (`sum`, `mean` or `last`), where it is guided.
            answers: whether to decode answers, or to make the latents alone.

        Returns:
            The rollouts, question-major, in the order of each question's `rollouts`.
        """
        ...
