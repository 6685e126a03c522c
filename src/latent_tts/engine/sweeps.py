"""Several latents of a rollout in one pass: what a parallel schedule asks of rollouts in the making."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from latent_tts.engine import backbone
from latent_tts.engine.attention import AttentionState
from latent_tts.engine.sites import MaskedSites
from latent_tts.random.draw import Draw
from latent_tts.types import Forward

if TYPE_CHECKING:
    from latent_tts.engine.rollout import Engine, Plan


class Sweeps:
    """The part of `Thinking` that runs the forward passes of several latents side by side.

    A latent is made by the pass of what stands before it, the last prompt token for h_1. Side by side, these passes
    meet the masks that they meet one by one, since masks and noise belong to a rollout's step.
    """

    engine: Engine
    plan: Plan
    lm: PreTrainedModel
    embed: Callable[[Tensor], Tensor]
    sites: MaskedSites
    state: AttentionState
    draw: Draw
    latents_RTD: Tensor
    step: int
    _own_last: bool
    _pending_R1D: Tensor | None
    _unsettled: range
    _hidden_RD: Tensor | None

    @property
    def total(self) -> int:
        """T."""
        return self.plan.latents

    def guess(self, start: int, stop: int, what: str) -> None:
        """Put a guess in the place of latents start..stop-1: `zero`, or `token`, the embedding of `<|latent|>`."""
        self.latents_RTD[:, start:stop] = 0
        if what == "token":
            self.latents_RTD[:, start:stop] = self.embed(
                torch.tensor(self.plan.latent_id, device=self.latents_RTD.device)
            )

    def remake(self, first: int, start: int, stop: int) -> None:
        """Make latents start..stop-1 anew, those below `first` excepted, in one pass over what makes first..stop-1."""
        steps = range(first or int(not self._own_last), stop)  # the prompt's pass may have made h_1
        hidden_RSD = None
        if steps:
            inputs = [self.latents_RTD[:, max(steps[0] - 1, 0) : stop - 1]]
            if steps[0] == 0:
                assert self._pending_R1D is not None
                inputs.insert(0, self._pending_R1D)
            self.state.used = steps[0] - (not self._own_last)
            hidden_RSD = self._run(torch.cat(inputs, 1), [Forward("thoughts", step, 1) for step in steps])
        for step in range(max(first, start), stop):
            hidden_RD = self._hidden_RD if hidden_RSD is None or step < steps[0] else hidden_RSD[:, step - steps[0]]
            assert hidden_RD is not None
            self.latents_RTD[:, step] = self._latent(hidden_RD, step)

    def _latent(self, hidden_RD: Tensor, step: int) -> Tensor:
        """What the model and the sampler make of the hidden states before a latent."""
        reasoner, sampler = self.engine.reasoner, self.sites.sampler
        if sampler.needs_spread and reasoner.latent_spread is not None:
            self.draw.spread_RD = reasoner.latent_spread(hidden_RD)
        return sampler.latent(reasoner.next_latent(hidden_RD), self.draw, step)

    def settle(self, first: int) -> None:
        """All latents are made; what would make those from `first` on, and the last one, is run before the answer."""
        self.step, self.state.used = self.plan.latents, first - (not self._own_last)
        self._pending_R1D = self.latents_RTD[:, first - 1 :]
        self._unsettled = range(first, self.plan.latents)

    def _run(self, embeddings_RSD: Tensor, forwards: list[Forward]) -> Tensor:
        """Append tokens to every suffix, those of several forward passes side by side; returns hidden states."""
        tokens = embeddings_RSD.shape[1]
        self.sites.about_to_run(self.draw, *forwards)
        hidden_RSD = backbone.run(self.lm.base_model, embeddings_RSD, self.state.positions(tokens), self.state)
        self.state.used += tokens
        return hidden_RSD
