"""Random numbers of rollouts as torch tensors.

Every one is a function of (seed, question, rollout, stream, step, layer, element); batch composition, order, device and
restarts have no part in them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latent_tts import cpu
from latent_tts.philox import Stream, key_of, philox

DECISIONS_PER_BLOCK = 8  # a Philox block is 128 bits, a dropout decision 16
BLOCKS_AT_ONCE = {"cpu": 1 << 14, "cuda": 1 << 22}  # on a CPU work arrays of 128 KiB, which stay in a core's cache
BLOCKS_AHEAD = {"cpu": 1 << 20, "cuda": 1 << 23}  # decisions of several places drawn together: 8 and 64 MiB
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
        spread_RD: standard deviations that the model predicts for the latent in the making; set by the engine.
    """

    def __init__(self, keys_R2: Tensor, rollouts_R: Tensor, width: int, blocks: int = 0) -> None:
        self.keys_R2, self.rollouts_R, self.width, self.blocks = keys_R2, rollouts_R, width, blocks
        self.history_RTD: Tensor | None = None
        self.donor_RTD: Tensor | None = None
        self.spread_RD: Tensor | None = None
        self._layers: Sequence[int] = ()
        self._ahead: dict[tuple, Tensor] = {}

    @classmethod
    def of(cls, seed: int, question_ids: Sequence[str], rollouts_QN: Tensor, width: int, blocks: int = 0) -> Draw:
        """The draws of Q questions, N rollouts each, rows question-major, on the device of `rollouts_QN`."""
        keys = torch.tensor([key_of(seed, question_id) for question_id in question_ids], device=rollouts_QN.device)
        return cls(keys.repeat_interleave(rollouts_QN.shape[1], 0), rollouts_QN.flatten(), width, blocks)

    def rows(self, index_R: Tensor | slice) -> Draw:
        """The draws of some rows."""
        return Draw(self.keys_R2[index_R], self.rollouts_R[index_R], self.width, self.blocks)

    def normal(self, step: int, width: int) -> Tensor:
        """Standard normals (R, width) in float32, by Box-Muller in float64 so that devices agree."""
        element = torch.arange(-(-width // 4), device=self.rollouts_R.device)
        counter = (element, _place(0, step), self.rollouts_R[:, None], int(Stream.LATENT_NOISE))
        words = philox(counter, (self.keys_R2[:, :1], self.keys_R2[:, 1:]))
        uniform = (torch.cat(words, dim=-1).to(torch.float64) + 0.5) * 2.0**-32
        radius, angle = uniform.chunk(2, dim=-1)
        radius, angle = torch.sqrt(-2.0 * torch.log(radius)), angle * (2.0 * math.pi)
        return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=-1)[:, :width].to(torch.float32)

    def uniform(self, step: int) -> Tensor:
        """Uniform numbers (R) in [0, 1) in float64 with 52 random bits, one a row: what draws a token."""
        element = torch.zeros(1, dtype=torch.long, device=self.rollouts_R.device)
        counter = (element, _place(0, step), self.rollouts_R, int(Stream.TOKEN))
        high, low, _, _ = philox(counter, (self.keys_R2[:, 0], self.keys_R2[:, 1]))
        return (high << 20 | low >> 12).to(torch.float64) * 2.0**-52

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
        wanted = (layer, step, tokens, width, threshold)
        if wanted not in self._ahead:
            per_token = -(-width // DECISIONS_PER_BLOCK)
            group = max(1, BLOCKS_AHEAD[self.rollouts_R.device.type] // (self.rollouts_R.shape[0] * tokens * per_token))
            start = list(self._layers).index(layer) if layer in self._layers else None
            layers = [layer] if start is None else list(self._layers[start : start + group])
            kept = self._decide(layers, step, tokens, per_token, threshold)[..., :width]
            # beside what is there: a pass may ask for several steps at each place
            self._ahead |= {(code, *wanted[1:]): kept[:, i] for i, code in enumerate(layers)}
        return self._ahead.pop(wanted)

    def _decide(self, layers: Sequence[int], step: int, tokens: int, per_token: int, threshold: int) -> Tensor:
        """Keep decisions (R, len(layers), tokens, 8 * per_token) of several places.

        On a CPU machine code computes them where numba is installed, else NumPy: the same operators with a faster
        product and less overhead than torch's, over pieces that stay in a core's cache. Each of torch's threads takes
        a share of the pieces.
        """
        rollouts, device = self.rollouts_R.shape[0], self.rollouts_R.device
        kept = torch.empty(rollouts, len(layers), tokens, 2, 4 * per_token, dtype=torch.bool, device=device)
        place = _layer_words(tuple(layers), device) | _place(0, step)
        on_cpu = device.type == "cpu"
        if on_cpu and cpu.has_compiler():
            from latent_tts.philox_kernel import decide

            sizes = len(layers), tokens, per_token, int(Stream.DROPOUT), threshold
            keys_and_rollouts = self.keys_R2.contiguous(), self.rollouts_R.contiguous()
            cpu.run(decide, rollouts, *sizes, *keys_and_rollouts, place, kept)
            return kept.flatten(3)
        inputs = torch.arange(tokens * per_token, device=device), place[None, :, None], self.rollouts_R[:, None, None]
        element, places, rollout, keys, out = ((x.numpy() if on_cpu else x) for x in (*inputs, self.keys_R2, kept))
        word16: Any = np.int16 if on_cpu else torch.int16

        def fill(rows: slice) -> None:
            key = keys[rows, 0, None, None], keys[rows, 1, None, None]
            if on_cpu and all((word == word[0]).all() for word in key):  # plain integers are faster than arrays
                key = int(key[0][0, 0, 0]), int(key[1][0, 0, 0])
            words = philox((element, places, rollout[rows], int(Stream.DROPOUT)), key)
            for half in range(2):
                pair, upper = words[2 * half : 2 * half + 2]
                pair |= upper << 32
                out[rows, :, :, half] = pair.view(word16).reshape(out[rows, :, :, half].shape) >= threshold - 32768

        count = max(1, BLOCKS_AT_ONCE["cpu" if on_cpu else "cuda"] // (len(layers) * tokens * per_token))
        pieces = [slice(start, start + count) for start in range(0, rollouts, count)]
        if on_cpu and len(pieces) > 1 and torch.get_num_threads() > 1:
            list(_workers(torch.get_num_threads()).map(fill, pieces))
        else:
            for rows in pieces:
                fill(rows)
        return kept.flatten(3)


def _place(layer: int, step: int) -> int:
    """The word of the counter that says where in a rollout a number is used."""
    if step >= MAX_STEP or layer >= MAX_LAYER:
        raise ValueError(f"step {step} or layer {layer} does not fit its 16 bits of the counter")
    return (layer << 16) | step


@cache
def _layer_words(layers: tuple[int, ...], device: torch.device) -> Tensor:
    """Layers where `_place` has them; kept, since what a GPU gets from memory it waits for."""
    return torch.tensor([_place(layer, 0) for layer in layers], device=device)


@cache
def _workers(threads: int) -> ThreadPoolExecutor:
    """Threads that draw; NumPy frees the interpreter's lock while it computes."""
    return ThreadPoolExecutor(threads)
