"""Who computes what next: workers of set speeds, in virtual time, take shards from the queue."""

import heapq
import itertools
from collections import defaultdict

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from latent_tts.errors import RunError
from latent_tts.executor import Finished
from latent_tts.pipeline.dispatch import MAX_SECONDS, MIN_SECONDS, TOO_LARGE, ShardQueue, Unit, results_of


class Machines:
    """A pool of workers that need `cost / speed` seconds for a shard; those that `die` do so in their nth shard.

    Those that return are there again after a second, with the same speed.
    """

    def __init__(self, speeds, costs, die=None, returning=()):
        self.now, self._speeds, self._costs, self._die = 0.0, dict(enumerate(speeds)), costs, dict(die or {})
        self._returning = set(returning)
        self._ends, self.running, self.computed = [], {}, []

    @property
    def workers(self):
        return list(self._speeds)

    def submit(self, worker, shard):
        assert worker not in self.running, "a busy worker got a shard"
        self.running[worker] = shard
        seconds = sum(self._costs[unit] for unit in shard) / self._speeds[worker]
        heapq.heappush(self._ends, (self.now + seconds, worker, seconds))

    def next_finished(self):
        self.now, worker, seconds = heapq.heappop(self._ends)
        if worker not in self.running:
            return Finished(worker, None, 0.0, back=True)
        shard = self.running.pop(worker)
        if worker in self._die:
            self._die[worker] -= 1
            if self._die[worker] < 0 and worker in self._returning:
                del self._die[worker]
                heapq.heappush(self._ends, (self.now + 1.0, worker, 1.0))
                return Finished(worker, None, 0.0, lost=True)
            if self._die[worker] < 0:
                del self._speeds[worker]
                if not self._speeds:
                    raise RunError("no worker is left")
                return Finished(worker, None, 0.0, lost=True)
        self.computed += shard
        return Finished(worker, shard, seconds)


def compute(speeds, costs, first_rows=4, die=None, returning=()):
    units = [Unit(number, cost, 1) for number, cost in enumerate(costs)]
    machines, timeline = Machines(speeds, costs, die, returning), []
    results = list(results_of(
        machines, ShardQueue(units, len(speeds), first_rows), list, timeline,
        clock=lambda: machines.now,
    ))  # fmt: skip
    return machines, timeline, results


class Questions(Machines):
    """The same for contents (question, range of rollouts), of which one costs `costs[question]`."""

    def submit(self, worker, shard):
        questions = [question for question, _ in shard]
        assert len(set(questions)) == len(questions), "two pieces of a question in a shard"
        self.running[worker] = shard
        seconds = sum(self._costs[question] * len(rollouts) for question, rollouts in shard) / self._speeds[worker]
        heapq.heappush(self._ends, (self.now + seconds, worker, seconds))


def cut(content, rows):
    question, rollouts = content
    return (question, rollouts[:rows]), (question, rollouts[rows:])


def compute_questions(speeds, questions, first_rows=4, die=None, divisible=True):
    """Draw rollouts of questions, each with a number and a cost of one."""
    units = [
        Unit((str(question), range(count)), cost * count, count) for question, (count, cost) in enumerate(questions)
    ]
    costs = {str(question): cost for question, (_, cost) in enumerate(questions)}
    machines, timeline = Questions(speeds, costs, die), []
    queue = ShardQueue(units, len(speeds), first_rows, cut if divisible else None)
    contents = [
        content
        for shard, _ in results_of(machines, queue, list, timeline, clock=lambda: machines.now)
        for content in shard
    ]
    return contents, timeline


def ends(timeline):
    last = defaultdict(float)
    for span in timeline:
        last[span.worker] = max(last[span.worker], span.ended)
    return last


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.floats(0.1, 10), min_size=1, max_size=5),
    st.lists(st.floats(0.01, 100), min_size=1, max_size=30),
    st.one_of(st.none(), st.integers(1, 10)),
    st.dictionaries(st.integers(0, 4), st.integers(0, 3)),
    st.sets(st.integers(1, 4)),
)
def test_everything_is_computed_once_whoever_dies(speeds, costs, first_rows, die, returning):
    machines, timeline, results = compute(speeds, costs, first_rows, die=die, returning={0, *returning})
    assert sorted(machines.computed) == list(range(len(costs)))
    assert [unit for content, _ in results for unit in content] == machines.computed
    assert sum(span.rows for span in timeline) == len(costs)


def test_of_two_workers_one_is_three_times_slower_and_both_end_within_one_small_shard():
    _, timeline, _ = compute([3.0, 1.0], [1.0] * 3000)
    small = min(span.ended - span.started for span in timeline)
    first, last = sorted(ends(timeline).values())
    assert small <= MIN_SECONDS + 1  # a question takes the slower worker a second
    assert last - first <= MIN_SECONDS + 1
    work = {worker: sum(span.rows for span in timeline if span.worker == worker) for worker in (0, 1)}
    assert work[0] / work[1] == pytest.approx(3, rel=0.05)


@pytest.mark.parametrize("questions", [[(2000, 0.2)], [(700, 0.3)] * 3])
def test_few_questions_are_divided_and_a_slow_worker_ends_within_one_small_shard_of_a_quick_one(questions):
    _, timeline = compute_questions([3.0, 1.0], questions, first_rows=64)
    first, last = sorted(ends(timeline).values())
    assert last - first <= TOO_LARGE * MIN_SECONDS + 0.3  # a rollout takes the slower worker so long
    work = {worker: sum(span.rows for span in timeline if span.worker == worker) for worker in (0, 1)}
    assert work[0] / work[1] == pytest.approx(3, rel=0.05)
    for worker in range(2):
        own = sorted((span.started, span.ended) for span in timeline if span.worker == worker)
        assert own[0][0] == 0
        assert all(after[0] == before[1] for before, after in itertools.pairwise(own))
    assert len(timeline) < 60


@given(
    st.lists(st.floats(0.1, 10), min_size=1, max_size=5),
    st.lists(st.tuples(st.integers(1, 40), st.floats(0.01, 10)), min_size=1, max_size=5),
    st.integers(1, 10),
    st.dictionaries(st.integers(1, 4), st.integers(0, 3)),
)
def test_each_rollout_of_divided_questions_is_drawn_once_whoever_dies(speeds, questions, first_rows, die):
    contents, _ = compute_questions(speeds, questions, first_rows, die)  # worker 0 lives
    drawn = sorted((question, number) for question, rollouts in contents for number in rollouts)
    assert drawn == sorted(
        (str(place), number) for place, (count, _) in enumerate(questions) for number in range(count)
    )


def test_questions_that_cannot_be_divided_are_not():
    whole, _ = compute_questions([1.0, 1.0], [(1000, 1.0)] * 4, first_rows=100, divisible=False)
    assert [len(rollouts) for _, rollouts in whole] == [1000] * 4


def test_a_worker_that_becomes_slow_gets_less():
    class Slowing(Machines):
        def submit(self, worker, shard):
            self._speeds[1] = 1.0 if self.now > 100 else 9.0
            super().submit(worker, shard)

    machines, timeline = Slowing([9.0, 9.0], [1.0] * 20000), []
    queue = ShardQueue([Unit(number, 1.0, 1) for number in range(20000)], 2, 4)
    list(results_of(machines, queue, list, timeline, clock=lambda: machines.now))
    first, last = sorted(ends(timeline).values())
    assert last - first <= MIN_SECONDS + 1


def test_the_longest_questions_go_first_and_no_shard_takes_longer_than_allowed():
    costs = [1.0 + number % 7 for number in range(5000)]
    _, timeline, results = compute([2.0, 1.0], costs)
    order = [costs[unit] for content, _ in results for unit in content]
    assert order[0] == 7
    assert order[-1] == 1
    assert max(span.ended - span.started for span in timeline) <= MAX_SECONDS + 7
    assert len(timeline) < 1300  # not a shard per question


def test_no_worker_is_idle_while_work_is_left():
    _, timeline, _ = compute([3.0, 1.0, 2.0], [1.0] * 500)
    for worker in range(3):
        own = sorted((span.started, span.ended) for span in timeline if span.worker == worker)
        assert own[0][0] == 0
        assert all(after[0] == before[1] for before, after in itertools.pairwise(own))


def test_fixed_shards_are_single_units_in_their_order():
    _, timeline, results = compute([1.0, 1.0], [3.0, 1.0, 2.0, 5.0], first_rows=None)
    assert sorted(content for content, _ in results) == [[0], [1], [2], [3]]
    assert [span.rows for span in timeline] == [1] * 4


def test_the_shard_of_a_worker_that_died_waits_for_nobody_and_the_worker_takes_others_when_it_is_there_again():
    machines, timeline, _ = compute([1.0, 1.0], [1.0] * 100, die={1: 2}, returning={1})
    assert sorted(machines.computed) == list(range(100))
    own = sorted((span.started, span.ended) for span in timeline if span.worker == 1)
    gaps = [after[0] - before[1] for before, after in itertools.pairwise(own)]
    assert [gap for gap in gaps if gap > 1e-9] == [pytest.approx(1.0)]
    first, last = sorted(ends(timeline).values())
    assert last - first <= MIN_SECONDS + 1
    _, timeline, _ = compute([1.0, 1.0], [1.0, 1.0], die={1: 0}, returning={1})  # nothing is left when it is back
    assert [span.worker for span in timeline if span.rows] == [0, 0]


def test_without_a_worker_the_error_is_raised():
    with pytest.raises(RunError, match="no worker is left"):
        compute([1.0], [1.0] * 10, die={0: 1})
