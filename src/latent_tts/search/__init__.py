"""Which rollouts of a question are grown; one option of the group `search` per module."""

from __future__ import annotations

from typing import ClassVar, Protocol

from latent_tts.sampler import Sampler
from latent_tts.scorer import Scorer


class Search(Protocol):
    """Which rollouts of a question are grown."""

    name: ClassVar[str]

    @property
    def survivors(self) -> int | None:
        """How many rollouts of a question are left at the end; None: all n."""

    def check(self, n: int, sampler: Sampler, scorer: Scorer | None) -> None:
        """Raises UsageError unless the search can be run so."""
