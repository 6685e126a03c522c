"""Work shared out among workers: who computes what next, and what that took.

A worker that is idle takes the next shard, so none is idle while work is left. The longest questions go first. A shard
is as large as its worker is quick: it takes a share of the time that all workers need for what is left. So shards
shrink towards the end, and all workers end at about the same time (guided self-scheduling). Work that takes longer than
that is divided. Its pieces go to one worker after another while there is other work, and to several at once when there
is none.

Source: Polychronopoulos and Kuck 1987 (doi:10.1109/TC.1987.5009495).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from latent_tts.executor import Pool
from latent_tts.results.timeline import Span

T = TypeVar("T")
SHARE = 0.5  # of the time that is left, taken by the next shard
MIN_SECONDS, MAX_SECONDS = 0.5, 30.0  # of a shard, as far as its questions allow
NEWEST = 0.5  # weight of the newest measurement of a worker's speed
TOO_LARGE = 1.5  # times what a worker should take: what is larger is divided
MIN_FIRST_ROWS = 8  # of a piece for a worker whose speed is unknown


@dataclass(frozen=True)
class Unit(Generic[T]):
    """Work for one worker.

    Attributes:
        content: what a shard holds of it.
        cost: in any unit; the time that a worker needs grows with it.
        rows: rollouts.
        keys: units with a common key are computed one after another, in their order, as long as there are others.
        divisible: whether it may be computed in pieces, and before earlier units with a common key have been.
        place: rows of the units before it; the queue sets it.
    """

    content: T
    cost: float
    rows: int
    keys: frozenset[str] = frozenset()
    divisible: bool = False
    place: int = 0


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
        self._units, rows = list[Unit[T]](), 0
        for unit in units:
            self._units.append(replace(unit, place=rows))
            rows += unit.rows
        if not self._each:
            self._units.sort(key=lambda unit: -unit.cost)
        self._units.reverse()  # the next one is the last
        self._left = sum(unit.cost for unit in self._units)
        self._first_cost = self._left * (first_rows or 0) / max(rows, 1)
        self._speeds: dict[int, float] = {}
        self._total_speed = 0.0
        self._running: dict[str, list[int]] = {}  # by key: places of the units that are being computed

    def __len__(self) -> int:
        """How many units are left."""
        return len(self._units)

    def take(self, worker: int) -> list[Unit[T]]:
        """The next shard of a worker; empty if there is nothing left, or nothing that may be computed now."""
        wanted, taken, cost = 0.0 if self._each else self._wanted(worker), [], 0.0
        while (index := self._next()) is not None:
            unit = self._units[index]
            if taken and (self._each or cost + unit.cost / 2 > wanted):
                break
            del self._units[index]
            if not taken and not self._each:
                unit = self._cut(unit, index, wanted, known=worker in self._speeds)
            taken.append(unit)
            cost += unit.cost
        self._left -= cost
        for unit in taken:
            for key in unit.keys:
                self._running.setdefault(key, []).append(unit.place)
        return taken

    def _next(self) -> int | None:
        """Index of the next unit: before those with the same key none is computed or waits, or no other is left."""
        waiting: set[str] = set()
        early = None
        for index in range(len(self._units) - 1, -1, -1):
            unit = self._units[index]
            if not (unit.keys & waiting or self._is_early(unit)):
                return index
            if early is None and unit.divisible:
                early = index
            waiting |= unit.keys
        return early

    def _is_early(self, unit: Unit[T]) -> bool:
        """Whether an earlier unit with the same key is being computed."""
        return any(min(self._running[key]) < unit.place for key in unit.keys & self._running.keys())

    def _cut(self, unit: Unit[T], index: int, wanted: float, *, known: bool) -> Unit[T]:
        """The first piece of a unit that is too large; the rest takes its place in the queue."""
        if not known:
            wanted = max(wanted, MIN_FIRST_ROWS * unit.cost / unit.rows)
        if self._divide is None or not unit.divisible or unit.rows < 2 or unit.cost < TOO_LARGE * wanted:
            return unit
        rows = min(max(1, round(unit.rows * wanted / unit.cost)), unit.rows - 1)
        cost = unit.cost * rows / unit.rows
        first, rest = self._divide(unit.content, rows)
        others = replace(unit, content=rest, cost=unit.cost - cost, rows=unit.rows - rows, place=unit.place + rows)
        self._units.insert(index, others)
        return replace(unit, content=first, cost=cost, rows=rows)

    def early_keys(self, units: Sequence[Unit[T]]) -> frozenset[str]:
        """The keys of a shard by which an earlier unit is being computed by another worker."""
        first: dict[str, int] = {}
        for unit in units:
            for key in unit.keys:
                first[key] = min(unit.place, first.get(key, unit.place))
        return frozenset(key for key, place in first.items() if min(self._running[key]) < place)

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
        for unit in reversed(units):
            later = (other.place < unit.place and not other.keys.isdisjoint(unit.keys) for other in self._units)
            self._units.insert(next((index for index, is_so in enumerate(later) if is_so), len(self._units)), unit)
        self._left += sum(unit.cost for unit in units)

    def joined(self) -> None:
        """A worker that was lost is there again; its speed is unknown."""
        self._workers += 1

    def _release(self, units: Sequence[Unit[T]]) -> None:
        for unit in units:
            for key in unit.keys:
                self._running[key].remove(unit.place)
                if not self._running[key]:
                    del self._running[key]


def results_of(
    pool: Pool,
    queue: ShardQueue[T],
    make_shard: Callable[[list[T], frozenset[str]], Any],
    timeline: list[Span],
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[tuple[list[T], Any]]:
    """Have everything in a queue computed.

    Args:
        pool: the workers.
        queue: the work.
        make_shard: makes what is sent to a worker, right before it is sent, of contents of units and `early_keys`.
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
            pool.submit(worker, make_shard([unit.content for unit in units], queue.early_keys(units)))
            taken[worker] = units, clock()
        if not taken and not queue:
            return
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
