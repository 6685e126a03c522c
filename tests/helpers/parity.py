"""Checkpoints with random weights in published layouts, and what the official code computes with two of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from latent_tts.engine.rollout import Engine, RolloutPlan, Rollouts
from latent_tts.model.coconut import Coconut
from latent_tts.model.codi import Codi
from latent_tts.model.colar import Colar
from latent_tts.random.draw import Draw
from latent_tts.sampler.greedy import Greedy
from latent_tts.types import Reasoner

PARITY = Path(__file__).parents[1] / "parity"
COLAR = PARITY / "colar"
MAX_LATENTS = 16  # as in the official code
LATENTS, ANSWER = 6, 12


def colar(folder: Path = COLAR, **more) -> Colar:
    return Colar(name="colar", checkpoint=str(folder), latents=MAX_LATENTS, recommended={}, **more)


@dataclass(frozen=True)
class Official:
    """A family's checkpoint with the numbers of ModalityDance/LatentTTS at 6657f20.

    Attributes:
        adapter: the family.
        prompt_end: what the official prompts end with, as text.
    """

    adapter: type[Coconut] | type[Codi]
    prompt_end: str

    @property
    def folder(self) -> Path:
        return PARITY / self.adapter.__name__.lower()

    @cached_property
    def expected(self) -> dict[str, Any]:
        return json.loads((self.folder / "expected.json").read_text())

    @property
    def latents_QTD(self) -> Tensor:
        return load_file(self.folder / "expected.safetensors")["latents"]

    @cached_property
    def model(self) -> Coconut | Codi:
        return self.adapter(name="official", checkpoint=str(self.folder), latents=LATENTS, recommended={})

    @cached_property
    def reasoner(self) -> Reasoner:
        return self.model.load(device="cpu", dtype="float32")

    def plan(self, answer: int = ANSWER) -> RolloutPlan:
        return RolloutPlan(LATENTS, self.model.thinking_end_ids, self.model.eos_id, answer)

    def greedy(self, questions: list[int], reasoner: Reasoner | None = None) -> Rollouts:
        draw = Draw.of(0, [str(q) for q in questions], torch.zeros(len(questions), 1, dtype=torch.long), 64)
        engine = Engine(reasoner or self.reasoner, self.plan())
        return engine.roll([self.expected["prompt_ids"][q] for q in questions], draw, Greedy())

    def generated(self, answer_ids: list[int]) -> list[int]:
        """The ids as the official code returns them, filled up with eos."""
        row = [self.model.latent_id] * LATENTS + self.model.thinking_end_ids + answer_ids
        return row + [self.model.eos_id] * (LATENTS + 1 + ANSWER - len(row))


COCONUT = Official(Coconut, "\n<|start-latent|>")
CODI = Official(Codi, "<|start-latent|>")
