"""Work shared out among workers: who computes what next, and what that took.

A worker that is idle takes the next shard, so none is idle while work is left. The longest questions go first. A shard
is as large as its worker is quick: it takes a share of the time that all workers need for what is left. So shards
shrink towards the end, and all workers end at about the same time (guided self-scheduling).

Source: Polychronopoulos and Kuck 1987 (doi:10.1109/TC.1987.5009495).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from latent_tts.executor import Pool
from latent_tts.results.timeline import Span

T = TypeVar("T")
SHARE = 0.5  # of the time that is left, taken by the next shard
MIN_SECONDS, MAX_SECONDS = 0.5, 30.0  # of a shard, as far as its questions allow
NEWEST = 0.5  # weight of the newest measurement of a worker's speed


@dataclass(frozen=True)
class Unit(Generic[T]):
    """Work that is not divided among workers.

    Attributes:
        content: what a shard holds of it.
        cost: in any unit; the time that a worker needs grows with it.
        rows: rollouts.
        keys: units with a common key are computed one after another, in their order.
    """

    content: T
    cost: float
    rows: int
    keys: frozenset[str] = frozenset()


class ShardQueue(Generic[T]):
    """What is left to compute, and how quick each worker is."""

    def __init__(self, units: Iterable[Unit[T]], workers: int, first_rows: int | None = None) -> None:
        """Begin with unknown speeds.

        Args:
            units: in the order in which they are computed if each is a shard; otherwise the costly ones go first.
            workers: how many there are.
            first_rows: rollouts of a worker's first shard; None makes each unit a shard.
        """
        self._each, self._workers = first_rows is None, workers
        self._units = list(units)
        if not self._each:
            self._units.sort(key=lambda unit: -unit.cost)
        self._units.reverse()  # the next one is the last
        self._left = sum(unit.cost for unit in self._units)
        rows = sum(unit.rows for unit in self._units)
        self._first_cost = self._left * (first_rows or 0) / max(rows, 1)
        self._speeds: dict[int, float] = {}
        self._total_speed = 0.0
        self._running: dict[str, int] = {}  # keys of units, with how many are being computed

    def __len__(self) -> int:
        """How many units are left."""
        return len(self._units)

    def take(self, worker: int) -> list[Unit[T]]:
        """The next shard of a worker; empty if there is nothing left, or nothing that may be computed now."""
        if self._each:
            taken = self._next_free()
        else:
            taken, wanted, cost = [], self._wanted(worker), 0.0
            while self._units and (not taken or cost + self._units[-1].cost / 2 <= wanted):
                taken.append(self._units.pop())
                cost += taken[-1].cost
        self._left -= sum(unit.cost for unit in taken)
        for key in (key for unit in taken for key in unit.keys):
            self._running[key] = self._running.get(key, 0) + 1
        return taken

    def _next_free(self) -> list[Unit[T]]:
        """The first unit none of whose keys is being computed, or waits in a unit before it."""
        waiting: set[str] = set()
        for place in range(len(self._units) - 1, -1, -1):
            keys = self._units[place].keys
            if not (keys & self._running.keys() or keys & waiting):
                return [self._units.pop(place)]
            waiting |= keys
        return []

    def _wanted(self, worker: int) -> float:
        """How much a worker should take, in units of cost."""
        speed = self._speeds.get(worker)
        if speed is None:
            return min(self._first_cost, SHARE * self._left / self._workers)
        total = self._total_speed * self._workers / len(self._speeds)  # the others are taken to be as quick
        return speed * min(MAX_SECONDS, max(MIN_SECONDS, SHARE * self._left / total))

    def finished(self, worker: int, units: Sequence[Unit[T]], seconds: float) -> None:
        """A worker has computed what it took."""
        self._release(units)
        speed, old = sum(unit.cost for unit in units) / max(seconds, 1e-9), self._speeds.get(worker)
        speed = speed if old is None else NEWEST * speed + (1 - NEWEST) * old
        self._total_speed += speed - (old or 0.0)
        self._speeds[worker] = speed

    def lost(self, worker: int, units: Sequence[Unit[T]]) -> None:
        """A worker is gone; what it took is computed next."""
        self._release(units)
        self._workers -= 1
        self._total_speed -= self._speeds.pop(worker, 0.0)
        self._units += reversed(units)
        self._left += sum(unit.cost for unit in units)

    def _release(self, units: Sequence[Unit[T]]) -> None:
        for key in (key for unit in units for key in unit.keys):
            self._running[key] -= 1
            if not self._running[key]:
                del self._running[key]


def results_of(
    pool: Pool,
    queue: ShardQueue[T],
    make_shard: Callable[[list[T]], Any],
    timeline: list[Span],
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[tuple[list[T], Any]]:
    """Have everything in a queue computed.

    Args:
        pool: the workers.
        queue: the work.
        make_shard: makes what is sent to a worker, right before it is sent.
        timeline: gets a span per shard.
        clock: what spans are measured by.

    Yields:
        What a shard consisted of, and its result; a worker gets its next shard when the caller comes back.

    Raises:
        RunError: no worker is left, or a worker raised it.
    """
    taken: dict[int, tuple[list[Unit[T]], float]] = {}
    idle = list(pool.workers)
    while True:
        offered, idle = idle, []
        for worker in offered:
            if not (units := queue.take(worker)):
                idle.append(worker)
                continue
            pool.submit(worker, make_shard([unit.content for unit in units]))
            taken[worker] = units, clock()
        if not taken:
            return
        done = pool.next_finished()
        units, started = taken.pop(done.worker)
        rows = 0 if done.lost else sum(unit.rows for unit in units)
        timeline.append(Span(done.worker, started, clock(), rows))
        if done.lost:
            queue.lost(done.worker, units)
            continue
        idle.append(done.worker)
        queue.finished(done.worker, units, done.seconds)
        yield [unit.content for unit in units], done.result
