"""How weights are updated: the values that both trainings share, checked without torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

from latent_tts.errors import bad_value, check_positive, is_number

DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")


@dataclass(frozen=True)
class Optimization:
    """How the weights are updated, by AdamW.

    Attributes:
        batch: questions per update, over all processes.
        accumulation: micro-batches per update and process: less memory, the same number of questions. The loss of an
            update is the mean over its micro-batches.
        lr: peak learning rate, after a linear warm-up.
        weight_decay: on matrices, as AdamW does it.
        clip: largest gradient norm.
    """

    batch: int
    accumulation: int
    lr: float
    weight_decay: float
    clip: float

    def __post_init__(self) -> None:
        check_positive("optimization", self, whole=("batch", "accumulation"), real=("lr", "clip"))
        if self.batch % self.accumulation:
            raise bad_value("optimization.accumulation", self.accumulation, f"a divisor of batch={self.batch}")
        if not (is_number(self.weight_decay) and self.weight_decay >= 0):
            raise bad_value("optimization.weight_decay", self.weight_decay, "0 or more")


def check_device(device: object) -> None:
    """Raise the usual error unless a value can name a device; whether it is there is asked when training starts."""
    if not (isinstance(device, str) and DEVICE.fullmatch(device)):
        raise bad_value("device", device, "one of auto, cpu, cuda, cuda:INDEX")
