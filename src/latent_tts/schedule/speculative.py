"""`schedule=speculative`: latents run ahead on guesses, and are committed where the guesses turn out right.

A latent is a function of those before it: h_t = F_t(h_1..h_(t-1)), its noise and masks included, since they are keyed
by (rollout, step). A sweep computes the next `chunk` latents of every row side by side from their current values. Then
the row commits from left to right:

- A latent's version counts how often its value changed. Each computed latent remembers the versions of those before
  it, as their sum (versions never fall, so equal sums are equal versions).
- It is committed if these are the versions of the committed latents. The first one after the committed ones always is.
- The first latent that is not is a conflict: it and those after it were made from values that have changed. The next
  sweep computes them again, from their present values as guesses.

So a sweep commits at least one latent, and a row needs at most T sweeps (T - 1 where the prompt's pass makes h_1). A
value has changed if its bits have (`tolerance=0`), or if the relative RMS difference is above `tolerance`; otherwise
the latent keeps the value that others were computed from. Committed latents therefore satisfy
|h_t - F_t(h_1..h_(t-1))| <= tolerance * |F_t(...)|, with equality of bits at 0. What a row commits depends on the row
alone, not on its batch (at a tolerance above 0 up to rounding, which may tip a difference that is just at the
tolerance).

With models that decide the number of latents, commits end where a committed pass predicts the stop token.

Source: optimistic execution (Kung and Robinson 1981) over the iteration of Song et al. 2021 (arXiv 2002.03629).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

from latent_tts.errors import check_fields, require
from latent_tts.schedule import LatentSequence, ParallelSchedule, Sweep

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Speculative(ParallelSchedule):
    """Sweeps over guesses, with versions, commits and conflicts.

    Attributes:
        chunk: C, the number of latents that a row computes side by side; None for all.
        tolerance: relative RMS difference up to which a latent counts as unchanged; 0 asks for equal bits.
        guess: the latents before the first sweep, see `LatentSequence.guess`.
        draft: the file of a draft head, with `guess=draft`.
        mixing: number of earlier sweeps that the next guesses are extrapolated from; 0 takes what the last one made.
        verify: whether the rollouts are compared with those of `schedule=sequential`.
    """

    chunk: int | None = None
    tolerance: float = 0.0
    guess: str = "token"
    draft: str | None = None
    mixing: int = 0
    verify: bool = False

    name: ClassVar[str] = "speculative"

    def __post_init__(self) -> None:
        super().__post_init__()
        kinds = {"mixing": "an integer, 0 or more", "tolerance": "a number in [0, 1)", "verify": "true or false"}
        check_fields("schedule", self, **kinds)
        allowed = "needs schedule.tolerance=0: otherwise rollouts would depend on the batch"
        require("schedule.guess", self.guess, self.guess != "sibling" or self.tolerance == 0, allowed)

    @property
    def key(self) -> dict[str, Any]:
        """The schedule's part of the cache key; `verify` changes no rollout, and a draft's digest is added to it."""
        return {name: getattr(self, name) for name in ("name", "chunk", "tolerance", "guess", "mixing")}

    @property
    def exact(self) -> bool:
        """Whether its latents are certain to be those of `sequential`, up to rounding."""
        return self.tolerance == 0

    def run(self, latents: LatentSequence) -> None:
        """Compute all latents."""
        import torch

        values_RTD, total, counts = latents.latents_RTD, latents.total, latents.counts
        chunk = 1 if latents.first_is_free else self.chunk or total  # of the first sweep
        latents.guess(0, total, self.guess)
        place_T = torch.arange(total, device=values_RTD.device)
        version_RT = values_RTD.new_zeros(values_RTD.shape[:2], dtype=torch.int64)
        committed_R = version_RT.new_zeros(len(version_RT))
        limit_R = committed_R + total  # T, or fewer once the model has stopped
        mixing = _Mixing(self.mixing) if self.mixing else None
        first = 0
        while first < total:
            active_R = committed_R < limit_R
            # the inputs of a row's last pass stay, also once others are behind it
            stop = min(int(torch.where(active_R, committed_R + chunk, limit_R + 1).max()), total)
            free = first == 0 and latents.first_is_free
            window_RT = (place_T >= committed_R[:, None]) & (place_T < committed_R[:, None] + chunk) & active_R[:, None]
            made_from_RT = _sum_before(version_RT)
            made_RSD, stops_RS = latents.compute(first, stop)
            now_RSD, window_RS = values_RTD[:, first:stop], window_RT[:, first:stop]
            changed_RS = window_RS & ~self._equal(now_RSD, made_RSD)
            before_RTD = values_RTD if mixing is None else values_RTD.clone()
            now_RSD[changed_RS] = made_RSD[changed_RS]
            version_RT[:, first:stop] += changed_RS

            valid_RT = (made_from_RT == _sum_before(version_RT)) & window_RT
            commits_R = (valid_RT | (place_T < committed_R[:, None])).long().cumprod(1).sum(1) - committed_R
            counts.sweeps_R += active_R & (not free)
            counts.conflicts_R += window_RT.sum(1) - commits_R
            start_R = torch.where(active_R, committed_R, total)
            committed_R = committed_R + commits_R
            if mixing is not None:
                open_RT = window_RT & (place_T >= committed_R[:, None])
                mixed_RSD = mixing.mix(first, before_RTD, made_RSD, open_RT)
                mixed_RS = changed_RS & open_RT[:, first:stop]  # nothing was made from the changed values yet
                now_RSD[mixed_RS] = mixed_RSD[mixed_RS]
            if stops_RS is not None:
                final_RS = stops_RS & (place_T[first:stop] < committed_R[:, None]) & window_RS
                stopped_R = final_RS.any(1)
                limit_R = torch.where(stopped_R, first + final_RS.long().argmax(1), limit_R)
                committed_R = torch.minimum(committed_R, limit_R)
            counts.timeline.append(Sweep(start_R, start_R + window_RT.sum(1), committed_R))
            chunk = self.chunk or total
            first = int(torch.where(committed_R < limit_R, committed_R, total).min())
        counts.commits_R += limit_R
        latents.commit_until(limit_R)

    def _equal(self, one: Tensor, other: Tensor) -> Tensor:
        """Whether vectors (..., D) are equal within the tolerance."""
        if self.tolerance == 0:
            return (one == other).all(-1)
        difference, size = (one - other).float().square().mean(-1), other.float().square().mean(-1)
        return difference <= self.tolerance**2 * size


class _Mixing:
    """Triangular Anderson mixing: the next guesses, extrapolated from what the last sweeps changed.

    A latent's coefficients minimise the residuals (made minus guessed) of all uncommitted latents up to it, so it
    depends on its own row and on latents before it alone.

    Source: Tang et al. 2024 (arXiv 2402.09970), section 3.
    """

    DAMPING = 1e-4  # relative to the largest residual change; with equal changes any coefficients would do

    def __init__(self, sweeps: int) -> None:
        self.sweeps = sweeps
        self.history: list[tuple[Tensor, Tensor, Tensor]] = []  # made, residual, which ones; the newest last

    def mix(self, first: int, values_RTD: Tensor, made_RSD: Tensor, open_RT: Tensor) -> Tensor:
        """Guesses (R, S, D) for the next sweep; `made_RSD` where there is nothing to extrapolate from.

        Args:
            first: the first of the S latents.
            values_RTD: what they were made from.
            made_RSD: what the sweep made.
            open_RT: which it made of each row and did not commit: those that became final say nothing of the others.
        """
        import torch

        place = slice(first, first + made_RSD.shape[1])
        made_RTD = values_RTD.to(torch.float64, copy=True)
        made_RTD[:, place] = made_RSD.to(torch.float64)
        residual_RTD = (made_RTD - values_RTD) * open_RT[..., None]
        self.history = [*self.history[-self.sweeps :], (made_RTD, residual_RTD, open_RT)]
        if len(self.history) == 1:
            return made_RSD
        made_changes, residual_changes = [], []
        for (made, residual, had), (next_made, next_residual, has) in pairwise(self.history):
            both_RT1 = (had & has)[..., None]
            made_changes.append((next_made - made) * both_RT1)
            residual_changes.append((next_residual - residual) * both_RT1)
        change_RTMD = torch.stack(residual_changes, 2)
        gram_RTMM = torch.einsum("rtid,rtjd->rtij", change_RTMD, change_RTMD).cumsum(1)
        wanted_RTM1 = torch.einsum("rtid,rtd->rti", change_RTMD, residual_RTD).cumsum(1)[..., None]
        largest_RT = gram_RTMM.diagonal(dim1=-2, dim2=-1).amax(-1)
        damping_RT = self.DAMPING * largest_RT + torch.finfo(gram_RTMM.dtype).tiny
        gram_RTMM = gram_RTMM + damping_RT[..., None, None] * torch.eye(gram_RTMM.shape[-1], device=gram_RTMM.device)
        coefficients_RTM1 = torch.linalg.solve(gram_RTMM, wanted_RTM1)
        mixed_RTD = made_RTD - (coefficients_RTM1 * torch.stack(made_changes, 2)).sum(2)
        return mixed_RTD[:, place].to(made_RSD.dtype)


def _sum_before(version_RT: Tensor) -> Tensor:
    """The sum of the versions of all earlier latents."""
    return version_RT.cumsum(1) - version_RT
