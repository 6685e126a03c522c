"""Step-wise labels: checked, then made for the questions that an annotation folder lacks."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

from latent_tts.errors import LESS_MEMORY, RunError, computing
from latent_tts.pipeline.annotation_spec import AnnotationSpec, QuestionToLabel
from latent_tts.pipeline.dispatch import ShardQueue, results_of
from latent_tts.pipeline.spec import (
    encode_prompts,
    reserved_positions,
)
from latent_tts.results import report
from latent_tts.results.annotations import SETTINGS, AnnotationFolder
from latent_tts.results.files import launch_rank, locked_folder, read_record, written_in_parts
from latent_tts.results.timeline import Span, write_timeline
from latent_tts.task import questions_of, require_gold
from latent_tts.types import Question

log = logging.getLogger(__name__)
SECONDS_BETWEEN_LOOKS = 0.5


def annotate(spec: AnnotationSpec) -> Path:
    """Label the questions that the output folder lacks; returns the folder.

    Raises:
        UsageError: a value or a question is not usable, another process writes to the folder, or it holds annotations
            made with other settings or of other gold answers.
        RunError: a failure while drawing; the finished questions are kept.
    """
    spec.check()
    questions = questions_of(spec.task)
    require_gold(spec.task, questions, "a label says how often completions are right")
    prompts = encode_prompts(spec.adapter, questions, reserved_positions(spec.adapter, spec.max_answer_tokens))
    golds = {question.id: question.gold for question in questions}
    with locked_folder(spec.output, "output"):
        if launch_rank() > 0:
            _wait_for_first_process(spec, set(golds))
            return spec.output
        folder = AnnotationFolder(spec.output, spec.settings, golds, key="output")
        done = folder.present()
        left = [(place, question) for place, question in enumerate(questions) if question.id not in done]
        if len(left) < len(questions):
            log.info("%d of %d questions are in %s", len(questions) - len(left), len(questions), folder.path)
        if left:
            _label(spec, folder, left, prompts)
        counts = folder.finish()
        log.info(
            "%d questions labelled; dropped without a mixed outcome: %d all right, %d all wrong",
            counts["kept"], counts["all_correct"], counts["all_wrong"],
        )  # fmt: skip
    return spec.output


def _wait_for_first_process(spec: AnnotationSpec, wanted: set[str]) -> None:
    """Wait until the folder has every question: in a launch of several processes, the first one annotates.

    Raises:
        RunError: the process that started this one is gone.
    """
    log.info("process %d: waiting for process 0 to annotate %s", launch_rank(), spec.output)
    launcher = os.getppid()
    while True:
        if (read_record(spec.output / SETTINGS) or {}).get("complete"):
            folder = AnnotationFolder(spec.output, key="output")
            if folder.made_with(spec.settings) and wanted <= folder.present():
                return
        if os.getppid() != launcher:
            raise RunError(f"process 0 ended before {spec.output} was complete; re-run the command to resume")
        time.sleep(SECONDS_BETWEEN_LOOKS)


def _label(
    spec: AnnotationSpec,
    folder: AnnotationFolder,
    questions: Sequence[tuple[int, Question]],
    prompts: Mapping[str, list[int]],
) -> None:
    from latent_tts.pipeline.labeller import labelling_work, units_of

    adapter, executor = spec.adapter, spec.executor
    jobs = [QuestionToLabel(question, place, prompts[question.id]) for place, question in questions]
    pool = executor.open(labelling_work(spec, max(len(job.prompt) for job in jobs)), spec.engine.device)
    workers = pool.describe()
    folder.rows = rows = min(each.rows for each in workers)
    for worker in workers:
        folder.settle_computation(worker.computation.way)
    per_question = workers[0].completions
    log.info(
        "%d questions to annotate: n=%d rollouts each, and at most %d completions of their %d prefixes for each that "
        "is kept: at most %d rollouts",
        len(jobs), spec.n, per_question, spec.n * adapter.latents, len(jobs) * (spec.n + per_question),
    )  # fmt: skip
    timeline: list[Span] = []
    with report.progress_bar(len(jobs), "questions") as bar:
        started, done, drawn = time.perf_counter(), 0, 0
        with computing("annotating", f"finished questions are in {folder.path}", LESS_MEMORY):
            with written_in_parts(folder.add) as write:
                first_rows = None if executor.fixed else max(1, rows // spec.n)
                queue = ShardQueue(units_of(jobs, spec, rows), len(pool.workers), first_rows)
                results = results_of(pool, queue, lambda contents: list(chain(*contents)), timeline)
                for _, (entries, rollouts) in results:
                    write(entries)
                    done, drawn = done + len(entries), drawn + rollouts
                    bar.show(done, f"{drawn / (time.perf_counter() - started):.0f} rollouts/s")
    if not executor.in_process:
        write_timeline(folder.path, timeline, "questions")
