"""Schedules, and what they drive: Protocols beside those of `types`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from latent_tts.types import ModelAdapter

if TYPE_CHECKING:
    from torch import Tensor


class Thoughts(Protocol):
    """Rollouts in the making, as a schedule drives them: T latents of every row, counted from 0."""

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

    def remake(self, first: int, start: int, stop: int) -> None:
        """Make latents start..stop-1 anew, each from the present ones before it.

        One pass over what makes first..stop-1; latents below `first` stay what they are.
        """
        ...

    def settle(self, first: int) -> None:
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

    def check(self, adapter: ModelAdapter) -> None:
        """Raises UsageError unless a model can think so."""
        ...

    def think(self, thoughts: Thoughts) -> None:
        """Make all latents that are missing."""
        ...

    def repeated(self, latents: int) -> list[tuple[int, int]]:
        """Passes beyond those of one latent after another: (tokens, latents before them) of each."""
        ...
