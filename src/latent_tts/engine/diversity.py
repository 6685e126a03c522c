"""How far the latents of a rollout are from those of the rollouts before it, summed on the device that makes them."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

MAX_KEPT_BYTES = 1 << 26  # of sums; the oldest go first


class DirectionSums:
    """Sums of the directions of each question's latents. A rollout is compared with the sum, not with every other one.

    The sums of the questions seen longest ago are dropped, so that memory does not grow with the number of questions.
    """

    def __init__(self) -> None:
        # in a tensor for all questions of a batch: small ones would lie between what later batches free and need again
        self._sums: dict[str, tuple[int, Tensor, int]] = {}

    def counted(self, key: str) -> int:
        """How many of a question's first rollouts its sums hold."""
        return self._sums[key][0] if key in self._sums else 0

    def get(self, key: str) -> tuple[int, Tensor] | None:
        """How many rollouts of a question were taken in, and the sums (T, D) of their directions; None if none were."""
        if key not in self._sums:
            return None
        count, sums_QTD, place = self._sums[key]
        return count, sums_QTD[place]

    def put(self, key: str, count: int, sums_TD: Tensor, *, kept: Collection[str] = ()) -> None:
        """Set what `get` returned somewhere else; the sums of the questions in `kept` are not dropped."""
        self.forget(key)
        self._sums[key] = count, sums_TD[None], 0
        self._drop_oldest(kept)

    def forget(self, key: str) -> None:
        """Drop a question's sums."""
        self._sums.pop(key, None)

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
        sums_QTD += units_QNTD.sum(1)
        for place, (key, count) in enumerate(zip(keys, counted, strict=True)):
            self.forget(key)
            self._sums[key] = count + rollouts, sums_QTD, place
        self._drop_oldest(kept)
        others_QN = torch.tensor(counted, dtype=torch.float64)[:, None] + torch.arange(rollouts)
        return (others_QN[..., None] - cosines_QNT).float().flatten(0, 1)

    def _drop_oldest(self, kept: Collection[str] = ()) -> None:
        sums_QTD = next(iter(self._sums.values()))[1]  # all are of one size
        surplus = len(self._sums) - MAX_KEPT_BYTES * len(sums_QTD) // max(1, sums_QTD.nbytes)
        for key in [key for key in self._sums if key not in kept][: max(0, surplus)]:
            self.forget(key)
