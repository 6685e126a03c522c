"""`task=gsm8k`, `gsm_hard`, `multiarith`, `svamp`, `math500`, `prosqa`: published sets, from a file or the hub."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from latent_tts.errors import UsageError, check_fields, hub_clients, require
from latent_tts.task.jsonl import Row, check_file, file_rows, is_file, read_questions
from latent_tts.text.answer import AnswerRule
from latent_tts.types import Question

log = logging.getLogger(__name__)
FOLDER_VARIABLE = "LTTS_DATA"
MARKS, SENTENCES = "marks", "sentences"
MARK = re.compile(r"<<.*?>>")
LAYOUT = 'one {"question": ..., "answer": ...} per line, or a list of them, or rows with the set\'s own field names'


@dataclass(frozen=True)
class Split:
    """Where a split of a published set is read from, and the names of its fields.

    Attributes:
        file: its file name in the folder that `LTTS_DATA` names; a copy with `.gz`, or a `.json` list, is found too.
        hub: id of the data set on the hub; null if there is no reliable copy.
        get: where to get the file if there is no copy on the hub, for the error.
        subset: name of the subset on the hub; null if there are none.
        hub_split: name of the split on the hub; `a+b` joins two.
        revision: commit or branch on the hub.
        rows: expected number of questions on the hub; another number gives a warning.
        question: name of the field with the question.
        answer: name of the field with the answer.
        marker: separates written steps from the answer in the answer field; null if it contains only the answer.
        distinct: whether repeated questions are left out.
    """

    file: str
    hub: str | None = None
    get: str | None = None
    subset: str | None = None
    hub_split: str = "test"
    revision: str | None = None
    rows: int | None = None
    question: str = "question"
    answer: str = "answer"
    marker: str | None = None
    distinct: bool = False

    def row(self, fields: Mapping[str, Any], steps: str = MARKS) -> dict[str, Any]:
        """A row under this package's field names, which it may have already, without surrounding spaces.

        Args:
            fields: of the row.
            steps: what the steps are: the calculator marks `<<48/2=24>>` of a written solution, or its lines.
        """
        row = dict(fields)
        for name, own in (("question", self.question), ("answer", self.answer)):
            if own in row:
                row[name] = row[own]
            if isinstance(row.get(name), str):
                row[name] = row[name].strip()
        answer = row.get("answer")
        if self.marker is not None and isinstance(answer, str) and self.marker in answer:
            written, _, answer = answer.rpartition(self.marker)
            row |= {"answer": answer.strip(), "steps": row.get("steps") or re.findall(MARK, written)}
            if steps == SENTENCES:
                lines = (re.sub(MARK, "", line).strip() for line in written.splitlines())
                row["steps"] = [line for line in lines if line]
        elif steps == SENTENCES:
            row["steps"] = []  # there is no written solution
        return row


@dataclass(frozen=True)
class Benchmark:
    """A published set of questions.

    Attributes:
        name: the name of the task in tables.
        split: one of `splits`.
        path: a file to read instead, as for `task=jsonl` or with the set's own field names; null: the split's file in
            the folder that the environment variable `LTTS_DATA` names, or without one the hub.
        limit: the first `limit` questions; null for all.
        answer: how answers are read: `decimal`, `latex` or `words`.
        tolerance: largest |prediction - gold| that counts as right; null for exact.
        splits: the fields of each `Split`, by its name.
        steps: what training takes as written steps: `marks` (`<<48/2=24>>`) or `sentences` (lines of the solution).
    """

    name: str
    split: str
    path: str | None
    limit: int | None
    answer: str
    tolerance: float | None
    splits: Mapping[str, Mapping[str, Any]]
    steps: str = MARKS

    def __post_init__(self) -> None:
        check_fields("task", self, split=self.splits, limit="a positive integer, or null for all")
        require("task.steps", self.steps, self.steps in (MARKS, SENTENCES), f"must be {MARKS} or {SENTENCES}")
        _ = self.rule
        if self.path is not None:
            check_file(self.path)
        elif self._file is None and self._split.hub is None:
            raise UsageError(self._how_to_get(f"task={self.name} task.split={self.split}: not on the hub"))

    @cached_property
    def rule(self) -> AnswerRule:
        """How answers are read and compared."""
        return AnswerRule(self.answer, self.tolerance)

    @cached_property
    def _split(self) -> Split:
        return Split(**self.splits[self.split])

    @cached_property
    def _file(self) -> str | None:
        """The file to read; None to read from the hub.

        Raises:
            UsageError: `LTTS_DATA` does not name a folder.
        """
        folder = os.environ.get(FOLDER_VARIABLE)
        if self.path is not None or not folder:
            return self.path
        require(
            FOLDER_VARIABLE,
            folder,
            bool(os.path.isdir(os.path.expanduser(folder))),
            "no such folder; it must be the folder with the evaluation files",
        )
        path = os.path.join(os.path.expanduser(folder), self._split.file)
        names = (path, f"{path}.gz", path.removesuffix("l"), f"{path.removesuffix('l')}.gz")
        return next((name for name in names if is_file(name)), None)

    def _how_to_get(self, problem: str) -> str:
        """An error in three lines: the problem, where to get the data, how to use it."""
        split = self._split
        where = f"download {split.get or f'https://huggingface.co/datasets/{split.hub}'}"
        ways = f"task.path=FILE.jsonl, or {split.file} in the folder that {FOLDER_VARIABLE} names ({LAYOUT})"
        return f"{problem}\n{where}\nuse it with {ways}"

    def questions(self) -> list[Question]:
        """The questions in their order; a repeated text gets the id suffix `-2`, `-3`, ...

        Raises:
            UsageError: the set cannot be read, or one of its rows, which the error names.
        """
        if self._file is not None:
            source, found = f"task.path={self._file}", file_rows(self._file)
            rows = ((place, self._split.row(fields, self.steps)) for place, fields in found)
        else:
            source, rows = f"{self._split.hub}, split {self._split.hub_split}", self._hub_rows()
        questions = read_questions(rows, self.rule, self.limit, source)
        log.info("%d questions from %s", len(questions), source.removeprefix("task.path="))
        return questions

    def _hub_rows(self) -> Iterator[Row]:
        """The rows of the split on the hub.

        Raises:
            UsageError: the hub cannot be reached, or does not have the set.
        """
        split = self._split
        assert split.hub is not None
        try:
            from datasets import load_dataset

            with hub_clients():
                table: Any = load_dataset(split.hub, split.subset, split=split.hub_split, revision=split.revision)
        except Exception as error:  # datasets, huggingface_hub, httpx and pyarrow share no base class
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            problem = f"task={self.name}: {split.hub} cannot be read from the hub ({reason})"
            raise UsageError(self._how_to_get(problem)) from error
        rows: dict[Any, Row] = {}
        for number, fields in enumerate(table):
            row = split.row(fields, self.steps)
            place = f"{split.hub}@{split.revision}, split {split.hub_split}: row {number}"
            rows.setdefault(row["question"] if split.distinct else number, (place, row))
        if split.rows not in (None, len(rows)):
            log.warning(
                "task=%s: %s has %d questions at revision %s; expected %d", self.name, split.hub, len(rows),
                split.revision, split.rows,
            )  # fmt: skip
        return iter(rows.values())
