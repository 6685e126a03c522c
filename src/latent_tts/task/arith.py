"""`task=arith`: procedural multi-step word problems with their equation steps.

Problem `i` of a seed is a pure function of (seed, i), and the hash of its text decides its split. So `train`, `valid`
and `test` never share a question, and `train` is endless.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import count, islice

from latent_tts.errors import check_fields, require
from latent_tts.random.philox import Dice, Stream, key_of
from latent_tts.text.answer import AnswerRule
from latent_tts.types import Question, text_digest

NAMES = {"Ann": "She", "Ben": "He", "Cara": "She", "Dan": "He", "Eva": "She", "Finn": "He", "Gina": "She", "Hugo": "He"}
ITEMS = ("apples", "books", "cards", "coins", "marbles", "pens", "shells", "stamps")
OPENING = "{name} has {value} {items}."
CLOSING = "How many {items} does {name} have?"
# An operation either changes what the current person has, or compares a new person with the current one.
CHANGES = {
    "+": ("{pronoun} buys {value} more.", "{pronoun} finds {value} more.", "{pronoun} wins {value} more."),
    "-": ("{pronoun} loses {value}.", "{pronoun} sells {value}.", "{pronoun} gives away {value}."),
    "*": ("Then {pronoun} has {value} times as many.",),
    "/": ("{pronoun} shares them among {value} and keeps one part.",),
}
COMPARISONS = {
    "+": ("{new} has {value} more than {name}.",),
    "-": ("{new} has {value} fewer than {name}.",),
    "*": ("{new} has {value} times as many as {name}.",),
}
SPLITS = ("train", "valid", "test", "hard")
DEFAULT_SIZE = 2000


@dataclass(frozen=True)
class Level:
    """The difficulty of problems: numbers of steps, and the largest operands and intermediate values."""

    steps: tuple[int, ...]
    start: int
    addend: int
    factor: int
    largest: int


STANDARD = Level(steps=(2, 3, 4, 5), start=60, addend=40, factor=5, largest=200)
HARD = Level(steps=(6, 7, 8), start=500, addend=400, factor=9, largest=9999)


@dataclass(frozen=True)
class Arith:
    """The procedural task.

    Attributes:
        split: `train`, `valid` or `test` (2 to 5 steps, values up to 200), or `hard` (6 to 8 steps, up to 9999).
        limit: the first `limit` questions of the split; None for 2000.
        steps: keep only problems with these numbers of steps; None for all.
        seed: selects the sequence of problems; the built-in reasoners were trained on 0.
    """

    split: str
    limit: int | None
    steps: list[int] | None
    seed: int

    name = "arith"
    rule = AnswerRule("decimal")

    def __post_init__(self) -> None:
        check_fields("task", self, split=SPLITS, limit="a positive integer, or null for the default")
        allowed = self._level.steps
        require(
            "task.steps",
            self.steps,
            self.steps is None
            or bool(isinstance(self.steps, list) and self.steps and all(step in allowed for step in self.steps)),
            f"must be a list of {list(allowed)} for task.split={self.split}",
        )

    @property
    def _level(self) -> Level:
        return HARD if self.split == "hard" else STANDARD

    def questions(self) -> list[Question]:
        """The first `limit` questions of the split, all different."""
        # making 2000 takes a second, and the jobs of a sweep ask the same ones
        steps = None if self.steps is None else tuple(self.steps)
        return list(_first_questions(self.split, self.limit or DEFAULT_SIZE, steps, self.seed))

    def stream(self) -> Iterator[Question]:
        """All questions of the split in order, without end; only `train` may repeat a question."""
        key = key_of(self.seed, f"arith/{'hard' if self.split == 'hard' else 'standard'}")
        seen: set[str] = set()
        for index in count():
            question = make_problem(Dice(key, Stream.PROBLEM, index), self._level)
            if (split_of(question.id) != self.split and self.split != "hard") or question.id in seen:
                continue
            if self.steps is not None and len(question.steps) not in self.steps:
                continue
            if self.split != "train":
                seen.add(question.id)
            yield question


@lru_cache(maxsize=4)
def _first_questions(split: str, limit: int, steps: tuple[int, ...] | None, seed: int) -> tuple[Question, ...]:
    task = Arith(split, limit, None if steps is None else list(steps), seed)
    return tuple(islice(task.stream(), limit))


def split_of(question_id: str) -> str:
    """The split of a standard problem, by the hash of its text: a tenth each goes to test and valid."""
    return {0: "test", 1: "valid"}.get(int(question_id, 16) % 10, "train")


def is_problem(text: str) -> bool:
    """Whether a text looks like a problem of this task: all its words are of its templates, the last ones too."""
    vocabulary, last = frozenset(words()), CLOSING.partition("{")[0]
    return last in text and all(word in vocabulary for word in re.findall(r"[A-Za-z]+", text))


def make_problem(dice: Dice, level: Level) -> Question:
    """A problem: each step changes a running value, which stays in [1, level.largest]."""
    names = list(NAMES)
    name = names.pop(dice.below(len(names)))
    items = dice.pick(ITEMS)
    value = dice.between(2, level.start)
    sentences = [OPENING.format(name=name, value=value, items=items)]
    steps = []
    for _ in range(dice.pick(level.steps)):
        operator, operand, result = _operation(dice, level, value)
        compare = operator in COMPARISONS and dice.below(3) == 0
        template = dice.pick((COMPARISONS if compare else CHANGES)[operator])
        new = names.pop(dice.below(len(names))) if compare and names else name
        if new == name:
            template = dice.pick(CHANGES[operator])
        pronoun = NAMES[name] if template.startswith("{pronoun}") else NAMES[name].lower()
        sentences.append(template.format(pronoun=pronoun, name=name, new=new, value=operand))
        steps.append(f"<<{value}{operator}{operand}={result}>>")
        name, value = new, result
    sentences.append(CLOSING.format(name=name, items=items))
    text = " ".join(sentences)
    return Question(id=text_digest(text), text=text, answer=str(value), steps=tuple(steps))


def _operation(dice: Dice, level: Level, value: int) -> tuple[str, int, int]:
    """A random operation whose result is in range: (operator, operand, result)."""
    while True:
        operator = dice.pick("++--*/")
        if operator in "+-":
            operand = dice.between(2, level.addend)
            result = value + operand if operator == "+" else value - operand
        else:
            operand = dice.between(2, level.factor)
            result = value * operand if operator == "*" else value // operand
            if operator == "/" and result * operand != value:
                continue
        if 1 <= result <= level.largest:
            return operator, operand, result


@cache
def words() -> tuple[str, ...]:
    """Every word and sign that the text of a problem can contain, sorted, without numbers."""
    texts = [OPENING, CLOSING, *(t for group in (CHANGES, COMPARISONS) for ts in group.values() for t in ts)]
    texts += [*NAMES, *NAMES.values(), *(p.lower() for p in NAMES.values()), *ITEMS]
    found = {w for text in texts for w in re.findall(r"[A-Za-z]+|[^\sA-Za-z]", re.sub(r"\{\w+\}", " ", text))}
    return tuple(sorted(found))
