"""Many rollouts to one answer; one option of the group `aggregator` per module. Pure arrays."""

from __future__ import annotations

from typing import ClassVar, Protocol

from latent_tts.types import Bools, Floats, RolloutArrays


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
