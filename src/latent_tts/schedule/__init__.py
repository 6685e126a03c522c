"""The order in which the latents of a rollout are computed; one option of the group `schedule` per module."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from latent_tts.errors import check_fields, require

if TYPE_CHECKING:
    from torch import Tensor


class LatentModel(Protocol):
    """What a schedule needs to know about a model; every `CheckpointAdapter` is one."""

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


@dataclass(frozen=True)
class Sweep:
    """What one sweep did with the latents of each row (int64, R; latents are counted from 0).

    Attributes:
        first_R, stop_R: the latents that it computed are first..stop-1; none where both are equal.
        final_R: how many latents are final after it.
    """

    first_R: Tensor
    stop_R: Tensor
    final_R: Tensor


@dataclass
class Counts:
    """What a schedule counts per row (int64, R).

    Attributes:
        sweeps_R: passes after the prompt's that computed latents of the row.
        commits_R: latents found to be made from the latents that are final; 0 where a schedule does not check.
        conflicts_R: latents that were computed from others than those, and were computed again.
        timeline: the sweeps in order, that of the prompt's pass included. Schedules that compute one latent after
            another add none.
    """

    sweeps_R: Tensor
    commits_R: Tensor
    conflicts_R: Tensor
    timeline: list[Sweep] = field(default_factory=list)


class LatentSequence(Protocol):
    """The latents of unfinished rollouts, as a schedule computes them: T per row, counted from 0.

    Attributes:
        latents_RTD: all latents; a schedule writes into it.
        counts: what the schedule counts; zeros at first.
        total: T.
        first_is_free: whether the prompt's pass made the first latent, so that `compute(0, 1)` runs no pass.
    """

    latents_RTD: Tensor
    counts: Counts
    total: int
    first_is_free: bool

    @property
    def unfinished(self) -> bool:
        """Whether some row still lacks a latent."""
        ...

    def advance(self) -> Tensor:
        """Compute the next latent (R, D) of every row."""
        ...

    def guess(self, start: int, stop: int, what: str) -> None:
        """Set latents start..stop-1 to a guess.

        Args:
            start: the first.
            stop: after the last.
            what: `token` (the embedding of `<|latent|>`), `zero`, `greedy` (the question's latents without noise, and
                the row's own noise), `draft` (what a draft head predicts from h_1, and the row's own noise; h_1 itself
                is computed, in a sweep of its own if it is not free), or `sibling` (the latents of the question's first
                rollout in the batch).
        """

    def compute(self, first: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """Compute latents first..stop-1 (R, S, D) in one pass, each from the current values of those before it.

        Nothing is written into `latents_RTD`. Earlier passes have run the inputs of latents before `first`.

        Returns:
            The latents, and where the model decided to stop instead (R, S); None for a fixed number of latents.
        """
        ...

    def commit(self, first: int) -> None:
        """Finish: all latents are computed, and the inputs of those below `first` were run with their final values."""

    def commit_until(self, steps_R: Tensor) -> None:
        """Finish: rows have as many latents as `steps_R` says; the inputs of all but the last were run as they are."""


class Schedule(Protocol):
    """The order in which the latents of a rollout are computed. Options inherit these defaults.

    Attributes:
        name: as shown in tables.
        stepwise: whether latents are computed one after another, so that each prefix of them is the beginning of a
            rollout.
        guess: what latents are before they are computed, see `LatentSequence.guess`; empty where nothing is guessed.
        draft: the file of the draft head that makes its guesses; None without one.
        verify: whether the rollouts are to be compared with those of `sequential`.
        exit: a rollout stops thinking once a further latent moves the distribution of its answer's first token by no
            more than this (total variation, in [0, 1)); None: it makes all latents.
        exit_prefix: what the model writes before that token.
    """

    name: ClassVar[str]
    stepwise: ClassVar[bool]
    guess: str = ""
    draft: str | None = None
    verify: bool = False
    exit: float | None = None
    exit_prefix: str | None = None

    @property
    def exact(self) -> bool:
        """Whether its latents are certain to be those of `sequential`, up to rounding."""
        return False

    @property
    def key(self) -> str | dict[str, Any]:
        """The schedule's part of the cache key."""
        return self.name

    def check(self, model: LatentModel) -> None:
        """Check that a model can use this schedule.

        Raises:
            UsageError: it cannot.
        """

    def run(self, latents: LatentSequence) -> None:
        """Compute all missing latents."""

    def repeated_passes(self, latents: int) -> list[tuple[int, int]]:
        """Passes beyond those of `sequential`, for the cost of a rollout: (tokens, latents before them) of each.

        Those that depend on the rollout are left out; they are counted as its conflicts.
        """
        return []


GUESSES_OF_ROLLOUTS = ("greedy", "sibling")  # guesses made of another rollout of the question
GUESSES = ("token", "zero", *GUESSES_OF_ROLLOUTS, "draft")


class ParallelSchedule(Schedule, Protocol):
    """A schedule that computes latents side by side, from guesses.

    Attributes:
        chunk: C, the number of latents computed in parallel; None for all.
    """

    stepwise: ClassVar[bool] = False
    chunk: int | None

    def __post_init__(self) -> None:
        check_fields("schedule", self, chunk="a positive integer, or null for all latents", guess=GUESSES)
        guess, draft = self.guess, self.draft
        require(
            "schedule.draft",
            draft,
            guess != "draft" or bool(isinstance(draft, str) and draft),
            "must be the file of a draft head, which ltts train-draft writes",
        )
        require("schedule.draft", draft, guess == "draft" or draft is None, f"must be null with schedule.guess={guess}")

    def check(self, model: LatentModel) -> None:
        """Check that a model's latents can be computed side by side.

        Raises:
            UsageError: the model has no latents, or fewer than `chunk`, or has no token for the guess, or no latents to
                draft.
        """
        most, chunk = model.latents, self.chunk
        require("schedule", self.name, most != 0, f"must be sequential: model={model.name} has no latents")
        require("schedule.chunk", chunk, chunk is None or chunk <= most, f"must be at most model.latents={most}")
        if self.guess == "token":
            _ = model.latent_id
        allowed = "a draft head predicts h_2 and later latents, and model.latents=1"
        require("schedule.guess", self.guess, self.guess != "draft" or most >= 2, allowed)
