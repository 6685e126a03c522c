"""`ltts trace QUESTION`: a window into rollouts, in the terminal and as a page."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from latent_tts.config.build import given_values, is_given, output_dir
from latent_tts.config.meant import is_path
from latent_tts.config.recorded import recorded_run
from latent_tts.config.requests import beside_option, changed_settings, run_request, with_texts
from latent_tts.errors import UsageError, require
from latent_tts.pipeline import rescoring
from latent_tts.pipeline.rollouts import draw_rollouts
from latent_tts.pipeline.running import complete_run
from latent_tts.pipeline.spec import check_run
from latent_tts.pipeline.trace_spec import View, check_trace, select_questions, warn_of_differences, with_fixed_budget
from latent_tts.results import report
from latent_tts.results.cache import cache_root
from latent_tts.results.files import locked_folder, write_text
from latent_tts.results.run_folder import is_complete
from latent_tts.results.trace_page import render_page
from latent_tts.results.trace_report import print_trace
from latent_tts.task.asked import Asked

PAGE = "trace.html"
# the only keys that can be given with `run`: the others are the run's
OWN_KEYS = (
    "run", "question", "n", "beside", "maps", "top", "threshold", "directions", "paths.cache", "engine.device",
    "engine.rows",
)  # fmt: skip


def main(cfg: DictConfig) -> None:
    """Trace some questions; print what a terminal can show, and the path of the page.

    Raises:
        UsageError: something in the config is wrong, or a question is not in the run; nothing has been loaded.
        RunError: a failure while drawing or computing; what was drawn stays in the cache.
    """
    started = time.perf_counter()
    view = View(list(cfg.maps), cfg.top, cfg.threshold, cfg.directions)
    source = None if cfg.run is None else Path(cfg.run).expanduser()
    record = {} if source is None else rescoring.read_run(source)
    merged = cfg if source is None else merged_config(cfg, record)
    request, folder, lines = run_request(merged), output_dir(), []
    if source is None:
        for text in map(str, cfg.question):
            require(
                "question",
                text,
                not (is_path(text) and is_complete(Path(text).expanduser())),
                f"is a run's folder; ltts trace run={text} shows its first question, ltts trace ID run={text} one",
            )
        request = with_texts(request, list(cfg.question))
        if isinstance(request.task, Asked) and not request.task.texts:
            raise UsageError('no question; ltts trace "QUESTION", ltts trace ID run=FOLDER, or ltts trace --example')
    beside = beside_option(merged, cfg.beside, request.sampler)
    with cache_root(request.cache, merged.cache) as cache, locked_folder(folder, "hydra.run.dir"):
        run = check_run(replace(request, cache=cache, keep_steps=True))
        if source is not None:
            run = select_questions(run, source, record, list(cfg.question), cfg.n if is_given("n") else None)
        spec = check_trace(run, view, beside, n=request.n if source is None else max(run.table_counts), source=source)
        if source is None:
            done = complete_run(
                folder, run, changed_settings(cfg),
                started=started, keep_latents=cfg.keep_latents, keep_cache=cfg.cache != "off",
            )  # fmt: skip
            budget = done.tables.budget
            if budget is not None:
                spec = replace(spec, run=with_fixed_budget(spec.run, budget["used"].tolist()))
            as_drawn = run.decode == "all" and budget is None
            rollouts = done.rollouts if as_drawn else draw_rollouts(spec.run)
            lines = done.notes(run)
        else:
            done, rollouts = None, draw_rollouts(spec.run)
            warn_of_differences(spec.run, rollouts, source)
        from latent_tts.pipeline.tracing import trace

        shown = trace(spec, rollouts)
    write_text(folder / PAGE, render_page(shown))
    print_trace(shown)
    for line in lines:
        report.print_line(line)
    print(folder / PAGE)
    if done is not None and done.verification is not None:
        done.verification.check()


def merged_config(cfg: DictConfig, record: dict[str, Any]) -> DictConfig:
    """The run's config, with this command's device, rows and cache in it.

    Raises:
        UsageError: a key was given that is the run's.
    """
    for key, value in given_values().items():
        require(
            key,
            value,
            key in OWN_KEYS or key.startswith("hydra"),
            f"run={cfg.run} has its own; with run, only these keys can be given: {', '.join(OWN_KEYS)}",
        )
    merged = recorded_run(record, cfg)
    if is_given("paths.cache"):
        merged.paths.cache = cfg.paths.cache
    return merged
