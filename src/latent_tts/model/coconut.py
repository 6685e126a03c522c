"""COCONUT: the last hidden state is the next latent thought; T of them, then `<|end-latent|>` and the answer.

Source: Hao et al. 2024 (arXiv 2412.06769); checkpoint layout of ModalityDance/LatentTTS at 6657f20.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from latent_tts import checkpoint as files
from latent_tts.errors import UsageError, bad_value, is_whole
from latent_tts.types import Question, Reasoner

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class Coconut:
    """Adapter of COCONUT checkpoints on any causal LM of transformers.

    Attributes:
        name: what tables call the model.
        checkpoint: folder, `shipped:NAME` or hub id.
        latents: T, the number of latent thoughts.
        recommended: `sigma` and `rate` that suit it; the sampler configs take them as defaults.
        revision: commit or tag of a hub id.
        latent_rm: checkpoint of the LatentRM trained for it, if there is one: what `scorer` takes as its default.
    """

    name: str
    checkpoint: str
    latents: int
    recommended: Mapping[str, float]
    revision: str | None = None
    latent_rm: str | None = None

    stop_id = None  # T latents, whatever the model would rather write
    prompt_recipe = "{question}\\n<|start-latent|>"

    def __post_init__(self) -> None:
        if not (is_whole(self.latents) and self.latents >= 0):
            raise bad_value("model.latents", self.latents, "a number of latent thoughts, 0 or more")

    def check(self) -> None:
        """Read everything but the weights.

        Raises:
            UsageError: a file is missing or cut off, or the tokenizer lacks a latent token.
        """
        files.weight_files(self.folder)
        _ = self.start_id, self.thinking_end_ids, self.latent_id, self.eos_id, self.positions

    @cached_property
    def folder(self) -> Path:
        """The local checkpoint folder."""
        return files.resolve(self.checkpoint, self.revision)

    @cached_property
    def digest(self) -> str:
        """What identifies the weights, shape and tokenizer."""
        return files.digest(self.folder)

    @cached_property
    def config(self) -> dict:
        """The checkpoint's `config.json`."""
        return files.read_json(self.folder, "config.json")

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The fast tokenizer."""
        return files.load_tokenizer(self.folder)

    @cached_property
    def positions(self) -> int:
        """The longest sequence, in tokens and latents, that the backbone takes."""
        for key in ("n_positions", "max_position_embeddings"):
            if key in self.config:
                return int(self.config[key])
        raise bad_value("model.checkpoint", self.folder, "config.json has no n_positions or max_position_embeddings")

    @cached_property
    def latent_id(self) -> int:
        """Id of `<|latent|>`, the placeholder of a latent thought in written form."""
        return files.token_id(self.tokenizer, "<|latent|>", self.folder)

    @cached_property
    def start_id(self) -> int:
        """Id of `<|start-latent|>`, the last token of every prompt."""
        return files.token_id(self.tokenizer, "<|start-latent|>", self.folder)

    @cached_property
    def thinking_end_ids(self) -> list[int]:
        """The tokens forced after the last latent."""
        return [files.token_id(self.tokenizer, "<|end-latent|>", self.folder)]

    @cached_property
    def eos_id(self) -> int:
        """The token that ends an answer."""
        eos = self.config.get("eos_token_id")
        if not isinstance(eos, int):
            raise bad_value("model.checkpoint", self.folder, f"config.json has eos_token_id={eos}, not one id")
        return eos

    def encode(self, question: Question) -> list[int]:
        """Token ids of the prompt: the question, a newline, `<|start-latent|>`.

        Raises:
            UsageError: a word is not in a word-level vocabulary.
        """
        encoding = self.tokenizer.encode(question.text + "\n")
        unknown = self._unknown_id
        if unknown is not None and unknown in encoding.ids:
            start, end = encoding.offsets[encoding.ids.index(unknown)]
            raise UsageError(
                f"question {question.id}: the word {question.text[start:end]!r} is not in the vocabulary of "
                f"model={self.name}\na word-level model reads only the words of its own task; "
                "use a checkpoint with a subword tokenizer"
            )
        return [*encoding.ids, self.start_id]

    @cached_property
    def _unknown_id(self) -> int | None:
        return self.tokenizer.token_to_id("<|unknown|>")

    def answer_text(self, answer_ids: list[int]) -> str:
        """The text of answer ids, special tokens kept."""
        return self.tokenizer.decode(answer_ids, skip_special_tokens=False)

    def raw_answer(self, answer_text: str) -> str:
        """What stands after the last `#` of the answer text."""
        return answer_text.rpartition("#")[2].strip()

    def load(self, *, device: str, dtype: str) -> Reasoner:
        """Load the weights (imports torch)."""
        lm = files.load_causal_lm(self.folder, device=device, dtype=dtype)
        return Reasoner(lm=lm, next_latent=lambda hidden_RD: hidden_RD)
