"""`schedule=sequential`: one latent after another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from latent_tts.errors import check_fields, require
from latent_tts.schedule import LatentModel, LatentSequence, Schedule


@dataclass(frozen=True)
class Sequential(Schedule):
    """The order in which models were trained to think.

    Attributes:
        exit: a rollout stops thinking once a further latent moves the distribution of its answer's first token by no
            more than this (total variation, in [0, 1)); None: it makes all latents.
        exit_prefix: what the model writes before the answer, as in `###`: the distribution is the one after it.
    """

    exit: float | None = None
    exit_prefix: str | None = None

    name: ClassVar[str] = "sequential"
    stepwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields("schedule", self, exit="a number in [0, 1), or null to make all latents")
        allowed = (
            "must be the text that the model writes before its answer, as in '###' (of embedded reasoners); '' for none"
        )
        is_text = self.exit is None or isinstance(self.exit_prefix, str)
        require("schedule.exit_prefix", self.exit_prefix, is_text, allowed)

    @property
    def exact(self) -> bool:
        """Whether these are the latents that others are compared with."""
        return self.exit is None

    @property
    def key(self) -> str | dict[str, Any]:
        """The schedule's part of the cache key."""
        if self.exit is None:
            return self.name
        return {"name": self.name, "exit": float(self.exit), "exit_prefix": self.exit_prefix}

    def check(self, model: LatentModel) -> None:
        """Accept every model; one that has no latents cannot make fewer.

        Raises:
            UsageError: `exit` is set and the model has no latents.
        """
        allowed = f"must be null: model={model.name} has no latents"
        require("schedule.exit", self.exit, self.exit is None or model.latents > 0, allowed)

    def run(self, latents: LatentSequence) -> None:
        """Compute the missing latents, until every row has ended its thinking."""
        while latents.unfinished:
            latents.advance()
