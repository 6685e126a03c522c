"""The order in which the latents of a rollout are computed; one option of the group `schedule` per module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class LatentModel(Protocol):
    """What a schedule needs to know about a model; every `ModelAdapter` is one."""

    @property
    def name(self) -> str:
        """The name of the model in tables."""
        ...

    @property
    def latents(self) -> int:
        """T, the number of latents."""
        ...

    @property
    def stop_id(self) -> int | None:
        """The token that ends a rollout's thinking; None for a fixed number of latents."""

    @property
    def latent_id(self) -> int:
        """The placeholder token of a latent.

        Raises:
            UsageError: the tokenizer has none.
        """
        ...


class LatentSequence(Protocol):
    """The latents of unfinished rollouts, as a schedule computes them: T per row, counted from 0."""

    @property
    def total(self) -> int:
        """T."""
        ...

    @property
    def unfinished(self) -> bool:
        """Whether some row still lacks a latent."""
        ...

    def advance(self) -> Tensor:
        """Compute the next latent (R, D) of every row."""
        ...

    def guess(self, start: int, stop: int, what: str) -> None:
        """Set latents start..stop-1 to a guess (`token` or `zero`)."""
        ...

    def recompute(self, first: int, start: int, stop: int) -> None:
        """Compute latents start..stop-1 again, each from the current values of those before it.

        One pass over the inputs of latents first..stop-1; latents below `first` are not changed.
        """
        ...

    def commit(self, first: int) -> None:
        """Finish: all latents are computed, and the inputs of those below `first` were run with their final values."""
        ...


class Schedule(Protocol):
    """The order in which the latents of a rollout are computed.

    Attributes:
        name: as shown in tables.
        stepwise: whether latents are computed one after another, so that each prefix of them is the beginning of a
            rollout.
    """

    name: ClassVar[str]
    stepwise: ClassVar[bool]

    @property
    def key(self) -> str | dict[str, Any]:
        """The schedule's part of the cache key."""
        ...

    def check(self, model: LatentModel) -> None:
        """Check that a model can use this schedule.

        Raises:
            UsageError: it cannot.
        """
        ...

    def run(self, latents: LatentSequence) -> None:
        """Compute all missing latents."""
        ...

    def repeated_passes(self, latents: int) -> list[tuple[int, int]]:
        """Passes beyond those of `sequential`, for the cost of a rollout: (tokens, latents before them) of each."""
        ...
