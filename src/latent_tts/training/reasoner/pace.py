"""Where a run stands in its recipe: by updates, by the clock, or as a log of another run says.

By the clock, a recipe's numbers of updates are shares: after half the time, stage and learning rate are those of the
middle update. Each update's place is logged, so a run can be repeated by its log: bit for bit on one machine.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from latent_tts.errors import RunError, is_number, require
from latent_tts.results.files import settings_digest, whole_file
from latent_tts.training.optimization import NO_LIMIT

log = logging.getLogger(__name__)
LOG = "updates.jsonl"
SAVE_SECONDS = 60.0  # between two saved states of such a run


@dataclass
class Pace:
    """The place of every update in the recipe: its number, or what another run's log says.

    Attributes:
        updates: of the recipe.
        followed: the rows of the other run's log; empty for none.
    """

    updates: int
    followed: list[dict[str, Any]] = field(default_factory=list, kw_only=True)

    @property
    def limit(self) -> int:
        """Most updates of the run."""
        return len(self.followed) or self.updates

    def place(self, update: int) -> float:
        """The place of an update in the recipe: an update number, with a fraction where time decides."""
        return self.followed[min(update, self.limit - 1)]["place"] if self.followed else float(update)

    def planned(self, update: int) -> int:
        """The update of the recipe whose stage an update has."""
        return min(int(self.place(update)), self.updates - 1)

    def finished(self, done: int) -> bool:
        """Whether a run is over after this many updates."""
        return done >= self.limit

    def start(self) -> None:
        """An update begins."""

    def stop(self, update: int, agree: Callable[[float], float]) -> None:
        """An update's weights are changed; `agree` gives every process the first one's number."""

    def log(self, update: int, figures: dict[str, Any]) -> None:
        """An update is over."""

    def known(self) -> int:
        """How many updates it knows the places of; no state of more can be resumed from."""
        return self.limit

    def resume(self, done: int) -> None:
        """A run goes on after this many updates."""

    def wants_saving(self) -> bool:
        """Whether a state is due for another reason than the number of updates."""
        return False

    def may_validate(self, update: int) -> bool:
        """Whether the validation that is due after an update takes place."""
        return not self.followed or self.followed[update].get("validated", True)

    @contextmanager
    def validating(self, agree: Callable[[float], float]) -> Iterator[None]:
        """A validation; `agree` gives every process the first one's number."""
        yield


@dataclass
class Timed(Pace):
    """By the clock: the time of updates counts, that of validation, saving and loading does not.

    Attributes:
        minutes: of all updates together, over all resumes.
        path: of the log.
        share: of the updates' time since this process began that validations may take.
        seconds: of each update so far.
        places: of each update so far, and of the next one.
    """

    minutes: float
    path: Path
    share: float = 1.0
    seconds: list[float] = field(default_factory=list)
    places: list[float] = field(default_factory=list)
    _started: float = 0.0
    _saved: float = field(default_factory=lambda: time.monotonic())
    _resumed: int = 0  # updates of earlier processes
    _validations: list[float] = field(default_factory=list)  # seconds

    @property
    def limit(self) -> int:
        """None that matters: the clock ends the run."""
        return NO_LIMIT

    def place(self, update: int) -> float:
        """The share of the time used when the update began, in updates of the recipe."""
        if update < len(self.places):
            return self.places[update]
        place = self._share() * self.updates
        if update == len(self.places) == len(self.seconds):
            self.places.append(place)
        return place

    def _share(self) -> float:
        return sum(self.seconds) / (60 * self.minutes)

    def finished(self, done: int) -> bool:
        """Whether the time is used up."""
        return done > 0 and self._share() >= 1

    def start(self) -> None:
        """The clock of an update."""
        self._started = time.perf_counter()

    def stop(self, update: int, agree: Callable[[float], float]) -> None:
        """Count the update's time.

        Raises:
            RunError: the first update took all of it.
        """
        self.place(update)
        self.seconds.append(agree(time.perf_counter() - self._started))
        if update == 0 and self._share() >= 1:
            raise RunError(
                f"optimization.minutes={self.minutes:g}: too few for one update, which took {self.seconds[0]:.2g} s"
            )

    def log(self, update: int, figures: dict[str, Any]) -> None:
        """Append an update to the log."""
        row = {"update": update, "place": self.places[update], "seconds": self.seconds[update], **figures}
        with self.path.open("a") as file:
            file.write(json.dumps(row | {"digest": settings_digest(row)}) + "\n")

    def known(self) -> int:
        """The updates in the log that are whole."""
        return len(read_log(self.path))

    def resume(self, done: int) -> None:
        """Take the updates of the saved state from the log; drop later ones."""
        rows = read_log(self.path)[:done]
        self._resumed = done
        self.seconds, self.places = [row["seconds"] for row in rows], [row["place"] for row in rows]
        if self.path.is_file():
            with whole_file(self.path) as partial:
                partial.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def wants_saving(self) -> bool:
        """Once a minute."""
        due = time.monotonic() - self._saved >= SAVE_SECONDS
        if due:
            self._saved = time.monotonic()
        return due

    def may_validate(self, update: int) -> bool:
        """Whether one that takes as long as the last one stays within the share; the first one does."""
        allowed = self.share * sum(self.seconds[self._resumed :])
        within = not self._validations or sum(self._validations) + self._validations[-1] <= allowed
        if not within:
            log.info("validation.share=%g: no validation after update %d", self.share, update + 1)
        return within

    @contextmanager
    def validating(self, agree: Callable[[float], float]) -> Iterator[None]:
        """Count the time of a validation."""
        started = time.perf_counter()
        yield
        self._validations.append(agree(time.perf_counter() - started))


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a log, up to one that was cut off or is damaged."""
    rows: list[dict[str, Any]] = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(row, dict) or row.get("update") != len(rows):
            break
        written = {name: value for name, value in row.items() if name != "digest"}
        numbers = all(is_number(row.get(name)) and row[name] >= 0 for name in ("place", "seconds"))
        if not numbers or row.get("digest") not in (None, settings_digest(written)):  # earlier versions wrote none
            break
        rows.append(row)
    return rows


def pace_of(updates: int, minutes: float | None, follow: str | None, states: Path, share: float = 1.0) -> Pace:
    """The pace of a run.

    Args:
        updates: of the recipe.
        minutes: of training; None: as many updates as the recipe has.
        follow: the log of another run; None for none.
        states: folder of the run's states, in which a run by the clock writes its log.
        share: of the updates' time that validations of a run by the clock may take.

    Raises:
        UsageError: there is no such log.
    """
    if follow is not None:
        path = Path(follow).expanduser()
        rows = read_log(path)
        require("optimization.follow", follow, bool(rows), f"no log of a run by the clock ({LOG} in its states)")
        whole = len(rows) == len(path.read_bytes().splitlines())
        require("optimization.follow", follow, whole, f"is damaged in line {len(rows) + 1}")
        require(
            "optimization.follow",
            follow,
            rows[-1]["place"] <= updates,
            f"the log of a longer recipe: this one has {updates} updates",
        )
        return Pace(updates, followed=rows)
    return Pace(updates) if minutes is None else Timed(updates, minutes, states / LOG, share)
