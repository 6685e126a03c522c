"""Validation by the engine: what `ltts run` would report of the weights so far."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from latent_tts.errors import UsageError, bad_value, check_fields
from latent_tts.text.answer import AnswerRule
from latent_tts.types import Computation, Question, Reasoner

if TYPE_CHECKING:
    from latent_tts.checkpoint.adapter import CheckpointAdapter
    from latent_tts.engine.rollout import Engine
    from latent_tts.sampler import Sampler
    from latent_tts.training.reasoner.curriculum import Stage

GREEDY, COVERAGE = "eval_greedy_accuracy", "eval_coverage_at_{}"
QUESTIONS_AT_ONCE = 64  # questions that run together
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Validation:
    """The keys `validation.*`.

    Attributes:
        every: updates between two validations; None for none.
        rollouts: n of the coverage.
        sigma: of the Gaussian noise on the latents of these rollouts.
        temperature: of the answer tokens of these rollouts, in stages without latents.
        max_answer_tokens: token limit of an answer.
        share: of the time of updates that validations may take in a run by the clock; what would exceed it is left
            out, except at the end.
        dtype: that the weights are cast to.
    """

    every: int | None
    rollouts: int
    sigma: float
    temperature: float
    max_answer_tokens: int
    share: float
    dtype: str

    def __post_init__(self) -> None:
        check_fields(
            "validation", self, every="a positive integer, or null", rollouts="a positive integer",
            sigma="a finite number, 0 or more", temperature="a finite number, 0 or more",
            max_answer_tokens="a positive integer", share="a positive number", dtype=("float32", "bfloat16", "float16"),
        )  # fmt: skip

    def prove(self, module: Any, adapter: CheckpointAdapter, questions: Sequence[Question]) -> Computation:
        """How the engine has to compute a model, which depends on its architecture and on the longest sequence.

        Args:
            module: the model in training.
            adapter: how prompts are written.
            questions: to answer.

        Raises:
            UsageError: the engine computes it in no way as it computes itself.
        """
        from latent_tts.engine.proof import prove_reasoner

        after = adapter.latents + len(adapter.thinking_end_ids) + self.max_answer_tokens
        longest = max(len(adapter.encode(question)) for question in questions) + after
        try:
            found = prove_reasoner(module.joined_copy("float32"), longest)
        except UsageError as error:
            raise bad_value("validation.every", self.every, f"must be null: {error}") from error
        if found.reason:
            log.warning("validation takes longer: %s", found.reason)
        return found

    def measure(
        self,
        reasoner: Reasoner,
        adapter: CheckpointAdapter,
        stage: Stage,
        questions: Sequence[Question],
        rule: AnswerRule,
    ) -> dict[str, float]:
        """Greedy accuracy, and coverage of `rollouts` noisy rollouts, of a model that nobody else uses.

        Args:
            reasoner: the model, which is changed.
            adapter: how prompts are written and answers read.
            stage: whose number of latents is thought.
            questions: to answer.
            rule: how answers are read and compared.
        """
        from latent_tts.engine.decoding import AnswerSampling
        from latent_tts.engine.rollout import SEQUENTIAL, Engine, RolloutPlan
        from latent_tts.sampler.gaussian import Gaussian
        from latent_tts.sampler.greedy import Greedy

        plan = RolloutPlan(
            stage.latents, adapter.thinking_end_ids, adapter.eos_id, self.max_answer_tokens, adapter.stop_id,
            schedule=adapter.own_schedule or SEQUENTIAL, other_eos_ids=adapter.eos_ids[1:],
            latent_id=None if adapter.own_schedule is None else adapter.latent_id,
        )  # fmt: skip
        engine = Engine(reasoner, plan)
        by_tokens = AnswerSampling(self.temperature).over(Greedy())
        noisy = Gaussian(self.sigma, relative=False) if stage.latents else by_tokens
        shares = []
        for sampler, rollouts in ((Greedy(), 1), (noisy, self.rollouts)):
            solved = 0
            for start in range(0, len(questions), QUESTIONS_AT_ONCE):
                part = questions[start : start + QUESTIONS_AT_ONCE]
                texts = draw_texts(engine, adapter, part, rollouts, sampler)
                for place, question in enumerate(part):
                    read = [
                        adapter.read_answer(text, rule) for text in texts[place * rollouts : (place + 1) * rollouts]
                    ]
                    solved += any(answer is not None and rule.is_right(answer, question.gold) for answer in read)
            shares.append(solved / len(questions))
        return {GREEDY: shares[0], COVERAGE.format(self.rollouts): shares[1]}


def draw_texts(
    engine: Engine, adapter: CheckpointAdapter, questions: Sequence[Question], rollouts: int, sampler: Sampler
) -> list[str]:
    """The answers of so many rollouts of each question, those of a question side by side (imports torch)."""
    import torch

    from latent_tts.random.draw import Draw

    numbers_QN = torch.arange(rollouts, device=engine.device).repeat(len(questions), 1)
    draw = Draw.of(0, [question.id for question in questions], numbers_QN, engine.width)
    rolled = engine.roll([adapter.encode(question) for question in questions], draw, sampler)
    return [adapter.answer_text(ids) for ids in rolled.answer_ids]
