"""`ltts ask QUESTION`: the votes of rollouts, the pick of every aggregator, costs."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace

from omegaconf import DictConfig

from latent_tts.config.build import in_sweep, output_dir
from latent_tts.config.requests import changed_settings, run_request, with_texts
from latent_tts.errors import UsageError
from latent_tts.pipeline.asking import ArrivingVotes, describe_answers, print_answer
from latent_tts.pipeline.running import complete_run
from latent_tts.pipeline.spec import check_run
from latent_tts.results import report
from latent_tts.results.cache import cache_root
from latent_tts.results.run_folder import ANSWERS
from latent_tts.task import Task
from latent_tts.task.asked import Asked


def main(cfg: DictConfig) -> None:
    """Answer one question or several; print a table per question and the path of `answers.jsonl`, or JSON.

    Raises:
        UsageError: something in the config is wrong, or there is no question; nothing has been loaded.
        RunError: a failure while drawing; what was drawn stays in the cache.
    """
    started = time.perf_counter()
    request = run_request(cfg)
    request = with_texts(request, asked_texts(cfg, request.task))
    with cache_root(request.cache, cfg.cache) as cache:
        spec = check_run(replace(request, cache=cache))
        if not cfg.json and report.stderr_console().is_terminal:
            spec = replace(spec, on_answers=ArrivingVotes(spec).add)
        done = complete_run(
            output_dir(), spec, changed_settings(cfg),
            started=started, keep_latents=cfg.keep_latents, keep_cache=cfg.cache != "off",
        )  # fmt: skip
    for line in describe_answers(spec, done):
        if cfg.json:
            print(json.dumps(line))
        else:
            print_answer(line)
    if not cfg.json:
        for line in done.notes(spec):
            report.print_line(line)
        print(output_dir() / ANSWERS)
    if done.verification is not None:
        done.verification.check()


def asked_texts(cfg: DictConfig, task: Task) -> list[str]:
    """The question, or the lines of standard input; none where the task has its own.

    Raises:
        UsageError: there is no question.
    """
    if cfg.question is not None:
        return [cfg.question]
    if not isinstance(task, Asked) or task.texts:
        return []
    if in_sweep() or sys.stdin is None or sys.stdin.isatty():
        where = "" if in_sweep() else ", a question per line on standard input"
        raise UsageError(f'no question; ltts ask "QUESTION"{where}, or ltts ask --example')
    try:
        lines = [line.strip() for line in sys.stdin if line.strip()]
    except UnicodeDecodeError as error:
        raise UsageError(f"standard input cannot be read as {sys.stdin.encoding} ({error.reason})") from error
    if not lines:
        raise UsageError("no question: standard input is empty; it takes a question per line")
    return lines
