"""Work shared out among workers: who computes what next, and what that took.

A worker that is idle takes the next shard, so none is idle while work is left. The longest questions go first. A shard
is as large as its worker is quick: it takes a share of the time that all workers need for what is left. So shards
shrink towards the end, and all workers end at about the same time (guided self-scheduling). Work that takes longer than
that is divided.

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
TOO_LARGE = 1.5  # times what a worker should take: what is larger is divided
MIN_FIRST_ROWS = 8  # of a piece for a worker whose speed is unknown


@dataclass(frozen=True)
class Unit(Generic[T]):
    """Work for one worker.

    Attributes:
        content: what a shard holds of it.
        cost: above 0, in any unit; the time that a worker needs grows with it.
        rows: rollouts.
    """

    content: T
    cost: float
    rows: int


class ShardQueue(Generic[T]):
    """What is left to compute, and how quick each worker is."""

    def __init__(
        self,
        units: Iterable[Unit[T]],
        workers: int,
        first_rows: int | None = None,
        divide: Callable[[T, int], tuple[T, T]] | None = None,
    ) -> None:
        """Begin with unknown speeds.

        Args:
            units: in the order in which they are computed if each is a shard; otherwise the costly ones go first.
            workers: how many there are.
            first_rows: rollouts of a worker's first shard; None makes each unit a shard.
            divide: the first rows of a unit's content, and the others; None where no unit is divided.
        """
        self._each, self._workers, self._divide = first_rows is None, workers, divide
        self._units = list(units)
        if not self._each:
            self._units.sort(key=lambda unit: -unit.cost)
        self._units.reverse()  # the next one is the last
        self._left = sum(unit.cost for unit in self._units)
        self._first_cost = self._left * (first_rows or 0) / max(sum(unit.rows for unit in self._units), 1)
        self._speeds: dict[int, float] = {}
        self._lost: list[list[Unit[T]]] = []  # shards

    def __len__(self) -> int:
        """How much is left: 0 if nothing is."""
        return len(self._units) + len(self._lost)

    def take(self, worker: int) -> list[Unit[T]]:
        """The next shard of a worker, of a queue that is not empty."""
        taken = self._lost.pop() if self._lost else self._next(worker)
        self._left -= sum(unit.cost for unit in taken)
        return taken

    def _next(self, worker: int) -> list[Unit[T]]:
        if self._each:
            return [self._units.pop()]
        wanted = self._wanted(worker)
        taken = [self._cut(self._units.pop(), wanted, known=worker in self._speeds)]
        cost = taken[0].cost
        while self._units and cost + self._units[-1].cost / 2 <= wanted:
            taken.append(self._units.pop())
            cost += taken[-1].cost
        return taken

    def _cut(self, unit: Unit[T], wanted: float, *, known: bool) -> Unit[T]:
        """The first piece of a unit that is too large; the rest is taken next."""
        if not known:
            wanted = max(wanted, MIN_FIRST_ROWS * unit.cost / unit.rows)
        if self._divide is None or unit.rows < 2 or unit.cost < TOO_LARGE * wanted:
            return unit
        rows = min(max(1, round(unit.rows * wanted / unit.cost)), unit.rows - 1)
        cost = unit.cost * rows / unit.rows
        first, rest = self._divide(unit.content, rows)
        self._units.append(Unit(rest, unit.cost - cost, unit.rows - rows))
        return Unit(first, cost, rows)

    def _wanted(self, worker: int) -> float:
        """How much a worker should take, in units of cost."""
        if worker not in self._speeds:
            return min(self._first_cost, SHARE * self._left / self._workers)
        total = sum(self._speeds.values()) * self._workers / len(self._speeds)  # the others are taken to be as quick
        return self._speeds[worker] * min(MAX_SECONDS, max(MIN_SECONDS, SHARE * self._left / total))

    def finished(self, worker: int, units: Sequence[Unit[T]], seconds: float) -> None:
        """A worker has computed what it took."""
        self._speeds[worker] = sum(unit.cost for unit in units) / max(seconds, 1e-9)

    def lost(self, worker: int, units: Sequence[Unit[T]]) -> None:
        """A worker is gone; its shard is the next one."""
        self._workers -= 1
        self._speeds.pop(worker, None)
        self._lost.append(list(units))
        self._left += sum(unit.cost for unit in units)

    def joined(self) -> None:
        """A worker that was lost is there again; its speed is unknown."""
        self._workers += 1


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
        make_shard: makes what is sent to a worker, right before it is sent, of contents of units.
        timeline: gets a span per shard.
        clock: what spans are measured by.

    Yields:
        What a shard consisted of, and its result; a worker gets its next shard when the caller comes back.

    Raises:
        RunError: no worker is left, or a worker raised it.
    """
    taken: dict[int, tuple[list[Unit[T]], float]] = {}
    idle = list(pool.workers)
    while taken or queue:
        while idle and queue:
            worker = idle.pop(0)
            units = queue.take(worker)
            pool.submit(worker, make_shard([unit.content for unit in units]))
            taken[worker] = units, clock()
        done = pool.next_finished()
        if done.back:
            queue.joined()
            idle.append(done.worker)
        if done.worker not in taken:
            continue
        units, started = taken.pop(done.worker)
        rows = 0 if done.lost else sum(unit.rows for unit in units)
        timeline.append(Span(done.worker, started, clock(), rows))
        if done.lost:
            queue.lost(done.worker, units)
            continue
        idle.append(done.worker)
        queue.finished(done.worker, units, done.seconds)
        yield [unit.content for unit in units], done.result
