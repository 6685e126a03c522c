"""How much each latent depends on those before it: directional derivatives of the model's own forward pass.

A latent is h_t = F_t(h_1..h_(t-1)). Derivatives are of F at a rollout's latents, by forward-mode differentiation
through a plain forward pass (eager attention, no cache), in random directions.

Source: the growth of perturbations as a limit of parallel evaluation: Gonzalez et al. 2025 (arXiv 2508.16817).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from latent_tts.types import Reasoner


@dataclass(frozen=True)
class Dependencies:
    """How the latents of a rollout depend on each other.

    Attributes:
        relative_TT: row t, column s: the relative change of h_t per relative change of h_s, with the latents in between
            held fixed; the root mean square over directions. Zero for s >= t.
        growth: by how much the logarithm of a relative perturbation of h_1 grows per latent, the mean over directions.
            Above 0 it grows. NaN for fewer than two latents.
    """

    relative_TT: Tensor
    growth: float

    def critical_path(self, threshold: float) -> list[int]:
        """The latents of the longest chain in which each depends on the one before by at least `threshold`."""
        chains: list[list[int]] = []
        for latent, row in enumerate((self.relative_TT >= threshold).tolist()):
            before = [chain for chain, depends in zip(chains, row, strict=False) if depends]
            chains.append([*max(before, key=len, default=[]), latent])
        return max(chains, key=len, default=[])


class PlainRecurrence:
    """F of one question: every latent from those before it, as the model itself computes them."""

    def __init__(self, reasoner: Reasoner, prompt: list[int]) -> None:
        """Create it from a model with eager attention and the token ids of a prompt."""
        self.reasoner = reasoner
        self.prompt_LD = reasoner.lm.get_input_embeddings()(torch.tensor(prompt, device=reasoner.lm.device)).detach()

    def __call__(self, latents_BTD: Tensor) -> Tensor:
        """Latents (B, T, D), each made from those before it."""
        prompt_BLD = self.prompt_LD.expand(len(latents_BTD), -1, -1)
        inputs = torch.cat([prompt_BLD, latents_BTD[:, :-1]], 1)
        hidden = self.reasoner.lm.base_model(inputs_embeds=inputs, use_cache=False).last_hidden_state
        return self.reasoner.next_latent(hidden[:, len(self.prompt_LD) - 1 :])

    def push(self, latents_TD: Tensor, tangents_BTD: Tensor) -> Tensor:
        """Directional derivatives (B, T, D) at some latents."""
        at_BTD = latents_TD.repeat(len(tangents_BTD), 1, 1)
        with warnings.catch_warnings():  # torch's first use of it scripts functions of its own
            warnings.filterwarnings("ignore", "`torch.jit.script", DeprecationWarning)
            return torch.func.jvp(self, (at_BTD,), (tangents_BTD,))[1]


def find_dependencies(recurrence: PlainRecurrence, latents_TD: Tensor, directions: int) -> Dependencies:
    """The dependencies of a rollout's latents.

    Args:
        recurrence: of its question.
        latents_TD: its latents.
        directions: random directions per latent; every call takes the same ones.
    """
    total, width = latents_TD.shape
    size_T = latents_TD.norm(dim=-1)
    generator = torch.Generator().manual_seed(0)
    unit_MTD = torch.nn.functional.normalize(torch.randn(directions, total, width, generator=generator), dim=-1)
    whole_MTD = unit_MTD.to(latents_TD) * size_T[:, None]
    alone = torch.eye(total, device=latents_TD.device, dtype=latents_TD.dtype)
    tangents = (alone[:, None, :, None] * whole_MTD).flatten(0, 1)  # (T * M, T, D), each of one latent alone
    pushed = recurrence.push(latents_TD, tangents).unflatten(0, (total, directions))
    relative_TT = (pushed.norm(dim=-1) / size_T).square().mean(1).sqrt().T
    if total < 2:
        return Dependencies(relative_TT, float("nan"))
    start_MTD = whole_MTD * alone[0, :, None]
    passed_MTD = start_MTD
    for _ in range(total - 1):  # then each latent has the changes of all before it
        passed_MTD = start_MTD + recurrence.push(latents_TD, passed_MTD)
    end_M = passed_MTD[:, -1].norm(dim=-1) / size_T[-1]
    return Dependencies(relative_TT, float(end_M.log().mean()) / (total - 1))
