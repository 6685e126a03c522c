"""How far the latents of a rollout are from those of the rollouts before it, summed on the device that makes them."""

from __future__ import annotations

from collections.abc import Collection
from itertools import islice

import torch
from torch import Tensor

MAX_KEPT_BYTES = 1 << 26  # of sums; the oldest go first


class DirectionSums:
    """Sums of the directions of each question's latents. A rollout is compared with the sum, not with every other one.

    The sums of the questions seen longest ago are dropped, so that memory does not grow with the number of questions.
    """

    def __init__(self) -> None:
        self._known: dict[str, tuple[int, int]] = {}  # by key, the oldest first: rollouts, and the place of their sums
        # one piece of memory for all: small ones would lie between what later batches free and need again
        self._sums_PTD = torch.empty(0, 0, 0, dtype=torch.float64)
        self._free: list[int] = []  # places below `len(self._known) + len(self._free)`

    def counted(self, key: str) -> int:
        """How many of a question's first rollouts its sums hold."""
        return self._known[key][0] if key in self._known else 0

    def get(self, key: str) -> tuple[int, Tensor] | None:
        """How many rollouts of a question were taken in, and the sums (T, D) of their directions; None if none were.

        The sums are a view, valid until the next `put` or `add`.
        """
        if key not in self._known:
            return None
        count, place = self._known[key]
        return count, self._sums_PTD[place]

    def put(self, key: str, count: int, sums_TD: Tensor, *, kept: Collection[str] = ()) -> None:
        """Set what `get` returned somewhere else; the sums of the questions in `kept` are not dropped."""
        self._set([key], [count], sums_TD[None], kept)

    def forget(self, key: str) -> None:
        """Drop a question's sums."""
        if key in self._known:
            self._free.append(self._known.pop(key)[1])

    def add(self, keys: list[str], latents_RTD: Tensor, *, first: list[int], kept: Collection[str] = ()) -> Tensor:
        """Compare N rollouts of each of Q questions with those before them, and add them to the sums.

        Args:
            keys: of the questions, each once.
            latents_RTD: question-major, in order; zeros where a row has no latent.
            first: the number of each question's first rollout; those before it were added before.
            kept: questions whose sums are not dropped.

        Returns:
            (R, T) in float32 on the CPU: 1 - cosine with the latent of the same step of each rollout before, summed. A
            latent of zeros has a cosine of 0 with all.

        Raises:
            ValueError: the sums of a question do not hold the rollouts before its first one.
        """
        counted = [self.counted(key) for key in keys]
        if counted != first or len(set(keys)) < len(keys):
            raise ValueError(f"the sums hold {counted} rollouts, and those before {first} are needed")
        sums_QTD = latents_RTD.new_zeros(len(keys), *latents_RTD.shape[1:], dtype=torch.float64)
        for place, key in enumerate(keys):
            if (known := self.get(key)) is not None:
                sums_QTD[place] = known[1]
        units_RTD = torch.nn.functional.normalize(latents_RTD.double(), dim=-1, eps=1e-300)
        units_QNTD = units_RTD.unflatten(0, (len(keys), -1))
        before_QNTD = units_QNTD.cumsum(1) - units_QNTD + sums_QTD[:, None]
        cosines_QNT = (units_QNTD * before_QNTD).sum(-1).cpu()
        rollouts = units_QNTD.shape[1]
        self._set(keys, [count + rollouts for count in counted], sums_QTD + units_QNTD.sum(1), kept)
        others_QN = torch.tensor(counted, dtype=torch.float64)[:, None] + torch.arange(rollouts)
        return (others_QN[..., None] - cosines_QNT).float().flatten(0, 1)

    def _set(self, keys: list[str], counts: list[int], sums_QTD: Tensor, kept: Collection[str]) -> None:
        """Set the sums of some questions, each once."""
        if not self._known and not self._free:
            self._sums_PTD = torch.empty_like(sums_QTD)
        for key, count in zip(keys, counts, strict=True):
            self._known[key] = count, self._place_for(key, kept)
        # without those that others of the batch displaced
        numbers = {self._known[key][1]: number for number, key in enumerate(keys) if key in self._known}
        self._sums_PTD[list(numbers)] = sums_QTD[list(numbers.values())].to(self._sums_PTD.device)

    def _place_for(self, key: str, kept: Collection[str]) -> int:
        """A place for a question's sums, its own if it has one; without room, the oldest questions lose theirs."""
        if key in self._known:
            return self._known.pop(key)[1]
        surplus = 1 + len(self._known) - MAX_KEPT_BYTES // max(1, self._sums_PTD[0].nbytes)
        for oldest in list(islice((each for each in self._known if each not in kept), max(0, surplus))):
            self.forget(oldest)
        if self._free:
            return self._free.pop()
        if len(self._known) == len(self._sums_PTD):
            kept_PTD = self._sums_PTD
            self._sums_PTD = kept_PTD.new_empty(2 * len(kept_PTD), *kept_PTD.shape[1:])
            self._sums_PTD[: len(kept_PTD)] = kept_PTD
        return len(self._known)
