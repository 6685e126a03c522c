"""`schedule=auto`: what `ltts probe` recommends for the model, and `sequential` where that does not pay.

The choice follows from the probe's `plan.json` and from the run's own settings, never from a clock while it runs. What
was chosen takes the place of `auto` in the cache's key, in the tables and in `run.json`.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from latent_tts.errors import UsageError, bad_value
from latent_tts.schedule import LatentModel, LatentSequence, Schedule
from latent_tts.schedule.sequential import Sequential
from latent_tts.schedule.speculative import Speculative

PLAN = "plan.json"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What a probe recommends.

    Attributes:
        reasoner: digest of the model that was probed.
        latents: T.
        dtype: in which it was computed.
        device: where its times were measured, as in `cpu` or `cuda`.
        max_rows: most rows of a batch for which `schedule` took less time than `sequential`; 0 for none.
        schedule: the keys of `schedule=speculative`; None where it recommends `sequential`.
    """

    reasoner: str
    latents: int
    dtype: str
    device: str
    max_rows: int
    schedule: dict[str, Any] | None

    @property
    def text(self) -> str:
        """The content of its file."""
        return json.dumps(asdict(self), indent=1) + "\n"


@dataclass(frozen=True)
class Auto(Schedule):
    """A schedule that is chosen before the run begins.

    Attributes:
        probe: the folder of `ltts probe`.
    """

    probe: str

    name: ClassVar[str] = "auto"
    stepwise: ClassVar[bool] = False

    @property
    def key(self) -> str:
        """Never part of a key: the chosen schedule's is."""
        return self.name

    def check(self, model: LatentModel) -> None:
        """Refuse to be used as it is.

        Raises:
            UsageError: always.
        """
        raise bad_value("schedule", self.name, "is chosen by ltts run and ltts ask alone; choose one here")

    def run(self, latents: LatentSequence) -> None:
        """Never called."""
        raise AssertionError("the chosen schedule runs")

    def choose(self, model: LatentModel, reasoner: str, *, rows: int, dtype: str) -> Sequential | Speculative:
        """The schedule to run.

        Args:
            model: the model.
            reasoner: its digest.
            rows: most rows of a batch of the run.
            dtype: of the run.

        Raises:
            UsageError: there is no plan, or it is not for this model and dtype.
        """
        plan, path = self._read(model)
        for what, found, wanted in (
            ("weights", plan.reasoner, reasoner),
            ("model.latents", plan.latents, model.latents),
            ("engine.dtype", plan.dtype, dtype),
        ):
            if found != wanted:
                shown = "" if what == "weights" else f" ({found}, not {wanted})"
                raise bad_value("schedule.probe", self.probe, f"{PLAN} was made for other {what}{shown}")
        if plan.schedule is None:
            log.info("schedule=auto: sequential, which %s recommends", path)
            return Sequential()
        if rows > plan.max_rows:
            log.info("schedule=auto: sequential: %d rows, and by %s more than %d do not pay", rows, path, plan.max_rows)
            return Sequential()
        try:
            schedule = Speculative(**plan.schedule)
        except (TypeError, UsageError) as error:
            raise bad_value("schedule.probe", self.probe, f"{PLAN} holds no schedule ({error})") from error
        log.info("schedule=auto: %s, which %s recommends for up to %d rows", schedule, path, plan.max_rows)
        return schedule

    def _read(self, model: LatentModel) -> tuple[Plan, Path]:
        path = Path(self.probe).expanduser() / PLAN
        try:
            return Plan(**json.loads(path.read_text())), path
        except OSError as error:
            why = f"follows ltts probe, and {path} is not there; ltts probe model={model.name} writes it"
            raise bad_value("schedule", self.name, why) from error
        except (TypeError, ValueError) as error:
            raise bad_value("schedule.probe", self.probe, f"{PLAN} holds no plan ({error})") from error
