"""Tasks of other packages: what the cache and the tables need to know about their questions."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from latent_tts.errors import UsageError
from latent_tts.task import questions_of
from latent_tts.text.answer import AnswerRule
from latent_tts.types import Question, text_digest

NUMBER: Any = 1
ONE, TWO = text_digest("one"), text_digest("two")


@dataclass
class OwnTask:
    made: list[Question]
    name: str = "own"
    split: str | None = None
    rule: AnswerRule = field(default_factory=lambda: AnswerRule("decimal"))

    def questions(self):
        return self.made


def test_ids_that_stand_for_texts_are_taken():
    made = [Question(ONE, "one", "1"), Question(TWO, "two", "2"), Question(f"{ONE}-2", "one", "1.5")]
    assert questions_of(OwnTask(made)) == made
    assert questions_of(OwnTask([Question(ONE, "one", None)]))


@pytest.mark.parametrize(
    ("made", "words"),
    [
        ([], "it has no questions"),
        ([Question("q1", "one", "1")], f"question 'one' has the id 'q1'; it must be '{ONE}'"),
        ([Question(NUMBER, "one", "1")], "has the id 1; it must be"),
        ([Question(ONE, "one", "1"), Question(TWO, "two", None)], "some of its questions have gold answers"),
        ([Question(TWO, "one", "1")], f"has the id '{TWO}'; it must be '{ONE}'"),  # the text was edited
        ([Question(ONE, "one", "1"), Question(ONE, "one", "1")], "is appended in repeats"),
        ([Question(ONE, "one", "18.0")], r"has the answer '18\.0'; it must be in the form .*: '18'"),
        ([Question(ONE, "one", "many")], "has the answer 'many'; it must be in the form .*: None"),
    ],
)
def test_other_ids_and_answers_are_refused(made, words):
    with pytest.raises(UsageError, match=words):
        questions_of(OwnTask(made))
