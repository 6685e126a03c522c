"""Adapters of the families of reasoners; one option of the group `model` per module."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from latent_tts.schedule import Schedule
from latent_tts.text.answer import AnswerFormat
from latent_tts.types import Question, Reasoner


class ModelAdapter(AnswerFormat, Protocol):
    """A checkpoint of a family of reasoners: its layout, its prompts and its answer format."""

    @property
    def name(self) -> str:
        """The name of the model in tables."""
        ...

    @property
    def checkpoint(self) -> str:
        """A folder, `shipped:NAME` or a hub id."""
        ...

    @property
    def latents(self) -> int:
        """T, the number of latents."""
        ...

    @property
    def prompt_recipe(self) -> str:
        """A text that identifies how prompts are made; part of every cache key."""
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
    def sizes(self) -> dict[str, Any]:
        """The sizes of the backbone, as `checkpoint.files.sizes` gives them."""
        ...

    @property
    def digest(self) -> str:
        """A digest of weights, shape and tokenizer."""
        ...

    @property
    def identity(self) -> str:
        """What tables call the model: `digest`, and prompts and end tokens where other files say what they are."""
        ...

    @property
    def positions(self) -> int:
        """The maximum sequence length of the backbone, in tokens."""
        ...

    @property
    def thinking_end_ids(self) -> list[int]:
        """The tokens forced after the last latent."""
        ...

    @property
    def latent_id(self) -> int:
        """The placeholder of a latent in a rollout that is written as token ids."""
        ...

    @property
    def stop_id(self) -> int | None:
        """The token that ends a rollout's thinking when it is the most probable; None for a fixed number of latents."""

    @property
    def has_spread(self) -> bool:
        """Whether the latent head predicts a Gaussian, with a standard deviation."""
        ...

    @property
    def latent_weights(self) -> int:
        """Matrix entries that a hidden state goes through to become a latent; 0 where it is one as it is."""
        ...

    @property
    def own_schedule(self) -> Schedule | None:
        """The schedule that is part of the model; None if the user chooses one."""

    @property
    def eos_id(self) -> int:
        """The token that ends an answer in written text."""
        ...

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """All tokens that end an answer; the first is `eos_id`."""
        ...

    def check(self) -> None:
        """Check every file, reading only the headers of the weights.

        Raises:
            UsageError: a file is missing, damaged or of another family.
        """

    def encode(self, question: Question) -> list[int]:
        """Token ids of the prompt.

        Raises:
            UsageError: the model cannot read the text.
        """
        ...

    def forced_ids(self, text: str) -> list[int]:
        """Ids of a text that every answer begins with.

        Raises:
            UsageError: the model cannot read the text.
        """
        ...

    def answer_text(self, answer_ids: list[int]) -> str:
        """The text of answer ids, with special tokens."""
        ...

    def load(self, *, device: str, dtype: str) -> Reasoner:
        """Load the weights."""
        ...
