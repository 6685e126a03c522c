"""How the rollouts of a question are searched for; one option of the group `search` per module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Protocol

from latent_tts.sampler import Sampler
from latent_tts.scorer.latent_rm import LatentRM

if TYPE_CHECKING:
    from latent_tts.engine.packing import RolloutJob
    from latent_tts.engine.rollout import Engine, Rollouts
    from latent_tts.engine.scoring import LatentScorer


class Search(Protocol):
    """How the rollouts of a question are searched for. Options inherit these defaults, under which all n are kept.

    Attributes:
        name: as shown in tables.
    """

    name: ClassVar[str]

    @property
    def survivors(self) -> int | None:
        """Number of rollouts per question at the end, chosen by scores; None where all n are kept, without any."""
        return None

    @property
    def rows_per_survivor(self) -> int:
        """Number of rows of a batch per rollout at the end."""
        return 1

    def check(self, n: int, sampler: Sampler, scorer: LatentRM | None) -> None:
        """Check that the search works with n, the sampler and the scorer.

        Raises:
            UsageError: it does not.
        """

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
        """Draw the rollouts of a batch.

        Args:
            engine: the loaded reasoner.
            batch: questions, all with the same number of rollouts.
            sampler: how rollouts are made to differ.
            seed: of the run.
            scorer: the loaded LatentRM, if there are `survivors`.
            reduction: how step scores are reduced to the score of a prefix (`sum`, `mean` or `last`), with a scorer.
            answers: whether to decode answers; otherwise only latents are computed.

        Returns:
            The rollouts, question-major, in the order of each question's `rollouts`.
        """
        ...
