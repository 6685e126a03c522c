"""Step-wise labels: checked, then made for the questions that an annotation folder lacks."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latent_tts.engine.cost import Shape
from latent_tts.engine.decoding import AnswerSampling
from latent_tts.errors import LESS_MEMORY, RunError, bad_value, check_seed, computing, require
from latent_tts.model import ModelAdapter
from latent_tts.pipeline.code import DRAWING, code_digests
from latent_tts.pipeline.keys import ENGINE_SEMANTICS, own_fields
from latent_tts.pipeline.spec import (
    EngineSettings,
    check_sampler,
    encode_prompts,
    require_steps,
    reserved_positions,
    settle_schedule,
)
from latent_tts.results import report
from latent_tts.results.annotations import FORMAT, SETTINGS, AnnotationFolder
from latent_tts.results.files import launch_rank, locked_folder, written_in_parts
from latent_tts.sampler import Sampler
from latent_tts.schedule import Schedule
from latent_tts.task import Task, require_gold
from latent_tts.types import Question

log = logging.getLogger(__name__)
KEEP = ("mixed", "all")
SECONDS_BETWEEN_LOOKS = 0.5
MAX_LABELLED = 1 << 16  # rollout number and completion number share a 32-bit counter word


@dataclass(frozen=True, kw_only=True)
class AnnotationSpec:
    """What is to be labelled.

    Attributes:
        adapter, task, sampler, schedule: the chosen options.
        answers: how answer tokens are chosen, of rollouts and completions alike.
        n: rollouts of each question.
        completions: M, completions of each prefix.
        keep: `mixed` or `all`: which questions get labels.
        seed: of every random number.
        max_answer_tokens: token limit of an answer.
        engine: how rollouts are computed.
        output: the annotation folder.
        config: the resolved config, for `sampler` and `task`.
        schedule_chosen: whether somebody chose the schedule.
    """

    adapter: ModelAdapter
    task: Task
    sampler: Sampler
    schedule: Schedule
    answers: AnswerSampling
    n: int
    completions: int
    keep: str
    seed: int
    max_answer_tokens: int
    engine: EngineSettings
    output: Path
    config: Mapping[str, Any]
    schedule_chosen: bool = False

    def check(self) -> None:
        """Check everything that does not need torch or the questions.

        Raises:
            UsageError: a value is not usable.
        """
        adapter, sampler = self.adapter, self.sampler
        require("n", self.n, 2 <= self.n < MAX_LABELLED, f"must be 2 or more, less than {MAX_LABELLED}")
        check_seed(self.seed)
        allowed = f"must be 1 or more, less than {MAX_LABELLED}"
        require("completions", self.completions, 1 <= self.completions < MAX_LABELLED, allowed)
        require("keep", self.keep, self.keep in KEEP, f"must be one of {', '.join(KEEP)}")
        if not sampler.random_latents:
            allowed = "must be one whose latents differ: gaussian, or dropout in prompt or thoughts"
            raise bad_value("sampler", sampler.name, allowed)
        adapter.check()
        if adapter.latents == 0:
            raise bad_value("model.latents", 0, "must be 1 or more: labels are of latents")
        check_sampler(sampler, adapter)
        schedule = settle_schedule(self.schedule, adapter, chosen=self.schedule_chosen)
        require_steps(schedule, adapter, "a label is of a prefix h_1..h_t, completed from there")

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that determines an annotation besides its question, and how the loaded model is computed."""
        adapter, engine = self.adapter, self.engine
        return {
            "format": FORMAT,
            "semantics": ENGINE_SEMANTICS[engine.dtype],
            "reasoner": adapter.digest,
            "reasoner_name": adapter.name,
            "prompt": adapter.prompt_recipe,
            "fields": own_fields("model", adapter),
            "code": code_digests((adapter, self.sampler), [self.config.get(name) for name in DRAWING], DRAWING),
            "eos": list(adapter.eos_ids),
            "sampler": self.config["sampler"],
            "n": self.n,
            "completions": self.completions,
            "keep": self.keep,
            "seed": self.seed,
            "max_answer_tokens": self.max_answer_tokens,
            **({"answer": self.answers.settings} if self.answers.random else {}),
            "latents": adapter.latents,
            "latent_id": adapter.latent_id,
            "width": Shape.from_config(adapter.sizes).width,
            "dtype": engine.dtype,
            **({"quantize": engine.quantize} if engine.quantize is not None else {}),
            "task": {key: value for key, value in self.config["task"].items() if key != "limit"},
        }


def annotate(spec: AnnotationSpec) -> Path:
    """Label the questions that the output folder lacks; returns the folder.

    Raises:
        UsageError: a value or a question is not usable, another process writes to the folder, or it holds annotations
            made with other settings or of other gold answers.
        RunError: a failure while drawing; the finished questions are kept.
    """
    spec.check()
    questions = spec.task.questions()
    require_gold(spec.task, questions, "a label says how often completions are right")
    prompts = encode_prompts(spec.adapter, questions, reserved_positions(spec.adapter, spec.max_answer_tokens))
    with locked_folder(spec.output, "output"):
        return _annotate(spec, questions, prompts)


def _annotate(spec: AnnotationSpec, questions: Sequence[Question], prompts: Mapping[str, list[int]]) -> Path:
    golds = {question.id: question.gold for question in questions}
    if launch_rank() > 0:
        _wait_for_first_process(spec, {question.id for question in questions})
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
    return folder.path


def _wait_for_first_process(spec: AnnotationSpec, wanted: set[str]) -> None:
    """Wait until the folder has every question: in a launch of several processes, the first one annotates.

    Raises:
        RunError: the process that started this one is gone.
    """
    log.info("process %d: waiting for process 0 to annotate %s", launch_rank(), spec.output)
    settings, launcher = json.loads(json.dumps(spec.settings)), os.getppid()
    while True:
        if (spec.output / SETTINGS).is_file():
            folder = AnnotationFolder(spec.output, key="output") if any(spec.output.glob("*.parquet")) else None
            if folder is not None and folder.complete and folder.made_with(settings) and wanted <= folder.present():
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
    from latent_tts.engine.labelling import LabelJob, Labelling, completions_of, label
    from latent_tts.engine.packing import row_bytes
    from latent_tts.engine.rollout import Engine
    from latent_tts.pipeline.models import find_device, load_reasoner, refuse_graphs, rollout_plan, rows_per_batch

    adapter, rule = spec.adapter, spec.task.rule

    def is_right(question: Question, ids: list[int]) -> bool:
        prediction = rule.read(adapter.answer_text(ids), adapter)
        return prediction is not None and rule.is_right(prediction, question.gold)

    jobs = [LabelJob(q.id, place, prompts[q.id], lambda ids, q=q: is_right(q, ids)) for place, q in questions]
    refuse_graphs(spec.engine, "ltts annotate forks its rollouts")
    device, sampler = find_device(spec.engine), spec.answers.over(spec.sampler)
    shape, longest = Shape.from_config(adapter.sizes), max(len(job.prompt) for job in jobs)
    suffix, own_prompt = reserved_positions(adapter, spec.max_answer_tokens), "prompt" in sampler.random_phases
    # completions are there beside the rollouts that they complete
    bytes_per_row = 2 * row_bytes(shape, longest, suffix, spec.engine.bytes_per_number, own_prompt)
    rows = rows_per_batch(spec.engine, shape, bytes_per_row, device, own_prompt=own_prompt)
    folder.rows = rows
    labelling = Labelling(spec.n, spec.completions, spec.keep == "all", spec.seed, rows, adapter.latent_id)
    plan = rollout_plan(adapter, spec.max_answer_tokens)
    engine = Engine(load_reasoner(adapter, spec.engine, device, longest=longest + suffix), plan)
    folder.settle_computation(engine.reasoner.computation.way)
    per_question = completions_of(sampler, engine, labelling)
    log.info(
        "%d questions to annotate: n=%d rollouts each, and at most %d completions of their %d prefixes for each that "
        "is kept: at most %d rollouts",
        len(jobs), spec.n, per_question, spec.n * adapter.latents, len(jobs) * (spec.n + per_question),
    )  # fmt: skip
    with report.progress_bar(len(jobs), "questions") as bar:
        started, done, drawn = time.perf_counter(), 0, 0
        with computing("annotating", f"finished questions are in {folder.path}", LESS_MEMORY):
            with written_in_parts(folder.add) as write:
                for entries, rollouts in label(jobs, engine, sampler, labelling):
                    write(entries)
                    done, drawn = done + len(entries), drawn + rollouts
                    bar.show(done, f"{drawn / (time.perf_counter() - started):.0f} rollouts/s")
