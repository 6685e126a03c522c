"""`ltts probe`: how latents depend on each other, and whether computing them in parallel pays."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from omegaconf import DictConfig

from latent_tts.checkpoint.adapter import CheckpointAdapter
from latent_tts.checkpoint.draft import find_draft
from latent_tts.config.build import build
from latent_tts.config.requests import engine_settings
from latent_tts.errors import check_fields, require
from latent_tts.pipeline.probe_spec import chunks_to_try, schedules_to_try
from latent_tts.pipeline.spec import encode_prompts, reserved_positions
from latent_tts.results import report, statistics
from latent_tts.results.files import locked_folder, write_csv, write_text
from latent_tts.results.plot import draw_dependencies
from latent_tts.schedule.auto import PLAN, Plan
from latent_tts.schedule.speculative import Speculative
from latent_tts.task import Task

if TYPE_CHECKING:
    from latent_tts.pipeline.probing import Probe

QUESTIONS, DEPENDENCIES, FIGURE = "questions.csv", "dependencies.csv", "dependencies.png"


def main(cfg: DictConfig) -> None:
    """Probe greedy rollouts, print tables, write `questions.csv`, `dependencies.csv` and a picture.

    Raises:
        UsageError: a value is not usable.
        RunError: a failure while computing.
    """
    engine = engine_settings(cfg.engine)
    task: Task = build("task", cfg.task)
    adapter: CheckpointAdapter = build("model", cfg.model)
    check_fields("", cfg, directions="a positive integer", threshold="a positive number")
    require("tolerances", "[]", len(cfg.tolerances) > 0, "must be a list of numbers in [0, 1)")
    require(
        "model",
        adapter.name,
        adapter.own_schedule is None,
        "must be a model without sweeps of its own, such as PCCoT has",
    )
    adapter.check()
    require("model", adapter.name, adapter.latents > 0, "has no latents to probe")
    schedules = schedules_to_try(cfg.guesses, cfg.tolerances, cfg.draft, cfg.mixing, adapter)
    chunks = chunks_to_try(cfg.chunks, schedules[0], adapter)
    draft = None if cfg.draft is None else find_draft(cfg.draft, adapter.digest, adapter.latents)
    prompts = encode_prompts(adapter, task.questions(), reserved_positions(adapter, cfg.max_answer_tokens))
    output = Path(cfg.output).expanduser()
    with locked_folder(output, "output"):
        from latent_tts.pipeline.probing import probe

        found = probe(
            adapter, engine, prompts,
            schedules=schedules, chunks=chunks, draft=draft, threshold=cfg.threshold, directions=cfg.directions,
            max_answer_tokens=cfg.max_answer_tokens,
        )  # fmt: skip
        write_csv(output / QUESTIONS, found.questions, index=False, float_format="%.6g")
        latents = [str(place + 1) for place in range(len(found.relative_TT))]
        write_csv(output / DEPENDENCIES, pd.DataFrame(found.relative_TT, latents, latents), float_format="%.4g")
        draw_dependencies(
            found.relative_TT, f"{adapter.name} on {task.name}, {len(prompts)} questions", output / FIGURE
        )
        chosen = found.recommended
        keys = None if chosen is None or found.max_rows == 0 else asdict(chosen)
        plan = Plan(adapter.digest, adapter.latents, engine.dtype, found.device, found.max_rows, keys)
        write_text(output / PLAN, plan.text)
    show_dependencies(found, adapter.name, cfg.threshold)
    show_schedules(found, adapter.name)
    for line in recommendation(found):
        report.print_line(line)
    print(output / QUESTIONS)


def show_dependencies(found: Probe, model: str, threshold: float) -> None:
    """Print how latents depend on each other, and the graph's figures."""
    total = len(found.relative_TT)
    cells = [["" if not np.isfinite(v) or s >= t else f"{v:.2f}" for s, v in enumerate(row)] for t, row in
             enumerate(found.relative_TT)]  # fmt: skip
    report.print_table(
        f"{model}: relative change of each latent (row) per relative change of an earlier one (column)",
        ["latent", *(str(place + 1) for place in range(total))],
        [[str(place + 1), *row] for place, row in enumerate(cells)],
    )
    rows = found.questions
    report.print_line(
        f"{len(rows)} questions, {rows['latents'].mean():.2f} latents; dependencies of at least {threshold:g}: "
        f"critical path {rows['critical_path'].mean():.2f}, parallel potential {rows['potential'].mean():.2f}; "
        f"growth rate {rows['growth'].mean():+.2f} per latent"
    )


def show_schedules(found: Probe, model: str) -> None:
    """Print what each schedule took, and how many answers it left as they are."""
    lines, total = [], len(found.relative_TT)
    for schedule in [*found.schedules, *found.chunked]:
        sweeps_Q, equal_Q = found.column("sweeps", schedule), found.column("equal", schedule)
        low, high = statistics.interval(sweeps_Q.to_numpy(dtype=np.float64), high=max(total - 1.0, 1.0))
        explained = found.explained(schedule)
        lines.append(
            [
                schedule.guess,
                f"{schedule.tolerance:g}",
                str(schedule.chunk or "all"),
                f"{sweeps_Q.mean():.2f} [{low:.2f}, {high:.2f}]",
                f"{found.column('conflicts', schedule).mean():.1f}",
                f"{found.commits_per_sweep(schedule):.2f}",
                f"{100 * equal_Q.mean():.1f}",
                "" if np.isnan(explained) else f"{explained:.2f}",
            ]
        )
    report.print_table(
        f"{model}: schedule=speculative",
        [
            "guess",
            "tolerance",
            "chunk",
            "sweeps",
            "conflicts",
            "commits/sweep",
            "answers as sequential %",
            "R² of growth",
        ],
        lines,
    )


def recommendation(found: Probe) -> list[str]:
    """The schedule that the figures recommend, and why."""
    chosen = found.recommended
    if chosen is None:
        return [
            "recommended: schedule=sequential: no guess and tolerance commits more than 1.5 latents per sweep and "
            "leaves 99 % of the answers as they are"
        ]
    if found.max_rows == 0:
        return [
            f"recommended: schedule=sequential: {as_overrides(chosen)} takes {found.ratios[1]:.2f} times as long for "
            f"one rollout on this {found.device}"
        ]
    times = ", ".join(f"{rows}: {ratio:.2f}" for rows, ratio in found.ratios.items())
    return [
        f"recommended, for up to {found.max_rows} rows: schedule=speculative {as_overrides(chosen)}",
        f"time of it over schedule=sequential on this {found.device}, by rows: {times}",
    ]


def as_overrides(schedule: Speculative) -> str:
    """Its keys as the command line takes them."""
    keys = {
        "tolerance": f"{schedule.tolerance:g}", "guess": schedule.guess, "chunk": schedule.chunk,
        "draft": schedule.draft, "mixing": schedule.mixing or None,
    }  # fmt: skip
    return " ".join(f"schedule.{key}={value}" for key, value in keys.items() if value is not None)
