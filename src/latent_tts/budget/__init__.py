"""How many rollouts a question gets, and at which n they are reported; one option of the group `budget` per module."""

from __future__ import annotations

from typing import ClassVar, Protocol


class Budget(Protocol):
    """How many rollouts a question gets."""

    name: ClassVar[str]

    def reported(self, n: int) -> list[int]:
        """The budgets, in [1, n] and ascending, that get rows in the metrics table; the last is n."""
        ...
