"""`ltts annotate`: rollouts of training questions with step-wise labels; the same line goes on where it stopped."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from latent_tts.config import build as config
from latent_tts.engine.cost import Shape
from latent_tts.engine.decoding import AnswerSampling
from latent_tts.errors import FEWER_ROWS, bad_value, computing
from latent_tts.model import ModelAdapter
from latent_tts.pipeline.drawing import engine_device, load_once, plan_of, rows_of_a_batch
from latent_tts.pipeline.keys import ENGINE_SEMANTICS
from latent_tts.pipeline.spec import (
    ITEM_BYTES,
    check_engine,
    check_spread,
    encode,
    positions_beside_the_prompt,
    require_steps,
    schedule_of,
)
from latent_tts.results import report
from latent_tts.results.annotations import FORMAT, AnnotationFolder
from latent_tts.sampler import Sampler
from latent_tts.task import Task
from latent_tts.types import Question

log = logging.getLogger(__name__)
KEEP = ("mixed", "all")


def main(cfg: DictConfig) -> None:
    """Annotate, then print the folder.

    Raises:
        UsageError: a value or a question is not usable, or the folder holds annotations made with other settings
            or of other gold answers.
        RunError: a failure while drawing; the finished questions are kept.
    """
    annotate(cfg)
    print(Path(cfg.output).expanduser())


def annotate(cfg: DictConfig) -> Path:
    """Label the questions that the output folder lacks; returns the folder."""
    config.require("n", cfg.n, cfg.n >= 2, "a number of rollouts, 2 or more: labels serve to compare them")
    config.require("completions", cfg.completions, cfg.completions >= 1, "completions of each prefix, 1 or more")
    config.require("keep", cfg.keep, cfg.keep in KEEP, f"one of {', '.join(KEEP)}")
    check_engine(cfg)
    answers = AnswerSampling(cfg.answer.temperature, cfg.answer.top_p)
    sampler: Sampler = config.build("sampler", cfg.sampler)
    if not sampler.random_latents:
        raise bad_value("sampler", sampler.name, "one whose latents differ: gaussian, or dropout in prompt or thoughts")
    task: Task = config.build("task", cfg.task)
    adapter: ModelAdapter = config.build("model", cfg.model)
    adapter.check()
    check_spread(sampler, adapter)
    require_steps(schedule_of(cfg, adapter), adapter, "a label is of a prefix h_1..h_t, completed from there")
    if adapter.latents == 0:
        raise bad_value("model.latents", 0, "labels are of latents: 1 or more")
    from latent_tts.engine.labelling import MOST_COMPLETIONS

    for key in ("n", "completions"):
        config.require(key, cfg[key], cfg[key] < MOST_COMPLETIONS, f"less than {MOST_COMPLETIONS}")
    questions = task.questions()
    prompts = encode(adapter, questions, positions_beside_the_prompt(adapter, cfg.max_answer_tokens))
    golds = {question.id: question.answer for question in questions}
    folder = AnnotationFolder(Path(cfg.output).expanduser(), settings(cfg, adapter, answers), golds, key="output")
    done = folder.present()
    left = [(place, question) for place, question in enumerate(questions) if question.id not in done]
    if len(left) < len(questions):
        log.info("%d of %d questions are in %s", len(questions) - len(left), len(questions), folder.path)
    if left:
        _label(cfg, adapter, task, answers.over(sampler), folder, left, prompts)
    counts = folder.finish()
    log.info(
        "%d questions labelled; without a mixed outcome and dropped: %d all right, %d all wrong",
        counts["kept"], counts["all_correct"], counts["all_wrong"],
    )  # fmt: skip
    return folder.path


def settings(cfg: DictConfig, adapter: ModelAdapter, answers: AnswerSampling) -> dict[str, Any]:
    """Everything that determines an annotation besides its question."""
    return {
        "format": FORMAT,
        "semantics": ENGINE_SEMANTICS[cfg.engine.dtype],
        "reasoner": adapter.digest,
        "reasoner_name": adapter.name,
        "prompt": adapter.prompt_recipe,
        "eos": adapter.eos_id,
        "sampler": OmegaConf.to_container(cfg.sampler, resolve=True),
        "n": cfg.n,
        "completions": cfg.completions,
        "keep": cfg.keep,
        "seed": cfg.seed,
        "max_answer_tokens": cfg.max_answer_tokens,
        **({"answer": answers.settings} if answers.random else {}),
        "latents": adapter.latents,
        "latent_id": adapter.latent_id,
        "width": Shape.from_config(adapter.config).width,
        "dtype": cfg.engine.dtype,
        **({"quantize": cfg.engine.quantize} if cfg.engine.quantize is not None else {}),
        "task": OmegaConf.to_container(OmegaConf.masked_copy(cfg.task, [k for k in cfg.task if k != "limit"])),
    }


def _label(
    cfg: DictConfig,
    adapter: ModelAdapter,
    task: Task,
    sampler: Sampler,
    folder: AnnotationFolder,
    questions: list[tuple[int, Question]],
    prompts: dict[str, list[int]],
) -> None:
    from latent_tts.engine.labelling import LabelJob, Labelling, completions_of, label
    from latent_tts.engine.packing import row_bytes
    from latent_tts.engine.rollout import Engine

    def is_right(question: Question, ids: list[int]) -> bool:
        prediction = task.rule.read(adapter.answer_text(ids), adapter)
        return prediction is not None and task.rule.is_right(prediction, question.answer)

    jobs = [LabelJob(q.id, place, prompts[q.id], lambda ids, q=q: is_right(q, ids)) for place, q in questions]
    device = engine_device(cfg)
    shape, longest = Shape.from_config(adapter.config), max(len(job.prompt) for job in jobs)
    suffix = positions_beside_the_prompt(adapter, cfg.max_answer_tokens)
    own_prompt = "prompt" in sampler.random_phases
    # completions are there beside the rollouts that they complete
    bytes_a_row = 2 * row_bytes(shape, longest, suffix, ITEM_BYTES[cfg.engine.dtype], own_prompt)
    rows = rows_of_a_batch(cfg, shape, bytes_a_row, device, own_prompt)
    folder.rows = rows
    labelling = Labelling(cfg.n, cfg.completions, cfg.keep == "all", cfg.seed, rows, adapter.latent_id)
    engine = Engine(load_once(adapter, device, cfg), plan_of(adapter, cfg.max_answer_tokens))
    a_question = completions_of(sampler, engine, labelling)
    log.info(
        "%d questions to annotate: n=%d rollouts each, and at most %d completions of their %d prefixes for each that "
        "is kept: at most %d rollouts",
        len(jobs), cfg.n, a_question, cfg.n * adapter.latents, len(jobs) * (cfg.n + a_question),
    )  # fmt: skip
    with report.progress_bar(len(jobs), "questions") as bar:
        started, done, drawn = time.perf_counter(), 0, 0

        def progress(questions: int, rollouts: int) -> None:
            nonlocal done, drawn
            done, drawn = done + questions, drawn + rollouts
            report.show(bar, done, f"{drawn / (time.perf_counter() - started):.0f} rollouts/s")

        with computing("annotating", f"finished questions are in {folder.path}", FEWER_ROWS):
            label(folder, jobs, engine, sampler, labelling, progress)
