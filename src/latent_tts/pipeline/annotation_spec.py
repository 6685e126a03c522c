"""What is to be labelled, checked without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latent_tts.engine.cost import Shape
from latent_tts.errors import SEED, check_fields, require
from latent_tts.pipeline.code import DRAWING, code_digests
from latent_tts.pipeline.keys import own_fields
from latent_tts.pipeline.spec import DrawingRequest, check_sampler, require_steps, settle_schedule
from latent_tts.results.annotations import FORMAT
from latent_tts.types import Question

MAX_LABELLED = 1 << 16  # rollout number and completion number share a 32-bit counter word


@dataclass(frozen=True)
class QuestionToLabel:
    """A question whose rollouts are to be labelled.

    Attributes:
        question: with its gold answer.
        place: among the questions of the task.
        prompt: token ids.
    """

    question: Question
    place: int
    prompt: list[int]


@dataclass(frozen=True, kw_only=True)
class AnnotationSpec(DrawingRequest):
    """What is to be labelled; answers of completions are chosen as those of rollouts.

    Attributes:
        completions: M, completions of each prefix.
        keep: `mixed` or `all`: which questions get labels.
        output: the annotation folder.
    """

    completions: int
    keep: str
    output: Path

    def check(self) -> None:
        """Check everything that does not need torch or the questions.

        Raises:
            UsageError: a value is not usable.
        """
        adapter, sampler = self.adapter, self.sampler
        require("n", self.n, 2 <= self.n < MAX_LABELLED, f"must be 2 or more, less than {MAX_LABELLED}")
        self.executor.check(self.engine.device)
        require(
            "completions",
            self.completions,
            1 <= self.completions < MAX_LABELLED,
            f"must be 1 or more, less than {MAX_LABELLED}",
        )
        check_fields("", self, keep=("mixed", "all"), seed=SEED)
        require(
            "sampler",
            sampler.name,
            bool(sampler.random_latents),
            "must be one whose latents differ: gaussian, or dropout in prompt or thoughts",
        )
        adapter.check()
        require("model.latents", 0, adapter.latents != 0, "must be 1 or more: labels are of latents")
        check_sampler(sampler, adapter)
        schedule = settle_schedule(self.schedule, adapter, chosen="schedule" in self.chosen)
        require_steps(schedule, adapter, "a label is of a prefix h_1..h_t, completed from there")

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that determines an annotation besides its question, and how the loaded model is computed."""
        adapter, engine = self.adapter, self.engine
        return {
            "format": FORMAT,
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
