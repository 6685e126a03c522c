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

from latent_tts.errors import UsageError, bad_value, is_whole
from latent_tts.schedule import LatentModel, Schedule
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

    def choose(self, rows: int) -> Sequential | Speculative:
        """The schedule of a run whose batches have at most so many rows."""
        if self.schedule is None or rows > self.max_rows:
            why = f"{rows} rows, and by the probe over {self.max_rows} do not pay"
            log.info("schedule=auto: sequential: %s", why if self.schedule else "which the probe recommends")
            return Sequential()
        schedule = Speculative(**self.schedule)
        log.info("schedule=auto: %s, which the probe recommends for up to %d rows", schedule, self.max_rows)
        return schedule


@dataclass(frozen=True)
class Auto(Schedule):
    """A schedule that is chosen before the run begins.

    Attributes:
        probe: the folder of `ltts probe`.
    """

    probe: str

    name: ClassVar[str] = "auto"
    stepwise: ClassVar[bool] = False

    def check(self, model: LatentModel) -> None:
        """Refuse: by now another schedule should have been chosen.

        Raises:
            UsageError: always.
        """
        raise bad_value(
            "schedule",
            self.name,
            "is chosen before a run begins, by ltts run, ask and trace; choose another schedule here",
        )

    def read(self, model: LatentModel, reasoner: str, dtype: str) -> Plan:
        """The plan of a run.

        Args:
            model: the model.
            reasoner: its digest.
            dtype: of the run.

        Raises:
            UsageError: there is no plan, or it is not for this model and dtype.
        """
        path = Path(self.probe).expanduser() / PLAN
        try:
            plan = Plan(**json.loads(path.read_text()))
            if not is_whole(plan.max_rows):
                raise ValueError(f"max_rows is {plan.max_rows!r}")
            if plan.schedule is not None:
                Speculative(**plan.schedule)
        except OSError as error:
            why = f"follows ltts probe, and {path} does not exist; ltts probe model={model.name} writes it"
            raise bad_value("schedule", self.name, why) from error
        except (TypeError, ValueError, UsageError) as error:
            raise bad_value("schedule.probe", self.probe, f"{PLAN} holds no plan ({error})") from error
        for what, found, wanted in (
            ("weights", plan.reasoner, reasoner),
            ("model.latents", plan.latents, model.latents),
            ("engine.dtype", plan.dtype, dtype),
        ):
            if found != wanted:
                shown = "" if what == "weights" else f" ({found}, not {wanted})"
                raise bad_value("schedule.probe", self.probe, f"{PLAN} was made for other {what}{shown}")
        return plan
