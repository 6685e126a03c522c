"""`ltts compare A B`: paired differences A - B of two runs on the same questions, with 95 % intervals."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from latent_tts.config.recorded import aggregator_builder
from latent_tts.errors import require
from latent_tts.results import report
from latent_tts.results.comparison import describe_sides, differences, read_side
from latent_tts.results.files import write_csv


def main(cfg: DictConfig) -> None:
    """Print a table of differences; several runs on a side are its seeds.

    Raises:
        UsageError: the two sides do not have the same questions and seeds, or share no budget, or lack a figure.
    """
    require("questions", cfg.questions, cfg.questions in ("same", "shared"), "must be same or shared")
    a, b = (read_side(key, Path(cfg[key]).expanduser(), aggregator_builder(cfg)) for key in ("a", "b"))
    found = differences(a, b, (cfg.a_figure, cfg.b_figure), (cfg.a_n, cfg.b_n), shared=cfg.questions == "shared")
    rows = []
    for _, one in found.iterrows():
        figure = one.a_figure if one.a_figure == one.b_figure else f"{one.a_figure} - {one.b_figure}"
        n = one.a_n if one.a_n == one.b_n else f"{one.a_n} - {one.b_n}"
        difference = report.percent({**one, "value": one.difference})
        rows.append([figure, n, f"{100 * one.a:.1f}", f"{100 * one.b:.1f}", difference])
    last = found.iloc[-1]
    report.print_table(
        "A - B in percentage points: "
        f"{report.counted(last.questions, 'question')}, {report.counted(last.seeds, 'seed')}",
        ["figure", "n", "A %", "B %", "A - B"],
        rows,
    )
    for key, words in zip(("a", "b"), describe_sides(a, b), strict=True):
        print(f"{key.upper()}: {words}{cfg[key]}")
    if cfg.output is not None:
        output = Path(cfg.output).expanduser()
        output.parent.mkdir(parents=True, exist_ok=True)
        write_csv(output, found, index=False, float_format="%.6g")
        print(output)
