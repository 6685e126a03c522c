"""The order in which the latents of a rollout are computed; one option of the group `schedule` per module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class LatentModel(Protocol):
    """What a schedule has to know of a model; every `ModelAdapter` is one."""

    @property
    def name(self) -> str:
        """What tables call the model."""
        ...

    @property
    def latents(self) -> int:
        """T, the number of latents."""
        ...

    @property
    def stop_id(self) -> int | None:
        """The token by which a rollout stops thinking; None for a fixed number of latents."""

    @property
    def latent_id(self) -> int:
        """The token that stands for a latent; raises UsageError where the tokenizer has none."""
        ...


class LatentSequence(Protocol):
    """The latents of rollouts in the making, as a schedule drives them: T of every row, counted from 0."""

    @property
    def total(self) -> int:
        """T."""
        ...

    @property
    def unfinished(self) -> bool:
        """Whether some row still lacks a latent."""
        ...

    def advance(self) -> Tensor:
        """Make the next latent (R, D) of every row."""
        ...

    def guess(self, start: int, stop: int, what: str) -> None:
        """Put a guess (`token` or `zero`) in the place of latents start..stop-1."""
        ...

    def recompute(self, first: int, start: int, stop: int) -> None:
        """Make latents start..stop-1 anew, each from the present ones before it.

        One pass over what makes first..stop-1; latents below `first` stay what they are.
        """
        ...

    def commit(self, first: int) -> None:
        """Say that all latents are made, and that what makes those below `first` was run as it is now."""
        ...


class Schedule(Protocol):
    """The order in which the latents of a rollout are computed.

    Attributes:
        name: as tables show it.
        stepwise: latents are made one after another, so that each prefix of them is the beginning of a rollout.
    """

    name: ClassVar[str]
    stepwise: ClassVar[bool]

    @property
    def key(self) -> str | dict[str, Any]:
        """What keys of caches hold."""
        ...

    def check(self, model: LatentModel) -> None:
        """Raises UsageError unless a model can think so."""
        ...

    def run(self, latents: LatentSequence) -> None:
        """Make all latents that are missing."""
        ...

    def repeated_passes(self, latents: int) -> list[tuple[int, int]]:
        """RolloutCost beyond those of one latent after another: (tokens, latents before them) of each."""
        ...
