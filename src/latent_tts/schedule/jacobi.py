"""`schedule=jacobi`: the latents of a rollout in parallel, by sweeps that remake all of them from the last sweep's.

A latent is a function of those before it: h_t = F(prompt, h_1..h_(t-1)). A sweep computes all h_t at once from the
present values, in one pass over T tokens instead of T passes over one. After sweep k the first k latents are those of
`schedule=sequential`, since each needs only the ones before it; so from `sweeps` = T on all are, up to rounding. The
latents that are final keep their keys and values, and later sweeps leave them out. With `chunk` = C, chunks of C
latents follow one another and only those of a chunk are made in parallel; `sweeps` = C is then enough.

Random numbers belong to (rollout, step) and not to a sweep: noise and masks of a step are the same in every sweep, and
the argument above holds with them. There is no stopping rule: one that looks at a batch would let a rollout depend on
its batch, and one row's early end saves nothing while others go on.

Source: Song et al. 2021 (arXiv 2002.03629) for the iteration and its bound; as a model of its own PCCoT (Wu et al.
2025, arXiv 2506.18582).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from latent_tts.errors import bad_value, is_whole
from latent_tts.schedule import LatentModel, LatentSequence

GUESSES = ("token", "zero")


@dataclass(frozen=True)
class Jacobi:
    """Parallel sweeps.

    Attributes:
        sweeps: K, how often the latents (of a chunk) are remade; T, or C, or more gives the sequential ones.
        chunk: C, latents that are made in parallel; None takes all.
        guess: what they are before the first sweep: `token` (the embedding of `<|latent|>`) or `zero`.
    """

    sweeps: int
    chunk: int | None = None
    guess: str = "token"

    name: ClassVar[str] = "jacobi"
    stepwise: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not (is_whole(self.sweeps) and self.sweeps >= 1):
            raise bad_value("schedule.sweeps", self.sweeps, "a number of sweeps, 1 or more")
        if self.chunk is not None and not (is_whole(self.chunk) and self.chunk >= 1):
            raise bad_value("schedule.chunk", self.chunk, "a number of latents, 1 or more, or null for all")
        if self.guess not in GUESSES:
            raise bad_value("schedule.guess", self.guess, f"one of {', '.join(GUESSES)}")

    @property
    def key(self) -> dict[str, Any]:
        """What keys of caches hold."""
        return {"name": self.name, "sweeps": self.sweeps, "chunk": self.chunk, "guess": self.guess}

    def check(self, model: LatentModel) -> None:
        """Whether a model can think so.

        Raises:
            UsageError: it has no latents, a number of them that it chooses on the way, or no token to guess.
        """
        if model.latents == 0:
            raise bad_value("schedule", self.name, f"it makes latents, and model={model.name} has none")
        if model.stop_id is not None:
            raise bad_value(
                "schedule",
                self.name,
                f"model={model.name} says after each latent whether it thinks on; use sequential",
            )
        if self.guess == "token":
            _ = model.latent_id

    def run(self, latents: LatentSequence) -> None:
        """Make all latents."""
        settled = 0
        for first, start, stop in self._sweeps(latents.total):
            if first <= start:
                latents.guess(start, stop, self.guess)
            latents.recompute(first, start, stop)
            settled = max(first, start) + 1
        latents.commit(settled)

    def repeated_passes(self, latents: int) -> list[tuple[int, int]]:
        """(tokens, latents before them) of what each sweep runs and a later pass runs again."""
        ends = [(max(first, start) + 1, stop) for first, start, stop in self._sweeps(latents)]
        return [(stop - settled, settled - 1) for settled, stop in ends if stop > settled]

    def _sweeps(self, latents: int) -> Iterator[tuple[int, int, int]]:
        """Each sweep as (first, start, stop): latents start..stop-1 are remade, and what makes first.. is run for that.

        What makes latent t is latent t-1; below `first` it has been final when it was run.
        """
        first, chunk = 0, self.chunk or max(latents, 1)
        for start in range(0, latents, chunk):
            stop = min(start + chunk, latents)
            for _ in range(min(self.sweeps, stop - start)):
                yield first, start, stop
                first = max(first, start) + 1
