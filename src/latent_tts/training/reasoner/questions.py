"""The questions that a reasoner is trained on, and those that it is validated on; none is a test question.

`arith` is a stream without end. Other tasks are finite sets, of which every question with written steps comes once per
epoch, in an order that is keyed by (seed, epoch).
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from itertools import count

from latent_tts.checkpoint.adapter import CheckpointAdapter
from latent_tts.errors import UsageError, require
from latent_tts.random.philox import Stream, key_of, philox
from latent_tts.task import Task, require_gold
from latent_tts.task.arith import Arith, is_problem, split_of
from latent_tts.task.benchmark import Benchmark
from latent_tts.text.answer import AnswerRule
from latent_tts.training.reasoner.curriculum import Stage, written_text
from latent_tts.types import Question, text_digest

log = logging.getLogger(__name__)
DIGITS = 12  # hex digits of a digest in `known_questions.txt`
QUOTES = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "`": "'"})
HELD_OUT_SHARE = 0.1  # of a set without a split `valid`, at most
MAX_SHOWN = 60


@dataclass(frozen=True)
class TrainingQuestions:
    """What a reasoner is trained and validated on.

    Attributes:
        stream: the training questions from the first one on, without end, the same at every call.
        valid: the validation questions.
        rule: how answers are read and compared.
        finite: the questions of a finite set; none for a stream.
    """

    stream: Callable[[], Iterator[Question]]
    valid: list[Question]
    rule: AnswerRule
    finite: Sequence[Question] = ()

    @property
    def texts(self) -> list[str]:
        """Every text that training or validation may read, to find the vocabulary in use."""
        questions = [*self.finite, *self.valid]
        return [text for q in questions for text in (q.text, *(f"{step}\n" for step in q.steps), f"### {q.answer}")]

    @property
    def digest(self) -> str:
        """What identifies the finite set and the validation questions, whatever their file and their order in it."""
        parts = [sorted((q.id, q.answer, q.steps) for q in part) for part in (self.finite, self.valid)]
        return text_digest(json.dumps(parts))


def training_questions(task: Task, *, valid_questions: int, seed: int, step_results: bool) -> TrainingQuestions:
    """The training questions of a task.

    Args:
        task: `arith`, a published set with a split `train`, or a file with `steps`.
        valid_questions: most questions to validate on: of the split `valid`, else held out.
        seed: of the order of a finite set.
        step_results: whether steps have to name results, as in `<<48/2=24>>`.

    Raises:
        UsageError: a test question is among them, no question has steps, or a step is empty or names no result.
    """
    if isinstance(task, Arith):
        require("task.split", task.split, task.split == "train", "must be train: the other splits are to report on")
        require("task.limit", task.limit, task.limit is None, "must be null: every update takes new questions")
        valid = replace(task, split="valid", limit=valid_questions).questions()
        return TrainingQuestions(task.stream, valid, task.rule)
    if isinstance(task, Benchmark):
        require(
            "task.split", task.split, task.split == "train",
            f"must be train (task={task.name} has {', '.join(task.splits)}): the other splits are to report on",
        )  # fmt: skip
    questions = task.questions()
    require_gold(task, questions, "training needs them")
    questions = select_usable(questions, task, step_results=step_results)
    valid = _split_valid(task, valid_questions)
    if valid is None:
        questions, valid = hold_out(questions, valid_questions)
        log.info("task=%s: %d questions are held out to validate on", task.name, len(valid))
    return TrainingQuestions(lambda: epochs(questions, seed), valid, task.rule, questions)


def select_usable(questions: Sequence[Question], task: Task, *, step_results: bool) -> list[Question]:
    """The questions with written steps that may be trained on; others are counted and named in the log.

    Raises:
        UsageError: a test question is among them, no question has steps, or a step is empty or names no result.
    """
    known = {question: find_known_set(question.text) for question in questions}
    tests = [(question, place[0]) for question, place in known.items() if place and place[1] == "test"]
    if tests:
        raise UsageError(
            f"task={task.name}: {len(tests)} of its {len(questions)} questions are test questions, which are never "
            f"trained on; the first is of task={tests[0][1]}: {tests[0][0].quoted}"
        )
    for left_out, why in (
        ([question for question, place in known.items() if place], "belong to a split valid"),
        ([question for question, place in known.items() if not place and not question.steps], "have no written steps"),
    ):
        if left_out:
            log.info(
                "task=%s: %d of %d questions are left out, since they %s; the first is %s",
                task.name, len(left_out), len(questions), why, left_out[0].quoted,
            )  # fmt: skip
    kept = [question for question, place in known.items() if not place and question.steps]
    require("task", task.name, bool(kept), "training needs written steps, and no question of it has any")
    for question in kept:
        for number, step in enumerate(question.steps, start=1):
            if not step.strip():
                raise UsageError(f"task={task.name}: question {question.quoted}: step {number} is empty")
            require(
                "recipe.step_loss",
                "above 0",
                not step_results or bool(re.search(r"=[^=]*\d[^=]*$", step)),
                f"must be 0: step {number} of question {question.quoted} names no "
                f"result, as <<48/2=24>> does: {step[:MAX_SHOWN]!r}",
            )
    return kept


def _split_valid(task: Task, limit: int) -> list[Question] | None:
    """The first questions of the split `valid`; None if the task has none, or none that can be read here."""
    if not isinstance(task, Benchmark) or "valid" not in task.splits:
        return None
    try:
        return replace(task, split="valid", path=None, limit=limit).questions()
    except UsageError as error:
        log.warning("task=%s: its split valid cannot be read (%s)", task.name, str(error).splitlines()[0])
        return None


def hold_out(questions: Sequence[Question], number: int) -> tuple[list[Question], list[Question]]:
    """Part a set into training and validation questions, by the digests of their texts: additions move none.

    Raises:
        UsageError: there are too few.
    """
    number = min(number, int(len(questions) * HELD_OUT_SHARE))
    require(
        "task",
        f"{len(questions)} questions",
        number != 0,
        "must be 10 or more, to hold one out for validation",
    )
    held = set(sorted({text_digest(question.text) for question in questions})[:number])
    parts = [[q for q in questions if (text_digest(q.text) in held) is inside] for inside in (False, True)]
    return parts[0], parts[1]


def epochs(questions: Sequence[Question], seed: int) -> Iterator[Question]:
    """A finite set again and again, in an order of its own in each epoch, whatever the order of its rows."""
    keyed = [(key_of(seed, f"epochs/{question.id}"), question) for question in questions]
    for epoch in count():
        draws = {q.id: philox((epoch, 0, 0, int(Stream.TRAINING)), key)[:2] for key, q in keyed}
        yield from sorted(questions, key=lambda question: (draws[question.id], question.id))


def token_lengths(question: Question, adapter: CheckpointAdapter, latents: int) -> tuple[int, int]:
    """The tokens of a question's prompt, and those of all latents, all steps and the answer."""
    text = written_text(question.steps, question.gold, Stage(1, 0, 0))
    written = len(adapter.tokenizer.encode(text, add_special_tokens=False).ids)
    return len(adapter.encode(question)), latents + len(adapter.thinking_end_ids) + written + 1


def check_lengths(questions: Sequence[Question], adapter: CheckpointAdapter, latents: int) -> None:
    """Check that questions with all their steps fit the model.

    Raises:
        UsageError: one does not.
    """
    for question in questions:
        needed = sum(token_lengths(question, adapter, latents))
        if needed > adapter.positions:
            raise UsageError(
                f"question {question.quoted} with its steps has {needed} tokens, and the model takes "
                f"{adapter.positions}; leave it out"
            )


def digest_of(text: str) -> str:
    """What stands for a question in `known_questions.txt`, whatever its case, spaces and quotes."""
    normalised = " ".join(unicodedata.normalize("NFKC", text).translate(QUOTES).casefold().split())
    return hashlib.sha256(normalised.encode()).hexdigest()[:DIGITS]


def find_known_set(text: str) -> tuple[str, str] | None:
    """The built-in set and split (`test` or `valid`) that a question belongs to; None if it is in no set."""
    if is_problem(text):
        split = split_of(text_digest(text))
        return None if split == "train" else ("arith", split)
    return known_questions().get(digest_of(text))


@cache
def known_questions() -> Mapping[str, tuple[str, str]]:
    """The set and split of each question of the published sets' splits `test` and `valid`, by its digest.

    One line per set: its name, its split, and the digests without spaces. A test question is one whatever else it is.
    """
    known: dict[str, tuple[str, str]] = {}
    content = (files("latent_tts.training.reasoner") / "known_questions.txt").read_text()
    for line in content.splitlines():
        name, split, digests = line.split()
        for start in range(0, len(digests), DIGITS):
            digest = digests[start : start + DIGITS]
            if known.get(digest, ("", ""))[1] != "test":
                known[digest] = (name, split)
    return known
