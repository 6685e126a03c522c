"""Adapters of families of reasoners; one option of the group `model` per module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from latent_tts.types import Question, Reasoner

if TYPE_CHECKING:
    from pathlib import Path

    from latent_tts.schedule import Schedule


class ModelAdapter(Protocol):
    """A family of reasoners: its checkpoint layout, prompt recipe and answer format."""

    @property
    def name(self) -> str:
        """What tables call the model."""
        ...

    @property
    def checkpoint(self) -> str:
        """Folder, `shipped:NAME` or hub id."""
        ...

    @property
    def latents(self) -> int:
        """T, the number of latent thoughts."""
        ...

    @property
    def prompt_recipe(self) -> str:
        """A text that stands for how prompts are made; part of every cache key."""
        ...

    @property
    def folder(self) -> Path:
        """The local checkpoint folder."""
        ...

    @property
    def config(self) -> dict[str, Any]:
        """The checkpoint's `config.json`."""
        ...

    @property
    def digest(self) -> str:
        """What identifies weights, shape and tokenizer."""
        ...

    @property
    def positions(self) -> int:
        """The longest sequence the backbone takes."""
        ...

    @property
    def thinking_end_ids(self) -> list[int]:
        """Tokens forced after the last latent."""
        ...

    @property
    def latent_id(self) -> int:
        """Placeholder of a latent thought where a rollout is written as ids."""
        ...

    @property
    def stop_id(self) -> int | None:
        """A rollout stops thinking where this token is the most probable; None for a fixed number of latents."""

    @property
    def has_spread(self) -> bool:
        """Whether its latent head predicts a Gaussian."""
        ...

    @property
    def own_schedule(self) -> Schedule | None:
        """The schedule that is part of the model; None where the user chooses."""

    @property
    def eos_id(self) -> int:
        """The token that ends an answer where a text is written out."""
        ...

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """All tokens that end an answer; the first is `eos_id`."""
        ...

    def check(self) -> None:
        """Read everything but the weights; raises UsageError."""

    def encode(self, question: Question) -> list[int]:
        """Token ids of the prompt; raises UsageError for text the model cannot read."""
        ...

    def forced_ids(self, text: str) -> list[int]:
        """Ids of a text that every answer begins with; raises UsageError for one the model cannot read."""
        ...

    def answer_text(self, answer_ids: list[int]) -> str:
        """Text of answer ids, special tokens kept."""
        ...

    def answer_span(self, answer_text: str) -> str | None:
        """The part of an answer's text that holds the answer, unchanged; None if there is none."""

    def raw_answer(self, answer_text: str) -> str | None:
        """The number in an answer's text as the family's own evaluation reads it; None if there is none."""

    def load(self, *, device: str, dtype: str) -> Reasoner:
        """Load the weights."""
        ...
