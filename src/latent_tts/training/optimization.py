"""How weights are updated: the settings that trainings share, checked without torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from latent_tts.errors import check_fields, require

NO_LIMIT = 10**7  # updates of a run that the clock ends


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
        check_fields(
            "optimization", self, batch="a positive integer", accumulation="a positive integer", lr="a positive number",
            weight_decay="a finite number, 0 or more", clip="a positive number", gradient_checkpointing="true or false",
        )  # fmt: skip
        allowed = f"must divide optimization.batch={self.batch}"
        require("optimization.accumulation", self.accumulation, self.batch % self.accumulation == 0, allowed)
