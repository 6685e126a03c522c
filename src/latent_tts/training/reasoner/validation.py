"""Validation by the engine: what `ltts run` would report of the weights so far, and the best of them kept."""

from __future__ import annotations

import copy
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latent_tts.checkpoint import files
from latent_tts.errors import bad_value, check_fields
from latent_tts.results.files import settings_digest
from latent_tts.text.answer import AnswerRule
from latent_tts.types import Question, Reasoner, file_digest

if TYPE_CHECKING:
    from torch import Tensor

    from latent_tts.checkpoint.adapter import CheckpointAdapter
    from latent_tts.training.reasoner.curriculum import Stage

BEST, RECORD = "best", "best.json"
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
        import torch

        from latent_tts.engine.decoding import AnswerSampling
        from latent_tts.engine.rollout import SEQUENTIAL, Engine, RolloutPlan
        from latent_tts.random.draw import Draw
        from latent_tts.sampler.gaussian import Gaussian
        from latent_tts.sampler.greedy import Greedy

        plan = RolloutPlan(
            stage.latents, adapter.thinking_end_ids, adapter.eos_id, self.max_answer_tokens, adapter.stop_id,
            schedule=adapter.own_schedule or SEQUENTIAL, other_eos_ids=adapter.eos_ids[1:],
            latent_id=None if adapter.own_schedule is None else adapter.latent_id,
        )  # fmt: skip
        engine = Engine(reasoner, plan)
        noisy = AnswerSampling(self.temperature).over(Greedy())
        if stage.latents:
            noisy = Gaussian(self.sigma, relative=False)
        shares = []
        for sampler, rollouts in ((Greedy(), 1), (noisy, self.rollouts)):
            solved = 0
            for start in range(0, len(questions), QUESTIONS_AT_ONCE):
                part = questions[start : start + QUESTIONS_AT_ONCE]
                numbers_QN = torch.arange(rollouts, device=engine.device).repeat(len(part), 1)
                draw = Draw.of(0, [question.id for question in part], numbers_QN, engine.width)
                rolled = engine.roll([adapter.encode(question) for question in part], draw, sampler)
                texts = [adapter.answer_text(ids) for ids in rolled.answer_ids]
                for place, question in enumerate(part):
                    read = [
                        adapter.read_answer(text, rule) for text in texts[place * rollouts : (place + 1) * rollouts]
                    ]
                    solved += any(answer is not None and rule.is_right(answer, question.gold) for answer in read)
            shares.append(solved / len(questions))
        return {"eval_greedy_accuracy": shares[0], f"eval_coverage_at_{self.rollouts}": shares[1]}


def joined_copy(module: Any, dtype: str) -> Reasoner:
    """A copy of a model in training, with its adapter joined in float32 and cast once."""
    import torch
    from torch import nn

    kind = getattr(torch, dtype)
    lm = copy.deepcopy(module.objective.lm if module.adapted is None else module.adapted)
    lm = lm if module.adapted is None else lm.merge_and_unload()
    next_latent = module.objective.next_latent
    if isinstance(next_latent, nn.Module):
        next_latent = copy.deepcopy(next_latent).to(kind).eval()
    return Reasoner(lm.to(kind).eval().requires_grad_(False), next_latent)


def keep_if_best(states: Path, weights: Mapping[str, Tensor], update: int, figures: dict[str, float]) -> bool:
    """Keep weights beside the saved states if no earlier ones were as good; says whether it did.

    The first figure counts, the second among equal ones.
    """
    from safetensors.torch import save_file

    score, folder = list(figures.values()), states / BEST
    best = read_best(states)
    if best is not None and best["score"] >= score:
        return False
    with files.whole_folder(folder) as partial:
        save_file(dict(weights), partial / files.WEIGHTS)
        record = {"update": update, "score": score, "figures": figures, "weights": file_digest(partial / files.WEIGHTS)}
        (partial / RECORD).write_text(json.dumps(record | {"digest": settings_digest(record)}) + "\n")
    return True


def read_best(states: Path) -> dict[str, Any] | None:
    """The record of the best weights so far; None if there are none.

    Raises:
        UsageError: it is damaged.
    """
    path = states / BEST / RECORD
    if not path.is_file():
        return None
    with suppress(OSError, ValueError, AttributeError, RecursionError):
        record = json.loads(path.read_text())
        if record.pop("digest", None) in (None, settings_digest(record)):  # earlier versions wrote none
            return record
    raise bad_value("output", path, "is damaged; train in another folder")


def forget_best_after(states: Path, done: int) -> None:
    """Remove the best weights if they are of an update that is made anew, and differently: as in a run by the clock.

    Args:
        states: folder of the saved states.
        done: updates of the state that the run resumes from.
    """
    best = read_best(states)
    if best is not None and best["update"] > done:
        log.warning("the best weights so far are of update %d, which is made anew; they are removed", best["update"])
        shutil.rmtree(states / BEST)


def best_weights(states: Path) -> Path:
    """The folder of the best weights.

    Raises:
        UsageError: they are missing or damaged.
    """
    record, path = read_best(states), states / BEST / files.WEIGHTS
    digest = file_digest(path) if path.is_file() else None
    if record is None or digest != record.get("weights", digest):
        raise bad_value("output", path, "is missing or damaged; train in another folder")
    return states / BEST
