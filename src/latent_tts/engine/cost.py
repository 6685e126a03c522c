"""What a rollout costs in floating-point operations and bytes, from a model's config alone.

A multiply-add counts as two operations; norms, activations and softmax are left out, as is usual.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from latent_tts.checkpoint.files import common_sizes
from latent_tts.types import Int64

Count = Any  # a number, or an array with one per rollout


@dataclass(frozen=True)
class PassCost:
    """The operations that a part of a computation needs, and the bytes it must read or write."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Rates:
    """What a machine was measured to do: operations per second of matrix products, bytes per second of a copy."""

    flops: float
    bytes: float

    def floor_seconds(self, parts: Sequence[PassCost]) -> float:
        """The least seconds that any implementation takes: each part waits for its operations or for its bytes."""
        return sum(max(work.flops / self.flops, work.bytes / self.bytes) for work in parts)


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder-only transformer.

    Attributes:
        layers, width, vocabulary: number of blocks, hidden size, size of the vocabulary.
        attention: width of all query heads together.
        keys: width of all key heads together.
        block_weights: matrix entries of one block that a token goes through, the mean over blocks.
        block_item: bytes per entry of the blocks where they are quantised; None: as many as of other numbers.
    """

    layers: int
    width: int
    vocabulary: int
    attention: int
    keys: int
    block_weights: float
    block_item: int | None = None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Shape:
        """Read the sizes of GPT-2-like (`n_embd`) or Llama-like (`hidden_size`) configs.

        Without `block_weights` (`checkpoint.files.sizes`), blocks count as dense ones, as in GPT-2 or Llama.
        """
        if "n_embd" in config:
            width = int(config["n_embd"])
            inner = int(config.get("n_inner") or 4 * width)
            weights = config.get("block_weights", 4 * width * width + 2 * width * inner)
            return cls(int(config["n_layer"]), width, int(config["vocab_size"]), width, width, weights)
        config = common_sizes(config)
        width, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        head = int(config.get("head_dim") or width // heads)
        attention, keys = heads * head, int(config.get("num_key_value_heads") or heads) * head
        weights = config.get("block_weights")
        if weights is None:
            weights = width * (2 * attention + 2 * keys) + 3 * width * int(config["intermediate_size"])
        return cls(int(config["num_hidden_layers"]), width, int(config["vocab_size"]), attention, keys, weights)

    def pass_flops(self, tokens: Count, context: Count = 0) -> Count:
        """Operations of the blocks for `tokens` new tokens after `context` earlier ones (causal)."""
        attended = tokens * context + tokens * (tokens + 1) / 2
        return self.layers * (2.0 * tokens * self.block_weights + 4.0 * attended * self.attention)

    def head_flops(self, tokens: Count) -> Count:
        """Operations of the LM head at `tokens` positions."""
        return 2.0 * self.width * self.vocabulary * tokens

    def scoring_flops(self, prompt: Count, latents: Count) -> Count:
        """Operations of scoring one rollout, without the shared prefill: its latents, and one output at each."""
        return self.pass_flops(latents, prompt) + 2.0 * self.width * latents

    def cache_bytes(self, tokens: int, item: int) -> int:
        """Bytes of the keys and values of `tokens` tokens at `item` bytes per number."""
        return 2 * self.layers * self.keys * tokens * item

    def weight_bytes(self, item: int) -> int:
        """Bytes of the matrices."""
        return self.block_bytes(item) + self.head_bytes(item)

    def block_bytes(self, item: int) -> int:
        """Bytes of the blocks' matrices."""
        return int(self.layers * self.block_weights * (self.block_item or item))

    def head_bytes(self, item: int) -> int:
        """Bytes of the LM head's matrix."""
        return self.width * self.vocabulary * item

    def prefill_cost(self, prompts_Q: Sequence[int], copies: int, item: int) -> PassCost:
        """Cost of running prompts in one pass, each `copies` times: weights are read once, keys and values written."""
        written = self.cache_bytes(sum(prompts_Q), item)
        return PassCost(copies * sum(map(self.pass_flops, prompts_Q)), self.block_bytes(item) + copies * written)

    def scoring_cost(self, prompts_Q: Sequence[int], steps_R: Int64, item: int) -> list[PassCost]:
        """Cost of scoring: the prompts, then the latents of all rows (question-major) in one pass."""
        prompts_R = np.repeat(prompts_Q, len(steps_R) // len(prompts_Q))
        read = self.block_bytes(item) + self.cache_bytes(sum(prompts_Q) + int(steps_R.sum()), item)
        flops = float(self.scoring_flops(prompts_R, steps_R).sum())
        return [self.prefill_cost(prompts_Q, 1, item), PassCost(flops, read)]


@dataclass(frozen=True)
class RolloutCost:
    """The passes of a run's rollouts, and what they cost.

    Attributes:
        shape: of the model.
        latents: T; the maximum where rows stop by a token.
        forced: end-of-thinking tokens and the like, fed with the last latent in one pass.
        own_prompt: whether the prompt runs once per rollout.
        own_last: whether only the last prompt token runs once per rollout: its pass makes h_1, and is random where
            thoughts are.
        repeated: the passes that a schedule repeats: each has (latents, latents before them).
        looks_for_stop: whether rows may stop early: the LM head runs before every latent, and once more in a row that
            stops before `latents`.
        exit_tokens: tokens run beside each latent but the last, to see whether it moves the answer; None: no check.
        latent_weights: matrix entries between a hidden state and the latent that is made of it.
    """

    shape: Shape
    latents: int
    forced: int
    own_prompt: bool = False
    own_last: bool = False
    repeated: Sequence[tuple[int, int]] = ()
    looks_for_stop: bool = False
    exit_tokens: int | None = None
    latent_weights: int = 0

    @classmethod
    def of(
        cls,
        shape: Shape,
        latents: int,
        forced: int,
        random_phases: Collection[str],
        repeated: Sequence[tuple[int, int]],
        looks_for_stop: bool,
        exit_tokens: int | None = None,
        latent_weights: int = 0,
    ) -> RolloutCost:
        """The cost of rollouts that are random in some phases."""
        own_prompt = "prompt" in random_phases
        own_last = latents > 0 and "thoughts" in random_phases and not own_prompt
        return cls(shape, latents, forced, own_prompt, own_last, repeated, looks_for_stop, exit_tokens, latent_weights)

    def shared_flops(self, prompt: int) -> float:
        """Operations that a question's rollouts share.

        Args:
            prompt: L.
        """
        return 0.0 if self.own_prompt else self.shape.pass_flops(prompt - self.own_last)

    def thinking_flops(self, prompt: Count, steps: Count) -> Count:
        """Operations of one rollout without an answer, and without the shared ones.

        Its last latent is computed but not fed back.

        Args:
            prompt: L.
            steps: its latents.
        """
        return self.shape.pass_flops(np.maximum(steps - 1, 0), prompt) + self._other_flops(prompt, steps)

    def rollout_flops(self, prompt: Count, steps: Count, answer: Count) -> Count:
        """Operations of one rollout with its answer, without the shared ones.

        Args:
            prompt: L.
            steps: its latents.
            answer: answer tokens that were chosen, without the final eos, which is chosen too.
        """
        suffix = self.shape.pass_flops(steps + self.forced + answer, prompt)
        return suffix + self.shape.head_flops(answer + 1) + self._other_flops(prompt, steps)

    def guess_flops(self, prompt: int) -> float:
        """Operations of the rollout whose latents are the guesses of others: its prompt, then all T one by one."""
        checks = self.shape.head_flops(self.latents * self.looks_for_stop)
        made = self.shape.pass_flops(self.latents - 1, prompt) + self.making_flops(self.latents)
        return self.shape.pass_flops(prompt) + made + checks

    def making_flops(self, latents: Count) -> Count:
        """Operations between hidden states and the latents that are made of them."""
        return 2.0 * self.latent_weights * latents

    def again_flops(self, prompt: Count, latents: Count) -> Count:
        """Operations of a latent that is computed once more after `latents` others."""
        return self.shape.pass_flops(1, prompt + latents) + self.making_flops(1)

    def stop_checks(self, steps: Count) -> Count:
        """How often the LM head runs to see whether a rollout stops thinking."""
        return np.minimum(steps + 1, self.latents) * self.looks_for_stop + self._exit_checks(steps)

    def _exit_checks(self, steps: Count) -> Count:
        """How often a rollout checks whether its answer still moves."""
        return np.minimum(steps, self.latents - 1) * (self.exit_tokens is not None)

    def _other_flops(self, prompt: Count, steps: Count) -> Count:
        """Operations beside the suffix: own prompt or last prompt token, latents, repeated sweeps, stop checks."""
        shape = self.shape
        own = shape.pass_flops(prompt) if self.own_prompt else shape.pass_flops(self.own_last, prompt - self.own_last)
        checks = self._exit_checks(steps)  # at contexts of prompt + 1, prompt + 2, ... latents, so at their mean
        checking = checks * shape.pass_flops(self.exit_tokens or 0, prompt + (checks + 1) / 2)
        made = self.making_flops(steps + sum(tokens for tokens, _ in self.repeated))
        repeated = sum(shape.pass_flops(tokens, prompt + before) for tokens, before in self.repeated)
        return own + made + repeated + checking + shape.head_flops(self.stop_checks(steps))


def batch_costs(
    passes: RolloutCost, item: int, prompts_Q: Int64, steps_R: Int64, answers_R: Int64 | None
) -> list[PassCost]:
    """The costs of prefill, thoughts and answers of rollouts that are drawn together.

    In each, every pass reads the weights once for all rows. A pass reads a prompt's keys and values once per question
    (once per row if each row has its own), and those of the suffix once per row. Activations, embeddings and logits are
    left out: they can stay in a cache.

    Args:
        passes: the passes of each rollout.
        item: bytes per number.
        prompts_Q: L of each of Q questions.
        steps_R: latents of each of R = Q*N rows, question-major.
        answers_R: answer tokens of each row without the final eos, which is chosen too; None: no answer is decoded.
    """
    shape, own, own_prompt = passes.shape, passes.own_last, passes.own_prompt
    rollouts, per_token = len(steps_R) // len(prompts_Q), shape.cache_bytes(1, item)
    prompts_R = prompts_Q.repeat(rollouts)
    prefill = shape.prefill_cost((prompts_Q - own).tolist(), rollouts if own_prompt else 1, item)

    thinking_R = passes.thinking_flops(prompts_R, steps_R)
    fed_R = np.maximum(steps_R - 1, 0) + own
    suffixes = (fed_R * (fed_R + 1) / 2).sum()
    suffixes += len(fed_R) * sum(before + tokens + own for tokens, before in passes.repeated)
    prefix = ((prompts_R if own_prompt else prompts_Q) - own).sum()  # as one pass reads it
    read = (int(fed_R.max()) + len(passes.repeated)) * (shape.block_bytes(item) + per_token * float(prefix))
    heads = int(passes.stop_checks(steps_R).max()) * shape.head_bytes(item)
    flops_R = thinking_R - own_prompt * shape.pass_flops(prompts_R)
    thoughts = PassCost(float(flops_R.sum()), read + per_token * float(suffixes) + heads)
    if answers_R is None:
        return [prefill, thoughts]

    first_R = own + steps_R + passes.forced
    suffixes = ((2 * first_R + answers_R) * (answers_R + 1) / 2).sum()
    prefixes = ((answers_R + 1) * prompts_R).sum()
    if not own_prompt:  # read until the last of its rollouts ends
        prefixes = ((answers_R.reshape(-1, rollouts).max(1) + 1) * (prompts_Q - own)).sum()
    weights = (int(answers_R.max()) + 1) * shape.weight_bytes(item)
    flops_R = passes.rollout_flops(prompts_R, steps_R, answers_R) - thinking_R
    return [prefill, thoughts, PassCost(float(flops_R.sum()), weights + per_token * float(prefixes + suffixes))]
