"""Which answers of a question are one vote."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def shared_forms(answers: Sequence[str | None], equal: Callable[[str, str], bool]) -> list[str | None]:
    """Each answer's class, by the first member of the class; answers of one class are one vote.

    Equality by value is not transitive, so that classes depend on the order in which they are formed. It is that of
    the distinct answers' lengths and characters, whatever the order in which they were given and however often: each
    joins the class of the first earlier answer that leads one and equals it.

    Args:
        answers: canonical answers of one question; None for unreadable ones, which have no class.
        equal: whether two answers have one value.
    """
    leaders: list[str] = []
    leader_of: dict[str | None, str | None] = {None: None}
    for answer in sorted({answer for answer in answers if answer is not None}, key=lambda text: (len(text), text)):
        leader = next((leader for leader in leaders if equal(leader, answer)), None)
        if leader is None:
            leaders.append(answer)
        leader_of[answer] = leader or answer
    return [leader_of[answer] for answer in answers]
