"""The picture of `ltts probe`: which latent depends on which."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from latent_tts.results.plot import save_figure


def draw_dependencies(relative_TT: np.ndarray, title: str, path: Path) -> None:
    """Draw relative dependencies as a grid, a row per latent; NaN stays white.

    Args:
        relative_TT: row t, column s: how much latent t depends on latent s.
        title: above the grid.
        path: of the figure; its ending is the format.
    """
    from matplotlib.figure import Figure

    total = len(relative_TT)
    side = 0.45 * max(total, 6)
    figure = Figure(figsize=(1.5 + side, 1.2 + side), layout="constrained")
    axes = figure.subplots()
    lower = np.where(np.tri(total, k=-1, dtype=bool), relative_TT, np.nan)
    image = axes.imshow(lower, cmap="viridis", vmin=0)
    for (row, column), value in np.ndenumerate(lower):
        if np.isfinite(value):
            shade = "white" if value < 0.6 * np.nanmax(lower) else "black"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=shade)
    axes.set_xticks(range(total), [str(s + 1) for s in range(total)])
    axes.set_yticks(range(total), [str(t + 1) for t in range(total)])
    axes.set_xlabel("latent that is changed")
    axes.set_ylabel("latent that is made from it")
    axes.set_title(title.replace("$", r"\$"), fontsize=9)
    figure.colorbar(image, label="relative change per relative change", shrink=0.8)
    save_figure(figure, [path])
