"""Sets of questions and their rules for answers; one option of the group `task` per module."""

from __future__ import annotations

from typing import Protocol

from latent_tts.types import Question


class Task(Protocol):
    """A set of questions and its rule for answers."""

    @property
    def name(self) -> str:
        """What tables call the task."""
        ...

    @property
    def split(self) -> str | None:
        """Which part of the task's questions these are."""

    def questions(self) -> list[Question]:
        """The questions, in file order."""
        ...

    def parse(self, raw: str | None) -> str | None:
        """The canonical prediction in a raw answer, None if it cannot be read."""

    def equal(self, prediction: str, gold: str) -> bool:
        """Whether a canonical prediction is right."""
        ...
