"""Which answers of a question count as one vote."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def shared_forms(answers: Sequence[str | None], equal: Callable[[str, str], bool]) -> list[str | None]:
    """Replace each answer by the first member of its class; answers of one class are one vote.

    Equality by value is not transitive, so classes depend on the order in which they are formed. The distinct answers
    are therefore sorted by length, then by characters, and each joins the class of the first leader that it equals, or
    leads a new class. The result does not depend on the given order or on repetitions.

    Args:
        answers: canonical answers of one question; None for unreadable ones, which have no class.
        equal: whether two answers have the same value.
    """
    leaders: list[str] = []
    leader_of: dict[str | None, str | None] = {None: None}
    for answer in sorted({answer for answer in answers if answer is not None}, key=lambda text: (len(text), text)):
        leader = next((leader for leader in leaders if equal(leader, answer)), None)
        if leader is None:
            leaders.append(answer)
        leader_of[answer] = leader or answer
    return [leader_of[answer] for answer in answers]
