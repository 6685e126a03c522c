"""`task=jsonl`: any file with one JSON object a line, fields `question` and `answer` (`steps` where there are)."""

from __future__ import annotations

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from latent_tts.errors import UsageError, bad_value, is_whole
from latent_tts.text.answer import AnswerRule
from latent_tts.types import Question, text_digest

Row = tuple[str, Mapping[str, Any]]  # where it stands, as an error names it, and its fields


@dataclass(frozen=True)
class Jsonl:
    """Questions of a file.

    Attributes:
        path: a `.jsonl` file, or `.jsonl.gz`.
        split: what tables call this set; null takes none.
        limit: the first `limit` questions; null takes all.
        tolerance: largest |prediction - gold| that counts as right; null wants exact decimals.
        answer: how answers are read: `decimal`, `latex` or `words`.
    """

    path: str | None
    split: str | None
    limit: int | None
    tolerance: float | None
    answer: str = "decimal"

    @property
    def name(self) -> str:
        """The file's name without its ending: what tables call the task."""
        return Path(str(self.path)).name.removesuffix(".gz").removesuffix(".jsonl")

    def __post_init__(self) -> None:
        check_limit(self.limit)
        _ = self.rule
        check_file(self.path)

    @cached_property
    def rule(self) -> AnswerRule:
        """How answers are read and compared."""
        return AnswerRule(self.answer, self.tolerance)

    def questions(self) -> list[Question]:
        """The questions in file order; a repeated text gets the id suffix `-2`, `-3`, ...

        Raises:
            UsageError: a row is not readable; it names file and line.
        """
        return read_questions(file_rows(str(self.path)), self.rule, self.limit, f"task.path={self.path}")

    def parse(self, raw: str | None) -> str | None:
        """The canonical form of a raw answer, None if it cannot be read."""
        return self.rule.parse(raw)

    def equal(self, prediction: str, gold: str) -> bool:
        """Whether a canonical prediction is right."""
        return self.rule.equal(prediction, gold)


def check_limit(limit: object) -> None:
    """Raise the usual error unless a `task.limit` is allowed."""
    if limit is not None and not (is_whole(limit) and limit >= 1):
        raise bad_value("task.limit", limit, "a positive number of questions, or null for all")


def check_file(path: object) -> None:
    """Raise the usual error unless a `task.path` is a file."""
    if not isinstance(path, str) or not Path(path).expanduser().is_file():
        raise bad_value("task.path", path, "no such file; name one with task.path=FILE.jsonl")


def file_rows(path: str) -> Iterator[Row]:
    """The rows of a `.jsonl` or `.jsonl.gz` file, blank lines left out.

    Raises:
        UsageError: the file, or a line of it, is not readable; it names file and line.
    """
    file_path = Path(path).expanduser()
    try:
        opened = gzip.open if file_path.suffix == ".gz" else open
        with opened(file_path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    where = f"task.path={path}: line {number}"
                    yield where, _json_object(where, line)
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise bad_value("task.path", path, f"cannot be read ({error})") from error


def _json_object(where: str, line: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where} is not JSON ({error})") from error
    if not isinstance(row, dict):
        raise UsageError(f"{where} is not a JSON object with question and answer")
    return row


def read_questions(rows: Iterable[Row], rule: AnswerRule, limit: int | None, source: str) -> list[Question]:
    """Rows with the fields `question`, `answer` and maybe `steps` as questions, in order.

    Args:
        rows: read no further than `limit`.
        rule: how gold answers are read.
        limit: the first `limit` rows; None takes all.
        source: where the rows come from, for the error when there are none.

    Raises:
        UsageError: a row is not readable; it names the row.
    """
    seen: Counter[str] = Counter()
    questions = []
    for where, row in islice(rows, limit):
        text, gold, steps = _fields(where, row, rule)
        question_id = text_digest(text)
        seen[question_id] += 1
        if seen[question_id] > 1:
            question_id += f"-{seen[question_id]}"
        questions.append(Question(question_id, text, gold, steps))
    if not questions:
        raise UsageError(f"{source}: the file holds no questions")
    return questions


def _fields(where: str, row: Mapping[str, Any], rule: AnswerRule) -> tuple[str, str, tuple[str, ...]]:
    for field in ("question", "answer"):
        if not str(row.get(field) or ("" if row.get(field) != 0 else "0")).strip():
            raise UsageError(f"{where} has no {field}; each row needs question and answer")
    if not isinstance(row["answer"], str | int | float) or isinstance(row["answer"], bool):
        raise UsageError(f"{where}: answer is neither a text nor a number")
    gold = rule.parse(str(row["answer"]))
    if gold is None:
        raise UsageError(f"{where}: the answer {str(row['answer'])!r} is not {rule.wanted}")
    text, steps = row["question"], row.get("steps") or []
    if not isinstance(text, str) or text.encode("utf-8", "ignore").decode() != text:  # a lone surrogate
        raise UsageError(f"{where}: question is not a text")
    if not isinstance(steps, list) or not all(isinstance(step, str) for step in steps):
        raise UsageError(f"{where}: steps is not a list of texts")
    return text, gold, tuple(steps)
