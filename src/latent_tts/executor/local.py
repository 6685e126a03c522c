"""`executor=local`: the command computes everything itself."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, ClassVar

from latent_tts.executor import Finished, Work


class LocalPool:
    """The driver itself as the only worker: it computes a shard when it is asked for the next finished one."""

    workers = (0,)

    def __init__(self, work: Work) -> None:
        self._worker = work()
        self._shards: list[Any] = []

    def describe(self) -> list[Any]:
        """What it says of itself."""
        return [self._worker.describe()]

    def submit(self, worker: int, shard: Any) -> None:
        """Remember a shard."""
        self._shards.append(shard)

    def next_finished(self) -> Finished:
        """Compute the shard that was remembered first."""
        started = time.perf_counter()
        result = self._worker.compute(self._shards.pop(0))
        return Finished(0, result, time.perf_counter() - started)


@dataclass(frozen=True)
class Local:
    """One process, which draws batch after batch."""

    name: ClassVar[str] = "local"
    in_process: ClassVar[bool] = True

    @property
    def fixed(self) -> bool:
        """There is one worker, which needs no balance."""
        return True

    def check(self, device: str) -> None:
        """Accept every device: whether it exists is checked where something is computed."""

    def open(self, work: Work, device: str) -> LocalPool:
        """Start the worker."""
        return LocalPool(work)
