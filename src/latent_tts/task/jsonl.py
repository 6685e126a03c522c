"""`task=jsonl`: any file with one JSON object a line, fields `question` and `answer` (`steps` where there are)."""

from __future__ import annotations

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from latent_tts import answer
from latent_tts.errors import UsageError, bad_value, is_number, is_whole
from latent_tts.types import Question, text_digest


@dataclass(frozen=True)
class Jsonl:
    """Questions of a file, numeric answers.

    Attributes:
        path: a `.jsonl` file, or `.jsonl.gz`.
        split: what tables call this set; null takes none.
        limit: the first `limit` questions; null takes all.
        tolerance: largest |prediction - gold| that counts as right; null wants exact decimals.
    """

    path: str | None
    split: str | None
    limit: int | None
    tolerance: float | None

    @property
    def name(self) -> str:
        """The file's name without its ending: what tables call the task."""
        return Path(str(self.path)).name.removesuffix(".gz").removesuffix(".jsonl")

    def __post_init__(self) -> None:
        if self.limit is not None and not (is_whole(self.limit) and self.limit >= 1):
            raise bad_value("task.limit", self.limit, "a positive number of questions, or null for all")
        if self.tolerance is not None and not (is_number(self.tolerance) and self.tolerance >= 0):
            raise bad_value("task.tolerance", self.tolerance, "0 or more, or null for exact")
        if not isinstance(self.path, str) or not Path(self.path).expanduser().is_file():
            raise bad_value("task.path", self.path, "no such file; name one with task.path=FILE.jsonl")

    def questions(self) -> list[Question]:
        """The questions in file order; a repeated text gets the id suffix `-2`, `-3`, ...

        Raises:
            UsageError: a row is not readable; it names file and line.
        """
        seen: Counter[str] = Counter()
        questions = []
        for number, line in islice(self._lines(), self.limit):
            text, gold, steps = self._row(number, line)
            question_id = text_digest(text)
            seen[question_id] += 1
            if seen[question_id] > 1:
                question_id += f"-{seen[question_id]}"
            questions.append(Question(question_id, text, gold, steps))
        if not questions:
            raise bad_value("task.path", self.path, "the file holds no questions")
        return questions

    def _lines(self) -> Iterator[tuple[int, str]]:
        path = Path(str(self.path)).expanduser()
        try:
            opened = gzip.open if path.suffix == ".gz" else open
            with opened(path, "rt", encoding="utf-8") as file:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield number, line
        except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
            raise bad_value("task.path", self.path, f"cannot be read ({error})") from error

    def _row(self, number: int, line: str) -> tuple[str, str, tuple[str, ...]]:
        where = f"task.path={self.path}: line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{where} is not JSON ({error})") from error
        if not isinstance(row, dict):
            raise UsageError(f"{where} is not a JSON object with question and answer")
        for field in ("question", "answer"):
            if not str(row.get(field) or ("" if row.get(field) != 0 else "0")).strip():
                raise UsageError(f"{where} has no {field}; each row needs question and answer")
        gold = self.parse(str(row["answer"]))
        if gold is None:
            raise UsageError(f"{where}: the answer {str(row['answer'])!r} is not a number")
        text, steps = row["question"], row.get("steps") or []
        if not isinstance(text, str) or text.encode("utf-8", "ignore").decode() != text:  # a lone surrogate
            raise UsageError(f"{where}: question is not a text")
        if not isinstance(steps, list) or not all(isinstance(step, str) for step in steps):
            raise UsageError(f"{where}: steps is not a list of texts")
        return text, gold, tuple(steps)

    def parse(self, raw: str | None) -> str | None:
        """The canonical number in a raw answer, None if there is none."""
        return answer.canonical_number(raw)

    def equal(self, prediction: str, gold: str) -> bool:
        """Equality of canonical numbers, within the tolerance."""
        return answer.close(prediction, gold, self.tolerance)
