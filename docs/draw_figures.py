"""Draws the small figures of docs/figures.md: `make plots` runs it.

The swept ones are of runs of the built-in reasoner, which take a minute or two; the others of tables in experiments/.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd

from latent_tts.results.plot import scaling_figure
from latent_tts.results.run_folder import read_metrics

ROOT = Path(__file__).parents[1]
DPI = 85
SIGMAS = [f"{0.05 * (place + 1):.2g}" for place in range(20)]
RATES = ["0.02", "0.05", "0.1", "0.2"]


def sweep(folder: Path, sampler: str, key: str, values: list[str]) -> pd.DataFrame:
    """The table of a sweep over one setting of a sampler."""
    choice = [f"sampler={sampler}", f"sampler.{key}={','.join(values)}", f"hydra.sweep.dir={folder}"]
    fixed = ["budget=ladder", "n=16", "task.limit=200"]
    subprocess.run([sys.executable, "-m", "latent_tts", "run", "-m", *choice, *fixed], check=True, capture_output=True)
    return read_metrics(folder / "metrics.csv")


def main() -> None:
    """Draw them into docs/figures/ and print their paths."""
    experiments = ROOT / "experiments"
    both = read_metrics(experiments / "main_curve" / "results.csv")
    with tempfile.TemporaryDirectory() as folder:
        gaussian = sweep(Path(folder) / "gaussian", "gaussian", "sigma", SIGMAS)
        dropout = sweep(Path(folder) / "dropout", "dropout", "rate", RATES)
    majority = gaussian[gaussian["aggregator"].isin(["", "majority"])]
    eight = majority[majority["sampler_value"].isin(SIGMAS[1:16:2])]
    few = pd.concat([dropout, gaussian[gaussian["sampler_value"].isin(["0.1", "0.2", "0.4", "0.8"])]])
    votes = pd.concat([dropout[dropout["aggregator"].isin(["", "majority"])], eight])
    figures = {
        "one": both[both["sampler"] == "gaussian"],
        "searches": read_metrics(experiments / "latent_rm" / "results.csv"),
        "eight": eight,
        "twenty": majority,
        "two_sweeps": few,
        "points": few[(few["n"] == 16) & few["aggregator"].isin(["", "majority"])],
        "by_gflops": votes,
        "by_diversity": votes,
    }
    for name, table in figures.items():
        path = ROOT / "docs" / "figures" / f"{name}.png"
        against = name.removeprefix("by_") if name.startswith("by_") else "n"
        scaling_figure(table, against).savefig(path, dpi=DPI)
        print(path)


if __name__ == "__main__":
    main()
