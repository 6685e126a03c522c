"""What a worker does with its share of an annotation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from latent_tts.engine.cost import Shape
from latent_tts.engine.device import compute_in_batches, warn_of_halving
from latent_tts.engine.labelling import LabelJob, Labelling, completions_of, label_batch
from latent_tts.engine.packing import row_bytes
from latent_tts.engine.rollout import Engine
from latent_tts.executor import Work
from latent_tts.pipeline.annotation_spec import AnnotationSpec, QuestionToLabel
from latent_tts.pipeline.batch import rows_per_batch
from latent_tts.pipeline.code import DRAWING
from latent_tts.pipeline.dispatch import Unit
from latent_tts.pipeline.models import find_device, load_reasoner, refuse_graphs, rollout_plan
from latent_tts.pipeline.spec import reserved_positions
from latent_tts.pipeline.worker_checks import work_of
from latent_tts.types import Computation, LabelledQuestion, UnmixedQuestion


@dataclass(frozen=True)
class LabellerDescription:
    """A worker, as it describes itself.

    Attributes:
        computation: how it computes the model.
        rows: most rows of a batch.
        completions: most completions that a kept question takes.
    """

    computation: Computation
    rows: int
    completions: int


def labelling_work(spec: AnnotationSpec, longest: int) -> Work:
    """The work of an annotation's executor; see `Labeller`."""
    options = (spec.adapter, spec.sampler, spec.schedule, spec.task, spec.task.rule)
    configs = [spec.config.get(name) for name in (*DRAWING, "task")]
    return work_of(spec.executor, partial(Labeller, spec, longest), options, configs, [spec.adapter])


def units_of(jobs: Sequence[QuestionToLabel], spec: AnnotationSpec, rows: int) -> list[Unit[list[QuestionToLabel]]]:
    """Batches, longest prompts first, or single questions, as the executor shares them out."""
    size = max(1, rows // spec.n) if spec.executor.fixed else 1
    by_length = sorted(jobs, key=lambda job: (-len(job.prompt), job.place))
    contents = [by_length[start : start + size] for start in range(0, len(by_length), size)]
    return [Unit(content, sum(len(job.prompt) for job in content), len(content)) for content in contents]


class Labeller:
    """Draws and labels the rollouts of questions."""

    def __init__(self, spec: AnnotationSpec, longest: int) -> None:
        """Load the model.

        Args:
            spec: the annotation.
            longest: tokens of the longest prompt to come.
        """
        refuse_graphs(spec.engine, "ltts annotate forks its rollouts")
        adapter, sampler = spec.adapter, spec.answers.over(spec.sampler)
        self._spec, self._sampler = spec, sampler
        self._device = find_device(spec.engine)
        shape = Shape.from_config(adapter.sizes)
        suffix, own_prompt = reserved_positions(adapter, spec.max_answer_tokens), "prompt" in sampler.random_phases
        # completions are in memory together with the rollouts that they complete
        bytes_per_row = 2 * row_bytes(shape, longest, suffix, spec.engine.bytes_per_number, own_prompt)
        rows = rows_per_batch(spec.engine, shape, bytes_per_row, self._device, own_prompt=own_prompt)
        self._labelling = Labelling(spec.n, spec.completions, spec.keep == "all", spec.seed, rows, adapter.latent_id)
        plan = rollout_plan(adapter, spec.max_answer_tokens)
        self._engine = Engine(load_reasoner(adapter, spec.engine, self._device, longest=longest + suffix), plan)

    def describe(self) -> LabellerDescription:
        """What the driver has to know of this worker."""
        completions = completions_of(self._sampler, self._engine, self._labelling)
        return LabellerDescription(self._engine.reasoner.computation, self._labelling.rows, completions)

    def compute(self, shard: list[QuestionToLabel]) -> tuple[list[LabelledQuestion | UnmixedQuestion], int]:
        """A record of each question of a shard, and how many rollouts (completions included) that took."""
        adapter, rule = self._spec.adapter, self._spec.task.rule

        def is_right(job: QuestionToLabel, ids: list[int]) -> bool:
            prediction = adapter.read_answer(adapter.answer_text(ids), rule)
            return prediction is not None and rule.is_right(prediction, job.question.gold)

        jobs = [
            LabelJob(job.question.id, job.place, job.prompt, lambda ids, job=job: is_right(job, ids)) for job in shard
        ]
        entries, rollouts = [], 0
        for labelled, count in compute_in_batches(jobs, self._label, self._batches, self._halve, self._device):
            entries += labelled
            rollouts += count
        return entries, rollouts

    def _batches(self, jobs: Sequence[LabelJob]) -> list[list[LabelJob]]:
        size = max(1, self._labelling.rows // self._labelling.rollouts)
        return [list(jobs[start : start + size]) for start in range(0, len(jobs), size)]

    def _label(self, batch: list[LabelJob]) -> tuple[list[LabelledQuestion | UnmixedQuestion], int]:
        return label_batch(batch, self._engine, self._sampler, self._labelling)

    def _halve(self, _: list[LabelJob]) -> bool:
        """Halve the rows of all later batches; those of one question are divided in it."""
        rows = self._labelling.rows
        if rows == 1:
            return False
        self._labelling = replace(self._labelling, rows=rows // 2)
        warn_of_halving(rows, self._device)
        return True
