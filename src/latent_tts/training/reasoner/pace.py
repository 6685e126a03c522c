"""Where a run stands in its recipe: by updates, by the clock, or as a log of another run says.

By the clock, a recipe's numbers of updates are shares: after half the time, stage and learning rate are those of the
middle update. Each update's place is logged, so a run can be repeated by its log: bit for bit on one machine.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from latent_tts.errors import RunError, require
from latent_tts.results.files import settings_digest, write_text
from latent_tts.training.optimization import NO_LIMIT
from latent_tts.training.reasoner.curriculum import Recipe, Stage

log = logging.getLogger(__name__)
LOG = "updates.jsonl"
SAVE_SECONDS = 60.0  # between two saved states of a run by the clock


class Pace(TrainerCallback):
    """The place of every update in the recipe; evaluates and saves every few updates and at the end of each stage.

    Attributes:
        recipe: with the stages.
        save_every: updates between two saved states.
        validate_every: updates between two validations of other weights; None for none.
        rows: the log of the run that is followed, a row per update; empty for none.
        limit: most updates of the run.
    """

    def __init__(
        self, recipe: Recipe, save_every: int, validate_every: int | None = None, rows: Sequence[dict[str, Any]] = ()
    ) -> None:
        self.recipe, self.save_every, self.validate_every, self.rows = recipe, save_every, validate_every, list(rows)
        self.limit = len(rows) or recipe.updates

    def place(self, update: int) -> float:
        """The place of an update in the recipe: an update number, with a fraction where time decides."""
        return self.rows[min(update, self.limit - 1)]["place"] if self.rows else float(update)

    def planned(self, update: int) -> int:
        """The update of the recipe whose stage an update has."""
        return min(int(self.place(update)), self.recipe.updates - 1)

    def stage(self, update: int) -> Stage:
        """The stage of an update."""
        return self.recipe.stage_at(self.planned(update))

    def finished(self, done: int) -> bool:
        """Whether a run is over after this many updates."""
        return done >= self.limit

    def may_validate(self, update: int) -> bool:
        """Whether the validation that is due after an update, which is not the last, takes place."""
        return not self.rows or "validation" in self.rows[update]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluate, save and stop where that is due."""
        done = state.global_step
        over = self.finished(done)
        saves = over or done % self.save_every == 0 or self.stage(done) != self.stage(done - 1)
        validates = saves or (self.validate_every is not None and done % self.validate_every == 0)
        control.should_evaluate |= over or (validates and self.may_validate(done - 1))
        control.should_save |= saves
        control.should_training_stop |= over


class Timed(Pace, ExportableState):
    """By the clock: the time of updates counts, that of validation, saving and loading does not.

    Attributes:
        rows: the log of this run so far, which is part of its states.
        minutes: of all updates together, over all resumes.
        share: of the updates' time that validations may take.
        path: where the log is written.
        seconds: that the updates took so far.
    """

    def __init__(self, *plan: Any, minutes: float, share: float, path: Path) -> None:
        """Take what `Pace` takes, minutes, share and path."""
        super().__init__(*plan)
        self.limit, self.minutes, self.share, self.path = NO_LIMIT, minutes, share, path  # the clock ends the run
        self.seconds = sum(row["seconds"] for row in self.rows)
        self._started, self._saved = 0.0, time.monotonic()

    def place(self, update: int) -> float:
        """The share of the time used when the update began, in updates of the recipe."""
        return self.rows[update]["place"] if update < len(self.rows) else self._used() * self.recipe.updates

    def _used(self) -> float:
        return self.seconds / (60 * self.minutes)

    def finished(self, done: int) -> bool:
        """Whether the time is used up."""
        return self._used() >= 1

    def may_validate(self, update: int) -> bool:
        """Whether one that takes as long as the last one stays within the share; the first one does."""
        taken = [row["validation"] for row in self.rows if "validation" in row]
        within = not taken or sum(taken) + taken[-1] <= self.share * self.seconds
        if not within:
            log.info("validation.share=%g: no validation after update %d", self.share, update + 1)
        return within

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log the update.

        Raises:
            RunError: the first update took all the time.
        """
        update, lr, seconds = state.global_step, kwargs["optimizer"].param_groups[0]["lr"], self._passed()
        stage = self.stage(update)
        row = {"update": update, "place": self.place(update), "seconds": seconds, "latents": stage.latents}
        self.rows.append(row | {"hidden_steps": stage.hidden_steps, "lr": lr})
        self.seconds += seconds
        if update == 0 and self._used() >= 1:
            raise RunError(f"optimization.minutes={self.minutes:g}: too few for one update, which took {seconds:.2g} s")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save every minute too."""
        super().on_step_end(args, state, control, **kwargs)
        self._started = time.perf_counter()
        control.should_save |= of_first_process(time.monotonic() - self._saved >= SAVE_SECONDS)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log the time of a validation."""
        self.rows[-1]["validation"] = self._passed()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the log as far as the state knows it."""
        self._saved = time.monotonic()
        if state.is_world_process_zero:
            lines = [json.dumps(row | {"digest": settings_digest(row)}) + "\n" for row in self.rows]
            write_text(self.path, "".join(lines))

    def _passed(self) -> float:
        """The seconds since the update or the validation began; the first process's clock counts."""
        return of_first_process(time.perf_counter() - self._started)

    def state(self) -> dict[str, Any]:
        """What a saved state has of the pace."""
        return {"args": {}, "attributes": {"rows": self.rows}}


def of_first_process(value: Any) -> Any:
    """A value of the first process of a launch, in all processes."""
    return broadcast_object_list([value])[0]


def read_log(follow: str, updates: int) -> list[dict[str, Any]]:
    """The rows of the log of a run by the clock.

    Args:
        follow: the log's path.
        updates: of the recipe that is to follow it.

    Raises:
        UsageError: there is no such log, it is damaged, or it is of a longer recipe.
    """
    rows: list[dict[str, Any]] = []
    try:
        rows = [json.loads(line) for line in Path(follow).expanduser().read_bytes().splitlines()]
        whole = all(row.pop("digest") == settings_digest(row) and row["update"] == n for n, row in enumerate(rows))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        whole = False
    allowed = f"no undamaged log of a run by the clock ({LOG} in its states)"
    require("optimization.follow", follow, whole and bool(rows), allowed)
    allowed = f"the log of a longer recipe: this one has {updates} updates"
    require("optimization.follow", follow, rows[-1]["place"] <= updates, allowed)
    return rows
