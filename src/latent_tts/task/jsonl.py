"""`task=jsonl`: a file of JSON objects, one per line or in a list: `question`, and optionally `answer` and `steps`."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from latent_tts.errors import UsageError, bad_value, check_fields, closest, require
from latent_tts.text.answer import RULES, AnswerRule
from latent_tts.text.number import canonical_number
from latent_tts.types import Question, text_digest

MAX_CHARACTERS = 1_000_000  # per row; the longest row of the published sets has 7,000
MAX_BLANK = 100_000  # lines in a row: a small .gz may hold very many
MAX_SHOWN = 100  # characters of a row that an error quotes
PIECE = 1 << 16  # characters of a JSON list read at once
ANSWER_NAMES = ("answer", "target", "gold", "solution", "correct", "ground_truth")
# what JSON makes of `"\frac"`, `"\binom"`, `"\text"` and `"\right"`
LOST_BACKSLASH = re.compile(
    r"\f(?=rac|lo)|\x08(?=inom|egin|oxed|eta|ar\b)|\t(?=ext|imes|heta|frac|riangle)|\r(?=ight|angle)"
)
AFTER_ROW = re.compile(r"\s*(?:,|(?=\]))")  # of a list
JSON_LINES = """each line must be {"question": ..., "answer": ...}
pandas writes such files by to_json(FILE, orient="records", lines=True)"""
Row = tuple[str, Mapping[str, Any]]  # (its place, for errors; its fields)


class _Object(dict[str, Any]):
    """A JSON object that knows which key it had twice (None: none)."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.twice = next((key for key, count in Counter(key for key, _ in pairs).items() if count > 1), None)


DECODER = json.JSONDecoder(object_pairs_hook=_Object, parse_float=Decimal)  # a float would lose digits


@dataclass(frozen=True)
class Jsonl:
    """The questions of a file.

    Attributes:
        path: a `.jsonl` file with one object per line or a `.json` file with a list of them, or either with `.gz`.
        split: the name of the split in tables; null for none.
        limit: the first `limit` questions; null for all.
        tolerance: largest |prediction - gold| that counts as right; null for exact decimals.
        answer: how answers are read: `decimal`, `latex` or `words`.
    """

    path: str | None
    split: str | None
    limit: int | None
    tolerance: float | None
    answer: str = "decimal"

    @property
    def name(self) -> str:
        """The name of the task in tables: the file name without its extension."""
        return Path(str(self.path)).name.removesuffix(".gz").removesuffix(".jsonl").removesuffix(".json")

    def __post_init__(self) -> None:
        check_fields("task", self, limit="a positive integer, or null for all")
        _ = self.rule
        check_file(self.path)

    @cached_property
    def rule(self) -> AnswerRule:
        """How answers are read and compared."""
        return AnswerRule(self.answer, self.tolerance)

    def questions(self) -> list[Question]:
        """The questions in file order; a repeated text gets the id suffix `-2`, `-3`, ...

        Raises:
            UsageError: a row cannot be read, or only some rows have an answer; the error names file and line.
        """
        rows = file_rows(str(self.path))
        return read_questions(rows, self.rule, self.limit, f"task.path={self.path}", gold_optional=True)


def check_file(path: object) -> None:
    """Check a value of `task.path`.

    Raises:
        UsageError: there is no such file.
    """
    require(
        "task.path", path, isinstance(path, str) and is_file(path), "no such file; name one with task.path=FILE.jsonl"
    )


def is_file(path: str) -> bool:
    """Whether there is such a file; `~` is the home folder."""
    try:
        return Path(path).expanduser().is_file()
    except (OSError, RuntimeError):  # the name is too long, or `~` cannot be expanded
        return False


def file_rows(path: str) -> Iterator[Row]:
    """The rows of a file (`.gz` or not): one JSON object per non-blank line, or a list of objects.

    Raises:
        UsageError: the file or a row cannot be read, or a row is too long; the error names the file and the row.
    """
    file_path = Path(path).expanduser()
    try:
        opened = gzip.open if file_path.suffix == ".gz" else open
        with opened(file_path, "rt", encoding="utf-8-sig") as file:
            if (text := file.read(PIECE).lstrip()).startswith("["):
                yield from _list_rows(f"task.path={path}: row", file, text[1:])
                return
            file.seek(0)
            blank = 0
            for number, text in enumerate(iter(lambda: file.readline(MAX_CHARACTERS + 1), ""), 1):
                where = f"task.path={path}: line {number}"
                if len(text) > MAX_CHARACTERS:
                    raise _too_long(where)
                blank = 0 if text.strip() else blank + 1
                if blank > MAX_BLANK:
                    raise UsageError(f"{where}: there are more than {MAX_BLANK:,} blank lines before it")
                if not blank:
                    try:
                        row = DECODER.decode(text)
                    except (ValueError, RecursionError) as error:
                        hint = f"\n{JSON_LINES}" if number == 1 else ""
                        raise UsageError(f"{where} is not JSON ({error}){hint}") from error
                    yield where, _checked(where, row)
    except UnicodeDecodeError as error:
        raise bad_value(
            "task.path",
            path,
            f"is no text in UTF-8 ({error}); save it as UTF-8; if it is compressed, its name must end in .gz; "
            f"{JSON_LINES}",
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise bad_value("task.path", path, f"cannot be read ({error})") from error


def _list_rows(where: str, file: TextIO, text: str) -> Iterator[Row]:
    """The rows of a JSON list, read piece by piece.

    Args:
        where: the place of a row in errors, without its number.
        file: the rest of the file, after `text`.
        text: the beginning of the file, after the opening bracket.
    """
    number = 1
    while not (text := text.lstrip()).startswith("]"):
        found = row = None
        problem = "a comma or the end of the list must follow it"
        try:
            row, end = DECODER.raw_decode(text)
            found = AFTER_ROW.match(text, end)
        except (ValueError, RecursionError) as error:
            problem = str(error) if text else "the closing bracket is missing"
        if found:
            yield f"{where} {number}", _checked(f"{where} {number}", row)
            text, number = text[found.end() :], number + 1
        elif len(text) > MAX_CHARACTERS:
            raise _too_long(f"{where} {number}")
        elif piece := file.read(PIECE):
            text += piece
        else:
            raise UsageError(f"{where} {number} is not JSON ({problem})")
    if (text[1:] + file.read(MAX_CHARACTERS)).strip():
        raise UsageError(f"{where} {number}: there is text after the list")


def _too_long(where: str) -> UsageError:
    return UsageError(f"{where} has more than {MAX_CHARACTERS:,} characters")


def _checked(where: str, row: Any) -> Mapping[str, Any]:
    if not isinstance(row, _Object):
        raise UsageError(f"{where} is not a JSON object with a question")
    if row.twice is not None:
        raise UsageError(f"{where} has the key {_short(repr(row.twice))} twice")
    return row


def read_questions(
    rows: Iterable[Row], rule: AnswerRule, limit: int | None, source: str, *, gold_optional: bool = False
) -> list[Question]:
    """Turn rows with the fields `question`, `answer` and optionally `steps` into questions, in order.

    Args:
        rows: read only up to `limit`.
        rule: how gold answers are read.
        limit: the first `limit` rows; None for all.
        source: where the rows come from, for the error if there are none.
        gold_optional: whether rows may have no answer; then all have one, or none.

    Raises:
        UsageError: a row cannot be read, which the error names, or there are no rows.
    """
    seen: Counter[str] = Counter()
    questions = []
    for where, row in islice(rows, limit):
        for field in ("question", "answer"):
            if LOST_BACKSLASH.search(value := str(row.get(field))):
                why = 'has lost a backslash; JSON needs two, as in "\\\\frac"'
                raise UsageError(f"{where}: {field} {_short(repr(value))} {why}")
        text, steps = _question(where, row)
        gold = _gold(where, row, rule)
        if gold is None and not gold_optional:
            raise UsageError(f"{where} has no answer; each row needs question and answer; {_fields_of(row)}")
        if questions and (gold is None) != (questions[0].answer is None):
            unlike = (
                "no answer, the rows before it have one" if gold is None else "an answer, the rows before it have none"
            )
            raise UsageError(f"{where} has {unlike}: give all rows an answer, or none")
        digest = text_digest(text)
        seen[digest] += 1
        question_id = digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"
        questions.append(Question(question_id, text, gold, steps))
    if not questions:
        raise UsageError(f"{source}: contains no questions")
    return questions


def _question(where: str, row: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """Text and steps of a row."""
    if _is_blank(row.get("question")):
        raise UsageError(f"{where} has no question; each row needs one; {_fields_of(row)}")
    text, steps = row["question"], row.get("steps") or []
    if not isinstance(text, str) or text.encode("utf-8", "ignore").decode() != text:  # a lone surrogate
        raise UsageError(f"{where}: question must be a text")
    if not isinstance(steps, list) or not all(isinstance(step, str) for step in steps):
        raise UsageError(f"{where}: steps must be a list of texts")
    return text, tuple(steps)


def _gold(where: str, row: Mapping[str, Any], rule: AnswerRule) -> str | None:
    """The canonical gold answer of a row; None if it has none."""
    answer = row.get("answer")
    if _is_blank(answer):
        similar = {key.casefold(): key for key in row if key != "answer"}
        meant = next((name for name in ANSWER_NAMES if name in similar), None) or closest(
            "answer", similar, cutoff=0.65
        )
        if meant is not None:
            raise UsageError(f"{where} has no answer; did you mean answer by {_short(repr(similar[meant]))}?")
        return None
    is_number = isinstance(answer, int | float | Decimal) and not isinstance(answer, bool)
    if not is_number and not isinstance(answer, str):
        raise UsageError(f"{where}: answer must be a text or a number")
    # a number is its value, also where answers are words: 18.0 is 18, and NaN is none
    gold = rule.parse(canonical_number(str(answer)) if is_number else str(answer))
    if gold is None:
        hint = "; task=gsm8k reads rows with the answer after ####" if "####" in str(answer) else ""
        raise UsageError(f"{where}: the answer {_short(repr(str(answer)))} is not {RULES[rule.name]}{hint}")
    return gold


def _is_blank(value: object) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _fields_of(row: Mapping[str, Any]) -> str:
    return f"this one has {_short(', '.join(map(repr, row)) or 'nothing')}"


def _short(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
