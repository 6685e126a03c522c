"""Random numbers of rollouts as torch tensors.

Every one is a function of (seed, question, rollout, stream, step, layer, element); batch composition, order, device and
restarts have no part in them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from latent_tts.philox import Stream, key_of, philox

DECISIONS_PER_BLOCK = 8  # a Philox block is 128 bits, a dropout decision 16
BLOCKS_AT_ONCE = {"cpu": 1 << 16, "cuda": 1 << 22}  # on a CPU work arrays of half a MiB, which stay in its cache
MAX_STEP, MAX_LAYER = 1 << 16, 1 << 16


class Draw:
    """The random numbers of R rows.

    Attributes:
        keys_R2: Philox keys (int64) of the rows' (seed, question).
        rollouts_R: the rows' rollout numbers (int64).
        width: D of the model.
        blocks: number of the model's transformer blocks; only tells how far it pays to draw ahead.
        history_RTD: the latents so far of the rows, where a sampler looks back; set by the engine.
        donor_RTD: another question's latents, for the one sampler that needs them; set by the engine.
    """

    def __init__(self, keys_R2: Tensor, rollouts_R: Tensor, width: int, blocks: int = 0) -> None:
        self.keys_R2, self.rollouts_R, self.width, self.blocks = keys_R2, rollouts_R, width, blocks
        self.history_RTD: Tensor | None = None
        self.donor_RTD: Tensor | None = None
        self._layers: Sequence[int] = ()
        self._ahead: dict[tuple, Tensor] = {}

    @classmethod
    def of(cls, seed: int, question_ids: Sequence[str], rollouts_QN: Tensor, width: int, blocks: int = 0) -> Draw:
        """The draws of Q questions, N rollouts each, rows question-major, on the device of `rollouts_QN`."""
        keys = torch.tensor([key_of(seed, question_id) for question_id in question_ids], device=rollouts_QN.device)
        return cls(keys.repeat_interleave(rollouts_QN.shape[1], 0), rollouts_QN.flatten(), width, blocks)

    @property
    def _blocks_at_once(self) -> int:
        return BLOCKS_AT_ONCE.get(self.rollouts_R.device.type, BLOCKS_AT_ONCE["cpu"])

    def rows(self, index_R: Tensor) -> Draw:
        """The draws of some rows."""
        return Draw(self.keys_R2[index_R], self.rollouts_R[index_R], self.width, self.blocks)

    def _words(
        self, stream: Stream, layers: Sequence[int], step: int, blocks: int, rows: slice
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Four random words (len(layers), rows, blocks), int64 in [0, 2**32)."""
        if step >= MAX_STEP or max(layers) >= MAX_LAYER:
            raise ValueError(f"step {step} or layer {max(layers)} does not fit its 16 bits of the counter")
        device = self.rollouts_R.device
        element = torch.arange(blocks, device=device)
        place = torch.tensor([(layer << 16) | step for layer in layers], device=device)[:, None, None]
        rollout, key = self.rollouts_R[None, rows, None], self.keys_R2[rows].T[:, None, :, None]
        return philox((element, place, rollout, int(stream)), (key[0], key[1]))

    def normal(self, step: int, width: int) -> Tensor:
        """Standard normals (R, width) in float32, by Box-Muller in float64 so that devices agree."""
        words = self._words(Stream.LATENT_NOISE, [0], step, -(-width // 4), slice(None))
        uniform = (torch.cat(words, dim=-1)[0].to(torch.float64) + 0.5) * 2.0**-32
        radius, angle = uniform.chunk(2, dim=-1)
        radius, angle = torch.sqrt(-2.0 * torch.log(radius)), angle * (2.0 * math.pi)
        return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=-1)[:, :width].to(torch.float32)

    def will_mask(self, layers: Sequence[int]) -> None:
        """Say which layer codes a pass will ask `keep` for, in order, so that small ones are drawn together."""
        self._layers = layers

    def keep(self, layer: int, step: int, tokens: int, width: int, threshold: int) -> Tensor:
        """Keep decisions (R, tokens, width): True with probability 1 - threshold / 65536.

        Args:
            layer: code of the masked place.
            step: index of the pass, or 0 for all passes alike.
            tokens: S of the pass.
            width: D.
            threshold: how many of the 65536 patterns of a decision's 16 bits drop, in [0, 65536).
        """
        per_token = -(-width // DECISIONS_PER_BLOCK)
        wanted = (layer, step, tokens, width)
        if wanted not in self._ahead:
            rows = self.rollouts_R.shape[0]
            group = max(1, self._blocks_at_once // (rows * tokens * per_token))
            start = list(self._layers).index(layer) if layer in self._layers else None
            layers = [layer] if start is None else list(self._layers[start : start + group])
            halves = self._bits(layers, step, tokens, per_token)
            self._ahead = {(code, step, tokens, width): halves[i, ..., :width] for i, code in enumerate(layers)}
        return self._ahead.pop(wanted) >= threshold - 32768

    def _bits(self, layers: Sequence[int], step: int, tokens: int, blocks: int) -> Tensor:
        """Signed 16-bit words (len(layers), R, tokens, 8 * blocks), uniform over their range."""
        total = self.rollouts_R.shape[0]
        pairs = torch.empty(len(layers), total, tokens, 2, blocks, dtype=torch.int64, device=self.rollouts_R.device)
        rows = max(1, self._blocks_at_once // (len(layers) * tokens * blocks))
        for start in range(0, total, rows):
            part = pairs[:, start : start + rows]
            words = self._words(Stream.DROPOUT, layers, step, tokens * blocks, slice(start, start + rows))
            first, second, third, fourth = (word.view(*part.shape[:3], blocks) for word in words)
            torch.bitwise_or(first, second << 32, out=part[..., 0, :])
            torch.bitwise_or(third, fourth << 32, out=part[..., 1, :])
        return pairs.view(torch.int16).flatten(3)
