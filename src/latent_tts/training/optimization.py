"""How weights are updated: the settings that both trainings share, checked without torch."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from latent_tts.errors import bad_value, check_positive, is_number

DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")


@dataclass(frozen=True)
class Optimization:
    """How weights are updated, by AdamW.

    Attributes:
        batch: questions per update, over all processes.
        accumulation: micro-batches per update and process; more need less memory for the same number of questions. The
            loss of an update is the mean over its micro-batches.
        lr: peak learning rate, after a linear warm-up.
        weight_decay: AdamW's weight decay, 0 or more; only on matrices.
        clip: maximum norm of the gradient.
        gradient_checkpointing: whether blocks keep only their input for the backward pass, which computes the rest
            again: less memory, about a third more time, the same gradients.
    """

    batch: int
    accumulation: int
    lr: float
    weight_decay: float
    clip: float
    gradient_checkpointing: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        check_positive("optimization", self, whole=("batch", "accumulation"), real=("lr", "clip"))
        if self.batch % self.accumulation:
            raise bad_value(
                "optimization.accumulation", self.accumulation, f"must divide optimization.batch={self.batch}"
            )
        if not (is_number(self.weight_decay) and self.weight_decay >= 0):
            raise bad_value("optimization.weight_decay", self.weight_decay, "must be a number, 0 or more")
        if not isinstance(self.gradient_checkpointing, bool):
            raise bad_value("optimization.gradient_checkpointing", self.gradient_checkpointing, "must be true or false")


def check_device(device: object) -> None:
    """Check the form of a device name; training checks whether the machine has the device.

    Raises:
        UsageError: it is not the name of a device.
    """
    if not (isinstance(device, str) and DEVICE.fullmatch(device)):
        raise bad_value("device", device, "must be one of auto, cpu, cuda, cuda:INDEX")
