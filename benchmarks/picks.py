"""Accuracy of picks over subsets, compared with comparing all pairs of rollouts in every subset.

    python benchmarks/picks.py [--questions 1000] [--drawn 64] [--answers 20] [--quadratic-questions 200]

Uses random rollouts, budgets 1, 2, 4, ... up to all rollouts, four aggregators and one thread. The slow way compares
all pairs for a part of the questions; its seconds are scaled to all questions. Seconds are processor seconds; memory is
the peak of allocations, measured in a separate run. Target: 2 s in total for 1000 x 64.
Prints a table, then JSON as the last line.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))  # the slow way is an oracle of the tests

from quadratic import accuracy  # type: ignore[import-not-found]

from latent_tts.aggregator import Aggregator
from latent_tts.aggregator.best_of_n import BestOfN
from latent_tts.aggregator.likelihood import Likelihood
from latent_tts.aggregator.majority import Majority
from latent_tts.aggregator.weighted import Weighted
from latent_tts.results import statistics as stats
from latent_tts.types import RolloutArrays

AGGREGATORS: tuple[Aggregator, ...] = (Majority(), Likelihood(), BestOfN(), Weighted(1.0))


def random_rollouts(questions: int, drawn: int, answers: int) -> RolloutArrays:
    """Rollouts of questions with different difficulty; for most, the right answer is the most frequent one."""
    generator = np.random.default_rng(0)
    shape = (questions, drawn)
    ranks = generator.pareto(generator.uniform(0.3, 2.0, (questions, 1)), shape)
    predictions = np.minimum(ranks, answers - 1).astype(np.int64)
    predictions[generator.random(shape) < 0.02] = -1
    right = predictions == generator.integers(0, 2, (questions, 1))
    return RolloutArrays(predictions, right, -generator.exponential(2, shape), generator.normal(size=shape) + right)


def budgets_of(drawn: int) -> list[int]:
    """1, 2, 4, ... and the number drawn."""
    return [*(2**power for power in range(drawn.bit_length()) if 2**power < drawn), drawn]


def cost_of(call: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Minimum of the processor seconds of a call, and the peak of its allocations in MB."""
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        seconds.append(time.process_time() - start)
    tracemalloc.start()
    call()
    peak = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    return min(seconds), peak


def quadratic(aggregator: Aggregator, rollouts: RolloutArrays, budgets: list[int]) -> None:
    """Run the slow way, on the subsets of `latent_tts.results.statistics`."""
    for n in budgets:
        accuracy(aggregator, rollouts, np.concatenate(list(stats.subsets(rollouts.prediction_QD.shape[1], n))))


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("questions", 1000), ("drawn", 64), ("answers", 20), ("quadratic-questions", 200)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--repeats", type=int, default=3)
    chosen = parser.parse_args(arguments)
    rollouts = random_rollouts(chosen.questions, chosen.drawn, chosen.answers)
    budgets = budgets_of(chosen.drawn)
    part = min(chosen.quadratic_questions, chosen.questions)
    print(f"{chosen.questions} questions x {chosen.drawn} rollouts, budgets {budgets}")
    print(f"{'aggregator':12} {'seconds':>9} {'MB':>8} {'all pairs, s':>13} {'MB':>8} {'ratio':>8}")
    results = []
    for aggregator in AGGREGATORS:
        seconds, peak = cost_of(lambda a=aggregator: stats.picked_accuracies(a, rollouts, budgets), chosen.repeats)
        result = {"aggregator": aggregator.name, "seconds": seconds, "peak_mb": peak}
        line = f"{aggregator.name:12} {seconds:9.3f} {peak:8.1f}"
        if part:
            few = rollouts.questions(slice(part))
            slow, slow_peak = cost_of(lambda a=aggregator, f=few: quadratic(a, f, budgets), 1)
            slow *= chosen.questions / part
            result |= {"quadratic_seconds": slow, "quadratic_peak_mb": slow_peak, "ratio": slow / seconds}
            line += f" {slow:13.3f} {slow_peak:8.1f} {slow / seconds:8.1f}"
        print(line)
        results.append(result)
    print(f"{'all':12} {sum(float(result['seconds']) for result in results):9.3f}")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
