"""`ltts plot RUNS_OR_CSVS...`: draw scaling curves from metrics tables; nothing is recomputed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from omegaconf import DictConfig

from latent_tts.errors import UsageError, bad_value, require
from latent_tts.results import plot
from latent_tts.results.run_folder import METRICS, name_weights_once, read_metrics, tell_apart

FINDINGS = "results.csv"
FINDINGS_BY = "results_by_*.csv"  # drawn against what stands for the star


def main(cfg: DictConfig) -> None:
    """Draw one figure of everything named (`output`), or one beside each table; print the paths.

    Raises:
        UsageError: a path is no table and holds none, or a table has nothing to draw.
    """
    require("against", cfg.against, cfg.against in plot.AGAINST, f"one of {', '.join(plot.AGAINST)}")
    require("format", cfg.format, cfg.format in ("svg", "png", "pdf"), "svg, png or pdf")
    tables = [table for path in cfg.runs for table in find_tables(Path(path).expanduser())]
    if not tables:
        raise bad_value("runs", list(cfg.runs), f"no {METRICS} or {FINDINGS} there")
    if cfg.output is not None:
        frames = [read_metrics(table) for table in tables]
        if len(frames) > 1:
            frames = [tell_apart(frame, str(table)) for frame, table in zip(frames, tables, strict=True)]
        output = Path(cfg.output).expanduser()
        if output.suffix not in (".svg", ".png", ".pdf"):
            raise bad_value("output", cfg.output, "a file that ends in .svg, .png or .pdf")
        draw(tables, name_weights_once(pd.concat(frames, ignore_index=True)), output, cfg.against)
        return
    for table in tables:
        name, against = "figure" if table.name == FINDINGS else "scaling", cfg.against
        if table.match(FINDINGS_BY):
            against = table.stem.removeprefix("results_by_")
            require("runs", table, against in plot.AGAINST, f"results_by_X.csv, X one of {', '.join(plot.AGAINST)}")
            name = f"figure_by_{against}"
        draw([table], read_metrics(table), table.with_name(f"{name}.{cfg.format}"), against)


def draw(tables: Sequence[Path], metrics: pd.DataFrame, path: Path, against: str) -> None:
    """Draw the figure of some tables, which are `metrics` together, and print its path.

    Raises:
        UsageError: they have nothing to draw.
    """
    try:
        print(plot.scaling_curve(metrics, path, against))
    except UsageError as error:
        raise bad_value("runs", ",".join(map(str, tables)), str(error)) from error


def find_tables(path: Path) -> list[Path]:
    """The metrics tables of a path: the file itself, a folder's own, or those below it.

    Raises:
        UsageError: there is no such path.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise bad_value("runs", path, "no such file or folder")
    names = (FINDINGS, FINDINGS_BY, METRICS)
    own = [table for name in names for table in sorted(path.glob(name))]
    found = own or sorted(table for name in names for table in path.rglob(name))
    if not found:
        raise UsageError(f"runs={path}: no {METRICS} or {FINDINGS} at or below it")
    return found
