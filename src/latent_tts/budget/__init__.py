"""The numbers of rollouts n at which metrics are reported; one option of the group `budget` per module."""

from __future__ import annotations

from typing import ClassVar, Protocol


class Budget(Protocol):
    """The numbers of rollouts per question at which metrics are reported."""

    name: ClassVar[str]

    def reported(self, n: int) -> list[int]:
        """The numbers of rollouts with rows in the metrics table: ascending, in [1, n], the last is n."""
        ...
