"""Tests whether a sweep over n computes anything twice: seconds of `n=1,4,16,64 -m` compared with n=64.

    python benchmarks/sweep.py [--questions 1000] [--repeats 3]

Each command runs in its own process with an empty cache; the two commands alternate. Target: a ratio of at most 1.35.
Prints one line per pair, then JSON as the last line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time

COMMAND = [sys.executable, "-c", "from latent_tts.cli import entry; entry()", "run", "sampler=gaussian"]


def seconds_of(arguments: list[str]) -> float:
    """Wall-clock seconds of one command in a new folder."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        subprocess.run([*COMMAND, "paths.cache=cache", *arguments], cwd=folder, check=True, capture_output=True)
        return time.perf_counter() - started


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    questions = f"task.limit={arguments.questions}"
    ratios = []
    for _ in range(arguments.repeats):
        alone, sweep = seconds_of([questions, "n=64"]), seconds_of([questions, "n=1,4,16,64", "-m"])
        ratios.append(sweep / alone)
        print(f"n=64 {alone:6.1f} s   n=1,4,16,64 {sweep:6.1f} s   ratio {ratios[-1]:.2f}")
    print(
        json.dumps({"questions": arguments.questions, "ratio_median": round(statistics.median(ratios), 3), "bar": 1.35})
    )


if __name__ == "__main__":
    main()
