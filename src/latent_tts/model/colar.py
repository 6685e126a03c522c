"""CoLaR: a small head on the last hidden state gives the next latent; the model ends its thinking itself, with `###`.

Source: Tan et al. 2025 (arXiv 2505.16552); checkpoint layout, prompt and answer rule of ModalityDance/LatentTTS at
6657f20, which leaves out the learned standard deviation of the original. `sampler=native` works with checkpoints that
still have it (`lt_head.log_std` beside `lt_head.mean`, as in the original code).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from latent_tts.checkpoint import files
from latent_tts.checkpoint.adapter import CheckpointAdapter
from latent_tts.errors import check_fields, is_number, require
from latent_tts.text.number import without_commas
from latent_tts.types import Question, Reasoner

if TYPE_CHECKING:
    from torch import Tensor

HEAD = "lt_head."
PROMPT = "Question: {question} Let's think step by step:(Thinking speed: {speed})###"


@dataclass(frozen=True)
class Colar(CheckpointAdapter):
    """Adapter of CoLaR checkpoints. `latents` is the maximum number of latents; `###` may end thinking before.

    Attributes:
        thinking_speed: compression factor that the prompt asks for: tokens of written reasoning per latent, 1 or more.
            The published model was trained with 1 to 5.
    """

    thinking_speed: int = 2

    family = "CoLaR"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields("model", self, thinking_speed="a positive integer")

    @property
    def prompt_recipe(self) -> str:
        """A text that identifies how prompts are made."""
        return PROMPT.format(question="{question}", speed=self.thinking_speed)

    @cached_property
    def thinking_end_ids(self) -> list[int]:
        """`###`, the most probable token after the last latent, or forced."""
        return [files.token_id(self.tokenizer, "###", self.folder)]

    @property
    def stop_id(self) -> int:
        """`###`: a row ends its thinking when it is the most probable token."""
        return self.thinking_end_ids[0]

    @cached_property
    def latent_std(self) -> float:
        """The standard deviation of the backbone's token embeddings, by which the head's output is multiplied."""
        std: Any = self.config.get("latent_embedding_std")
        require(
            "model.checkpoint",
            self.folder,
            is_number(std) and std > 0,
            f"config.json has latent_embedding_std={std}; it must be a positive number",
        )
        return float(std)

    def check_tokens(self) -> None:
        """Check nothing: the only token needed is `###`, since latents have no placeholder."""

    @cached_property
    def has_spread(self) -> bool:  # type: ignore[override]
        """Whether the latent head has a `log_std` beside its `mean`."""
        return f"{HEAD}log_std.weight" in files.weight_shapes(self.folder)

    def check_tensors(self, shapes: Mapping[str, list[int]]) -> None:
        """Check that the latent head is complete and has the width of the backbone.

        Raises:
            UsageError: a tensor is missing or has another shape, or the config lacks `latent_embedding_std`.
        """
        _ = self.latent_std
        hidden = shapes.get(f"{HEAD}fc.0.bias", [0])[0]
        inner = {name: [hidden] for name in ("fc.0.bias", "fc.2.bias", "fc.3.weight", "fc.3.bias")}
        wanted = {"fc.0.weight": [hidden, self.width], "fc.2.weight": [hidden, hidden], **inner}
        for layer in ("mean", "log_std") if self.has_spread else ("mean",):
            wanted |= {f"{layer}.weight": [self.width, hidden], f"{layer}.bias": [self.width]}
        self.require_tensors("latent head", HEAD, wanted, shapes)

    def encode(self, question: Question) -> list[int]:
        """Token ids of the prompt, without a beginning-of-text token."""
        text = PROMPT.format(question=question.text, speed=self.thinking_speed)
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def answer_span(self, answer_text: str) -> str:
        """The text after the last `Answer:`, without `#` at its ends."""
        return answer_text.rpartition("Answer:")[2].strip("# \n")

    def decimal_answer(self, answer_text: str) -> str:
        """The text of `answer_span`, without commas.

        The official rule keeps commas and cannot read `1,234`; here they are removed on purpose, as for CODI.
        """
        return self.answer_span(without_commas(answer_text))

    def load(self, *, device: str, dtype: str) -> Reasoner:
        """Load the weights (imports torch)."""
        from latent_tts.checkpoint import loading
        from latent_tts.checkpoint.modules import colar_head

        lm, tensors = super().load(device=device, dtype=dtype).lm, loading.load_tensors(self.folder, HEAD)
        head = colar_head(self.width, tensors["fc.0.bias"].shape[0], spread=self.has_spread)
        head = loading.fill_module(head, tensors, lm)

        def next_latent(hidden_RD: Tensor) -> Tensor:
            return head["mean"](head["fc"](hidden_RD)) * self.latent_std

        def latent_spread(hidden_RD: Tensor) -> Tensor:
            return head["log_std"](head["fc"](hidden_RD)).float().exp() * self.latent_std

        return Reasoner(lm=lm, next_latent=next_latent, latent_spread=latent_spread if self.has_spread else None)
