"""Draws figure.svg from results.csv: what each stopping rule uses, and what it loses. `make plots` runs it."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib import pyplot as plt

FOLDER = Path(__file__).parent
RULES = ("lockout", "certified", "certified, K=200", "posterior", "confidence", "reward")
MARKERS = "osD^vP"


def main() -> None:
    """Draw it."""
    matplotlib.rcParams["svg.hashsalt"] = "budgets"
    table = pd.read_csv(FOLDER / "results.csv")
    table = table[(table["seed"] == 0) & (table["round"] == 1)]
    panels = list(table.groupby(["model", "sampler"], sort=False))
    figure, axes = plt.subplots(2, 3, figsize=(9, 5.4), sharex=True, sharey=True, layout="constrained")
    for axis, ((model, sampler), rows) in zip(axes.flat, panels, strict=False):
        names = rows["rule"].str.replace(r" [\d.]+$", "", regex=True)
        for place, (name, marker) in enumerate(zip(RULES, MARKERS, strict=True)):
            rule = rows[names == name].sort_values("used")
            bars = [rule["difference"] - rule["ci_low"], rule["ci_high"] - rule["difference"]]
            axis.errorbar(
                rule["used"], rule["difference"], bars, marker=marker, color=f"C{place}", lw=1, ms=5, label=name
            )
        axis.axhline(0, color="0.6", lw=0.8)
        axis.set_title(f"{model}, {sampler}", fontsize=9)
        axis.tick_params(labelbottom=True)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    figure.supxlabel("rollouts used, % of 64", fontsize=10)
    figure.supylabel("accuracy minus that of all 64, points", fontsize=10)
    axes.flat[-1].legend(*axes.flat[0].get_legend_handles_labels(), loc="center", fontsize=9, frameon=False)
    path = FOLDER / "figure.svg"
    figure.savefig(path, metadata={"Date": None})
    print(path)


if __name__ == "__main__":
    main()
