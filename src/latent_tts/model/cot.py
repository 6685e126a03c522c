"""Explicit chain of thought, the baseline of every latent reasoner: no latents, the steps are written as tokens.

The prompt is the question and a newline. Everything after it (one step per line, then `### answer`) is decoded as
answer tokens, so `answer.temperature` samples whole chains, and costs include all written tokens.

Source: the `cot` mode of facebookresearch/coconut (`dataset.py`), with its format.
"""

from __future__ import annotations

from functools import cached_property

from latent_tts.checkpoint.adapter import CheckpointAdapter
from latent_tts.errors import UsageError, bad_value
from latent_tts.types import Question, Reasoner


class Cot(CheckpointAdapter):
    """Adapter of any causal LM of transformers that writes its steps and then `### answer`. `latents` is 0."""

    family = "COCONUT"  # the same files: a plain causal LM and its tokenizer
    question_end = "\n"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.latents != 0:
            raise bad_value("model.latents", self.latents, "must be 0: an explicit chain of thought has no latents")

    @property
    def prompt_recipe(self) -> str:
        """A text that identifies how prompts are made."""
        return "{question}\\n"

    def check_tokens(self) -> None:
        """Check nothing: prompts contain no special tokens."""

    @cached_property
    def thinking_end_ids(self) -> list[int]:
        """Empty: the first written token follows the prompt."""
        return []

    def encode(self, question: Question) -> list[int]:
        """Token ids of the question and a newline.

        Raises:
            UsageError: a word is not in a word-level vocabulary, or the text has no tokens.
        """
        ids = self.text_ids(question)
        if not ids:
            raise UsageError(f"question {question.id}: its text has no tokens in the vocabulary of model={self.name}")
        return ids

    def answer_span(self, answer_text: str) -> str | None:
        """The text after the last `#`; None if the chain contains no `#`."""
        _, sign, answer = answer_text.rpartition("#")
        return answer.strip() if sign else None

    def load(self, *, device: str, dtype: str) -> Reasoner:
        """Load the weights (imports torch)."""
        from latent_tts.checkpoint import loading

        lm = loading.load_causal_lm(self.folder, device=device, dtype=dtype)
        return Reasoner(lm=lm, next_latent=lambda hidden_RD: hidden_RD)
