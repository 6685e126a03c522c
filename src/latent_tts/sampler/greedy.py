"""`sampler=greedy`: nothing random, one rollout a question."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from latent_tts.sampler import Sampler


@dataclass(frozen=True)
class Greedy(Sampler):
    """The model as it is."""

    name: ClassVar[str] = "greedy"
