"""Random numbers of rollouts as torch tensors.

Every number is a function of (seed, question, rollout, stream, step, layer, element). It does not depend on the batch,
the order, the device or restarts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from latent_tts.random import bits
from latent_tts.random.philox import Stream, key_of

DECISIONS_PER_BLOCK = 8  # a Philox block is 128 bits, a dropout decision 16
BLOCKS_AHEAD = {"cpu": 1 << 20, "cuda": 1 << 23}  # blocks drawn together for several places: 8 and 64 MiB of decisions
NORMALS_AHEAD = 1 << 16  # drawn together for several steps; a few rows then wait for one draw, not for one per step
MAX_STEP, MAX_LAYER = 1 << 16, 1 << 16


@dataclass(frozen=True)
class DropPlace:
    """Where dropout is and how often; see `Draw.keep`."""

    layer: int
    step: int
    tokens: int
    threshold: int


class Draw:
    """The random numbers of R rows.

    Attributes:
        keys_R2: Philox keys (int64) of the rows' (seed, question).
        rollouts_R: the rows' rollout numbers (int64).
        width: D of the model.
        blocks: number of transformer blocks of the model; only used to decide how far to draw ahead.
        history_RTD: the latents of the rows so far, for samplers that read them; set by the engine.
        donor_RTD: the latents of another question, for samplers with `needs_donor`; set by the engine.
        spread_RD: standard deviations that the model predicts for the current latent; set by the engine.
        steps: how many steps will ask for normals, so that few rows draw them together, once; set by the engine.
    """

    def __init__(self, keys_R2: Tensor, rollouts_R: Tensor, width: int, blocks: int = 0) -> None:
        self.keys_R2, self.rollouts_R, self.width, self.blocks = keys_R2, rollouts_R, width, blocks
        self.history_RTD: Tensor | None = None
        self.donor_RTD: Tensor | None = None
        self.spread_RD: Tensor | None = None
        self.steps = 0
        self._normals: dict[int, Sequence[Tensor]] = {}  # of all steps, by width
        self._ahead: dict[tuple, Tensor] = {}

    @classmethod
    def of(cls, seed: int, question_ids: Sequence[str], rollouts_QN: Tensor, width: int, blocks: int = 0) -> Draw:
        """The random numbers of Q questions with N rollouts each, question-major, on the device of `rollouts_QN`."""
        keys = torch.tensor([key_of(seed, question_id) for question_id in question_ids], device=rollouts_QN.device)
        return cls(keys.repeat_interleave(rollouts_QN.shape[1], 0), rollouts_QN.flatten(), width, blocks)

    def rows(self, index_R: Tensor | slice) -> Draw:
        """The random numbers of some of the rows."""
        return Draw(self.keys_R2[index_R], self.rollouts_R[index_R], self.width, self.blocks)

    def normal(self, step: int, width: int) -> Tensor:
        """Standard normals (R, width) in float32, by Box-Muller in float64, so that devices agree."""
        if step >= self.steps or self.steps * self.rollouts_R.shape[0] * width > NORMALS_AHEAD:
            return self._draw(range(step, step + 1), width)[0]
        if width not in self._normals:
            self._normals[width] = self._draw(range(self.steps), width)
        return self._normals[width][step]

    def _draw(self, steps: range, width: int) -> Sequence[Tensor]:
        """Normals (R, width) of each step."""
        places, stream = [_place(0, step) for step in steps], int(Stream.LATENT_NOISE)
        words = bits.words(self.keys_R2, self.rollouts_R, -(-width // 4), places, stream)
        uniform = (words.flatten(1).to(torch.float64) + 0.5) * 2.0**-32
        radius, angle = uniform.chunk(2, dim=-1)
        radius, angle = torch.sqrt(-2.0 * torch.log(radius)), angle * (2.0 * math.pi)
        normal = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=-1)[:, :width].to(torch.float32)
        return normal.chunk(len(steps))

    def uniform(self, step: int) -> Tensor:
        """Uniform numbers (R) in [0, 1), in float64 with 52 random bits, to draw one token per row."""
        words = bits.words(self.keys_R2, self.rollouts_R, 1, [_place(0, step)], int(Stream.TOKEN))
        high, low, _, _ = words.squeeze(-1).unbind(1)
        return (high << 20 | low >> 12).to(torch.float64) * 2.0**-52

    def keep(
        self, layer: int, step: int, tokens: int, width: int, threshold: int, *, expected: Sequence[int] = ()
    ) -> Tensor:
        """Keep decisions (R, tokens, width): True with probability 1 - threshold / 65536.

        Args:
            layer: code of the masked place.
            step: index of the pass; 0 if all passes share one mask.
            tokens: S of the pass.
            width: D.
            threshold: how many of the 65536 values of 16 random bits mean "drop", in [0, 65536).
            expected: all layer codes that the pass will ask for, in order, so that small draws can be joined.
        """
        wanted = (layer, step, tokens, width, threshold)
        if wanted not in self._ahead:
            rows, device, blocks = len(self.rollouts_R), self.rollouts_R.device, -(-width // DECISIONS_PER_BLOCK)
            group = max(1, BLOCKS_AHEAD[device.type] // (rows * tokens * blocks))
            start = expected.index(layer) if layer in expected else None
            layers = (layer,) if start is None else tuple(expected[start : start + group])
            kept = torch.empty(rows, len(layers), tokens, 2, 4 * blocks, dtype=torch.bool, device=device)
            places = _layer_words(layers, device) | _place(0, step)
            bits.decide(self.keys_R2, self.rollouts_R, places, int(Stream.DROPOUT), threshold, kept)
            # added to what is left, since a pass may ask for several steps at each place
            self._ahead |= {(code, *wanted[1:]): kept[:, i].flatten(2)[..., :width] for i, code in enumerate(layers)}
        return self._ahead.pop(wanted)

    def drops(self, output_RSD: Tensor) -> bool:
        """Whether `drop` takes this tensor: a GPU draws its decisions in one kernel with the product."""
        return output_RSD.dtype.itemsize <= 4 and bits.has_kernels(output_RSD.device)

    def drop(self, output_RSD: Tensor, place: DropPlace, first: int = 0) -> Tensor:
        """A tensor of tokens `first`, `first` + 1, ... times the factors of a place."""
        from latent_tts.random import triton_kernels

        word, one_mask = _place(place.layer, place.step), place.tokens == 1
        arguments = output_RSD, self.keys_R2, self.rollouts_R, word, int(Stream.DROPOUT), place.threshold
        return triton_kernels.drop(*arguments, None if one_mask else first)


def _place(layer: int, step: int) -> int:
    """The counter word for the place in a rollout where a number is used."""
    if step >= MAX_STEP or layer >= MAX_LAYER:
        raise ValueError(f"step {step} or layer {layer} does not fit its 16 bits of the counter")
    return (layer << 16) | step


@cache
def _layer_words(layers: tuple[int, ...], device: torch.device) -> Tensor:
    """The layers' bits of `_place`; cached, because a copy to a GPU makes it wait."""
    return torch.tensor([_place(layer, 0) for layer in layers], device=device)
