"""`schedule=jacobi`: latents in parallel, by sweeps that recompute all of them from those of the sweep before.

A latent is a function of those before it: h_t = F(prompt, h_1..h_(t-1)). A sweep computes all h_t at once from their
current values, in one pass over T tokens instead of T passes over one. Each latent needs only those before it, so after
sweep k the first k latents equal those of `schedule=sequential`, and after T sweeps all of them do, up to rounding.
Final latents keep their keys and values, and later sweeps leave them out. With `chunk` = C, chunks of C latents are
computed one after another, and only the latents of a chunk are computed in parallel; `sweeps` = C is then enough.

With `known_first` the sweeps begin with h_1, which the prompt's pass makes, instead of a guess: k sweeps give k+1 final
latents in as many passes.

Random numbers are keyed by (rollout, step) and not by the sweep, so noise and masks of a step are the same in every
sweep, and the argument above holds for random latents too. There is no early stopping: if it depended on the batch, so
would the rollouts; if it depended on the row, it would save nothing while other rows continue.

Source: Song et al. 2021 (arXiv 2002.03629) for the iteration and its bound; PCCoT (Wu et al. 2025, arXiv
2506.18582) is a model that is trained with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

from latent_tts.errors import check_fields, require
from latent_tts.schedule import LatentModel, LatentSequence, ParallelSchedule, Sweep


@dataclass(frozen=True)
class Jacobi(ParallelSchedule):
    """Parallel sweeps.

    Attributes:
        sweeps: K, the number of times that the latents (of a chunk) are computed; T (or C) or more gives the sequential
            ones.
        chunk: C, the number of latents computed in parallel; None for all.
        guess: the latents before the first sweep, see `LatentSequence.guess`.
        draft: the file of a draft head, with `guess=draft`.
        known_first: whether h_1 is computed before the sweeps. Samplers that change the pass over the prompt's last
            token need a pass of its own for it.
    """

    sweeps: int
    chunk: int | None = None
    guess: str = "token"
    draft: str | None = None
    known_first: bool = False

    name: ClassVar[str] = "jacobi"

    def __post_init__(self) -> None:
        check_fields("schedule", self, sweeps="a positive integer", known_first="true or false")
        super().__post_init__()
        require(
            "schedule.known_first",
            True,
            not self.known_first or self.guess != "draft",
            "must be false with schedule.guess=draft, which begins with h_1",
        )

    @property
    def key(self) -> dict[str, Any]:
        """The schedule's part of the cache key."""
        known = {"known_first": True} if self.known_first else {}
        return {"name": self.name, "sweeps": self.sweeps, "chunk": self.chunk, "guess": self.guess, **known}

    def check(self, model: LatentModel) -> None:
        """Check that a model can use this schedule.

        Raises:
            UsageError: as for every parallel schedule, or the model decides the number of latents itself, or a rollout
                would depend on the first one of its batch.
        """
        super().check(model)
        needed = self.chunk or model.latents - self.known_first
        why = f"needs schedule.sweeps={needed} or more: otherwise rollouts would depend on the batch"
        require("schedule.guess", self.guess, self.guess != "sibling" or self.sweeps >= needed, why)
        require(
            "schedule",
            self.name,
            model.stop_id is None,
            f"must be sequential or speculative: model={model.name} decides after each latent whether to continue",
        )

    def run(self, latents: LatentSequence) -> None:
        """Compute all latents."""
        import torch

        settled, counts, sweeps = 0, latents.counts, list(self._sweeps(latents.total))
        for (first, start, stop), following in zip(sweeps, [*sweeps[1:], None], strict=True):
            if first <= start:
                latents.guess(start, stop, self.guess)
            changed = max(first, start)
            made_RSD, _ = latents.compute(first, stop)
            latents.latents_RTD[:, changed:stop] = made_RSD[:, changed - first :]
            counts.sweeps_R += not (self.known_first and stop == 1 and latents.first_is_free)
            settled = changed + 1
            is_last = following is None or following[1] > start  # of its chunk, whose latents stay as they are
            ends = (changed, stop, stop if is_last else settled)
            counts.timeline.append(Sweep(*(torch.full_like(counts.sweeps_R, end) for end in ends)))
        latents.commit(settled)

    def repeated_passes(self, latents: int) -> list[tuple[int, int]]:
        """(tokens, latents before them) of the part of each sweep that a later pass runs again."""
        ends = [(max(first, start) + 1, stop) for first, start, stop in self._sweeps(latents)]
        return [(stop - settled, settled - 1) for settled, stop in ends if stop > settled]

    def _sweeps(self, latents: int) -> Iterator[tuple[int, int, int]]:
        """Each sweep as (first, start, stop): it computes latents start..stop-1 from the inputs of first..stop-1.

        The input of latent t is latent t-1. Inputs of latents below `first` were already final when they were run.
        """
        first, chunk = 0, self.chunk or max(latents, 1)
        starts = [0] * self.known_first + list(range(int(self.known_first), latents, chunk))
        for start, stop in pairwise([*starts, latents]):
            for _ in range(min(self.sweeps, stop - start)):
                yield first, start, stop
                first = max(first, start) + 1
