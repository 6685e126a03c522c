"""What a rollout costs in floating-point operations and bytes, from a model's config alone.

A multiply-add counts as two operations; norms, activations and softmax are left out, as is usual.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder-only transformer.

    Attributes:
        layers, width, vocabulary: as named.
        attention: width of all query heads together.
        keys: width of all key heads together.
        block_weights: matrix entries of one block.
    """

    layers: int
    width: int
    vocabulary: int
    attention: int
    keys: int
    block_weights: int

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Shape:
        """Read the sizes of GPT-2-like (`n_embd`) or Llama-like (`hidden_size`) configs."""
        if "n_embd" in config:
            width = int(config["n_embd"])
            inner = int(config.get("n_inner") or 4 * width)
            weights = 4 * width * width + 2 * width * inner
            return cls(int(config["n_layer"]), width, int(config["vocab_size"]), width, width, weights)
        width, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        head = int(config.get("head_dim") or width // heads)
        attention, keys = heads * head, int(config.get("num_key_value_heads") or heads) * head
        weights = width * (2 * attention + 2 * keys) + 3 * width * int(config["intermediate_size"])
        return cls(int(config["num_hidden_layers"]), width, int(config["vocab_size"]), attention, keys, weights)

    def pass_flops(self, tokens: float, context: float) -> float:
        """Operations of the blocks for `tokens` new tokens after `context` earlier ones (causal)."""
        attended = tokens * context + tokens * (tokens + 1) / 2
        return self.layers * (2.0 * tokens * self.block_weights + 4.0 * attended * self.attention)

    def prompt_flops(self, prompt: int) -> float:
        """Operations of one prefill."""
        return self.pass_flops(prompt, 0)

    def rollout_flops(self, prompt: int, latents: float, forced: int, answer: float, own_prompt: bool) -> float:
        """Operations of one rollout beyond the shared prefill.

        Args:
            prompt: L.
            latents: T.
            forced: end-of-thinking tokens.
            answer: answer tokens, without the final eos.
            own_prompt: whether the prompt runs once a rollout.
        """
        suffix = latents + forced + answer
        head = self.head_flops(answer + 1)
        return self.pass_flops(suffix, prompt) + head + (self.prompt_flops(prompt) if own_prompt else 0.0)

    def repeated_flops(self, prompt: int, passes: list[tuple[int, int]]) -> float:
        """Operations of what a schedule runs again: (latents, latents before them) of each pass."""
        return sum(self.pass_flops(tokens, prompt + before) for tokens, before in passes)

    def head_flops(self, tokens: float) -> float:
        """Operations of the LM head at `tokens` positions."""
        return 2.0 * self.width * self.vocabulary * tokens

    def thinking_flops(self, prompt: int, latents: float, own_prompt: bool) -> float:
        """The same for a rollout that ends with its last latent, which is made but not run."""
        return self.pass_flops(max(latents - 1, 0), prompt) + (self.prompt_flops(prompt) if own_prompt else 0.0)

    def scoring_flops(self, prompt: int, latents: float) -> float:
        """Operations of scoring one rollout beyond the shared prefill: the latents, and one output at each."""
        return self.pass_flops(latents, prompt) + 2.0 * self.width * latents

    def cache_bytes(self, tokens: int, item: int) -> int:
        """Bytes of the keys and values of `tokens` tokens at `item` bytes a number."""
        return 2 * self.layers * self.keys * tokens * item

    def weight_bytes(self, item: int) -> int:
        """Bytes of the matrices."""
        return (self.layers * self.block_weights + self.width * self.vocabulary) * item
