"""`ltts plot RUNS_OR_CSVS...`: draw scaling curves from metrics tables; nothing is recomputed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from omegaconf import DictConfig

from latent_tts.errors import UsageError, bad_value, require
from latent_tts.results import plot
from latent_tts.results.run_folder import (
    METRICS,
    METRICS_OVER_SEEDS,
    check_file,
    last_run,
    name_once,
    read_metrics,
)

RESULTS = "results.csv"
RESULTS_BY = "results_by_*.csv"  # drawn against what stands for the star
DEFAULT_FORMATS = ("png", "svg")


def main(cfg: DictConfig) -> None:
    """Draw one figure of everything named (`output`), or one beside each table; print the paths.

    Raises:
        UsageError: a path is no table and holds none, or a table has nothing to draw.
    """
    require("against", cfg.against, cfg.against in plot.AGAINST, f"must be one of {', '.join(plot.AGAINST)}")
    require(
        "format", cfg.format, cfg.format in (None, *plot.FORMATS), "must be png, svg or pdf, or null for png and svg"
    )
    formats = [cfg.format] if cfg.format else DEFAULT_FORMATS
    runs = [Path(path).expanduser() for path in cfg.runs] or [last_run()]
    tables = list(dict.fromkeys(table for path in runs for table in find_tables(path)))
    for table in tables:
        if table.name == METRICS:
            check_file(table.parent, METRICS)
    if cfg.output is not None:
        frames = [read_metrics(table) for table in tables]
        output = Path(cfg.output).expanduser()
        require(
            "output",
            cfg.output,
            output.suffix.removeprefix(".") in plot.FORMATS,
            "must be a file that ends in .png, .svg or .pdf",
        )
        draw(tables, name_once(pd.concat(frames, ignore_index=True)), [output], cfg.against)
        return
    for table in tables:
        name, against = "figure" if table.name == RESULTS else "scaling", cfg.against
        if table.match(RESULTS_BY):
            against = table.stem.removeprefix("results_by_")
            require(
                "runs", table, against in plot.AGAINST, f"must be results_by_X.csv with X of {', '.join(plot.AGAINST)}"
            )
            name = "figure"
        name += "" if against == "n" else f"_by_{against}"
        draw([table], read_metrics(table), [table.with_name(f"{name}.{kind}") for kind in formats], against)


def draw(tables: Sequence[Path], metrics: pd.DataFrame, paths: Sequence[Path], against: str) -> None:
    """Draw the figure of some tables, which are `metrics` together, into files, and print their paths.

    Raises:
        UsageError: they have nothing to draw.
    """
    try:
        for path in plot.save_figure(plot.scaling_figure(metrics, against), paths):
            print(path)
    except UsageError as error:
        raise bad_value("runs", ",".join(map(str, tables)), str(error)) from error


def find_tables(path: Path) -> list[Path]:
    """The metrics tables of a path: the file itself, a folder's own, or those below it.

    Raises:
        UsageError: there is no such path, or it has no table.
    """
    if path.is_file():
        return [path]
    require("runs", path, path.is_dir(), "no such file or folder")
    names = (RESULTS, RESULTS_BY, METRICS_OVER_SEEDS, METRICS)
    own = [table for name in names for table in sorted(path.glob(name))]
    found = own or sorted(table for name in names for table in path.rglob(name))
    # a sweep over seeds has both tables: that of the means has intervals over all seeds
    found = [table for table in found if table.name != METRICS or table.with_name(METRICS_OVER_SEEDS) not in found]
    require("runs", path, bool(found), f"no {METRICS} or {RESULTS} at or below it")
    return found
