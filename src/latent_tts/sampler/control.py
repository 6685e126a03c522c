"""`sampler=control`: ablations that test whether the latents matter. Deterministic: one rollout per question."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from latent_tts.errors import check_fields
from latent_tts.sampler import Sampler

if TYPE_CHECKING:
    from torch import Tensor

    from latent_tts.random.draw import Draw

MODES = ("zero", "repeat", "shuffle")


@dataclass(frozen=True)
class Control(Sampler):
    """Replaces the latents by something that should work less well.

    Attributes:
        mode: `zero` (every latent zero), `repeat` (h_1 at every step), or `shuffle` (the greedy latents of the next
            question of the run; the last question gets those of the first).
    """

    mode: str

    name: ClassVar[str] = "control"
    param: ClassVar[str | None] = "mode"

    def __post_init__(self) -> None:
        check_fields("sampler", self, mode=MODES)

    @property
    def needs_donor(self) -> bool:
        """True for `shuffle`, which reads the latents of another question."""
        return self.mode == "shuffle"

    @property
    def random_latents(self) -> bool:
        """False: replacements are not random."""
        return False

    @property
    def only_latents(self) -> bool:
        """True: it replaces latents and nothing else."""
        return True

    def latent(self, h_RD: Tensor, draw: Draw, step: int) -> Tensor:
        """The replacement (R, D) of the latent."""
        if self.mode == "zero":
            return h_RD.new_zeros(h_RD.shape)
        if self.mode == "repeat":
            assert draw.history_RTD is not None
            return draw.history_RTD[:, 0] if step else h_RD
        assert draw.donor_RTD is not None
        return draw.donor_RTD[:, step]
