"""The queue of `executor=ray` with 1,000 workers, in virtual time: writes simulation.csv and simulation.svg.

python experiments/scale/simulate.py [SEEDS]

Workers have speeds drawn evenly from 1 to 4, fail once per 6 hours on average, and are back 120 s later. Another one
begins their shard anew; with static shares, they do so themselves. The driver is busy 2 ms with every shard. Work is
GSM8K-Aug's 385,620 prompts with costs spread like prompt lengths, as much as 1,000 workers do in two hours. Static ways
divide the prompts beforehand.
"""

from __future__ import annotations

import heapq
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from latent_tts.executor import Finished
from latent_tts.pipeline import dispatch
from latent_tts.pipeline.dispatch import ShardQueue, Unit, results_of
from latent_tts.results.plot import save_figure

FOLDER = Path(__file__).parent
WORKERS, PROMPTS, SECONDS = 1000, 385_620, 7200.0
SLOWEST, FASTEST = 1.0, 4.0
SECONDS_BETWEEN_FAILURES, SECONDS_TO_RESTART, SECONDS_OF_DRIVER = 6 * 3600.0, 120.0, 0.002
AVAILABILITY = SECONDS_BETWEEN_FAILURES / (SECONDS_BETWEEN_FAILURES + SECONDS_TO_RESTART)
SPREAD = 0.35  # of the logarithm of a prompt's cost


class Machines:
    """A pool of workers in virtual time."""

    def __init__(self, speeds: np.ndarray, costs: np.ndarray, seed: int) -> None:
        self.now, self._speeds, self._costs = 0.0, speeds, costs
        self._random = np.random.default_rng(seed)
        self._ends: list[tuple[float, int, Finished]] = []
        self.failures = 0

    @property
    def workers(self) -> list[int]:
        """All of them: none is lost for good."""
        return list(range(len(self._speeds)))

    def describe(self) -> list[Any]:
        """Nothing is asked of them."""
        return []

    def submit(self, worker: int, shard: np.ndarray) -> None:
        """Let a worker compute some prompts."""
        needed = float(self._costs[shard].sum() / self._speeds[worker])
        alive = float(self._random.exponential(SECONDS_BETWEEN_FAILURES))
        done = Finished(worker, (), needed) if alive >= needed else Finished(worker, None, 0.0, lost=True)
        heapq.heappush(self._ends, (self.now + min(alive, needed), worker, done))

    def took(self, needed: float) -> float:
        """Seconds until work that needs some is done by one worker, whatever fails on the way."""
        spent = 0.0
        while (alive := float(self._random.exponential(SECONDS_BETWEEN_FAILURES))) < needed:
            spent += alive + SECONDS_TO_RESTART
            self.failures += 1
        return spent + needed

    def next_finished(self) -> Finished:
        """The worker that is done next, fails or is back; the driver takes what it sent."""
        ended, worker, done = heapq.heappop(self._ends)
        self.now = max(self.now, ended) + SECONDS_OF_DRIVER
        if done.lost:
            self.failures += 1
            heapq.heappush(self._ends, (ended + SECONDS_TO_RESTART, worker, Finished(worker, None, 0.0, back=True)))
        return done


def queued(speeds: np.ndarray, costs: np.ndarray, seed: int, units: list[Unit[int]]) -> dict[str, float]:
    """The queue as it is."""
    machines, timeline = Machines(speeds, costs, seed), []
    queue = ShardQueue(units, len(speeds), first_rows=1)
    for _ in results_of(machines, queue, np.array, timeline, clock=lambda: machines.now):
        pass
    return {"seconds": machines.now, "shards": len(timeline), "failures": machines.failures}


def static(speeds: np.ndarray, costs: np.ndarray, seed: int, shares: np.ndarray) -> dict[str, float]:
    """Each worker gets a share of the work beforehand, in pieces of 30 s: a failure costs one of them."""
    machines, ends = Machines(speeds, costs, seed), []
    for speed, share in zip(speeds, shares, strict=True):
        needed = float(share * costs.sum() / speed)
        pieces = max(1, round(needed / dispatch.MAX_SECONDS))
        ends.append(sum(machines.took(needed / pieces) for _ in range(pieces)))
    return {"seconds": max(ends), "shards": len(speeds), "failures": machines.failures}


def simulate(seeds: int) -> pd.DataFrame:
    """A row per seed and way: seconds, and how far above the bound."""
    costs = np.random.default_rng(0).lognormal(0.0, SPREAD, PROMPTS)
    costs *= WORKERS * SECONDS * (SLOWEST + FASTEST) / 2 / costs.sum()
    units = [Unit(number, float(cost), 1) for number, cost in enumerate(costs)]
    rows = []
    for seed in range(seeds):
        speeds = np.random.default_rng([1, seed]).uniform(SLOWEST, FASTEST, WORKERS)
        bound = float(costs.sum() / (speeds.sum() * AVAILABILITY))
        ways = {
            "queue": queued(speeds, costs, seed, units),
            "static, equal shares": static(speeds, costs, seed, np.full(WORKERS, 1 / WORKERS)),
            "static, by known speeds": static(speeds, costs, seed, speeds / speeds.sum()),
        }
        for way, found in ways.items():
            rows.append({"way": way, "seed": seed, **found, "bound": bound, "above": found["seconds"] / bound - 1})
        print(seed, {way: f"{found['seconds'] / bound - 1:.2%}" for way, found in ways.items()}, file=sys.stderr)
    return pd.DataFrame(rows)


def draw(table: pd.DataFrame, path: Path) -> None:
    """A point per seed and way."""
    figure = Figure(figsize=(7, 2.4), layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(table["way"]))
    for place, name in enumerate(names):
        above = 100 * table.loc[table["way"] == name, "above"]
        axes.plot(above, np.full(len(above), place) + np.linspace(-0.15, 0.15, len(above)), "o", ms=4, alpha=0.7)
    axes.axvline(3, color="grey", lw=0.8, ls="--")
    axes.set_yticks(range(len(names)), names)
    axes.set_xscale("log")
    axes.set_xticks([1, 3, 10, 30, 100], ["1", "3", "10", "30", "100"])
    axes.minorticks_off()
    axes.invert_yaxis()
    axes.set_xlabel("percent above total work / (total speed x availability)")
    seeds = table["seed"].nunique()
    axes.set_title(f"{WORKERS:,} workers of speeds {SLOWEST:g} to {FASTEST:g}, {seeds} seeds", fontsize=9)
    save_figure(figure, [path])


if __name__ == "__main__":
    found = simulate(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
    found.to_csv(FOLDER / "simulation.csv", index=False, float_format="%.6g")
    draw(found, FOLDER / "simulation.svg")
    print(found.groupby("way", sort=False)["above"].agg(["min", "mean", "max"]))
