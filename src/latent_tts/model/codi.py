"""CODI: a projection of the last hidden state is the next latent. `<|end-latent|>` and the answer follow T latents.

Source: Shen et al. 2025 (arXiv 2502.21074); checkpoint layout, prompt and answer rule of ModalityDance/LatentTTS at
6657f20. `ltts convert` converts the original files (zen-E) and those of SIM-CoT.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from latent_tts.checkpoint.adapter import CheckpointAdapter
from latent_tts.text.number import without_commas
from latent_tts.types import Reasoner

PROJECTOR = "projector."


class Codi(CheckpointAdapter):
    """Adapter of CODI checkpoints on any causal LM of transformers."""

    family = "CODI"

    def check_tensors(self, shapes: Mapping[str, list[int]]) -> None:
        """Check that the projector is complete and has the width of the backbone.

        Raises:
            UsageError: a tensor is missing, or has another shape.
        """
        hidden = shapes.get(f"{PROJECTOR}1.bias", [0])[0]
        wanted = {"1.weight": [hidden, self.width], "1.bias": [hidden], "3.weight": [self.width, hidden]}
        wanted |= {name: [self.width] for name in ("3.bias", "4.weight", "4.bias")}
        self.require_tensors("projector", PROJECTOR, wanted, shapes)

    def answer_span(self, answer_text: str) -> str:
        """The text after the last `answer is` (and a colon), or the whole text."""
        return re.split(r"answer is\s*:?", answer_text, flags=re.IGNORECASE)[-1].strip()

    def decimal_answer(self, answer_text: str) -> str | None:
        """The last number in the text, after removing commas: an optional minus, digits, an optional point and digits.

        As in the official evaluation, `5-2=3` gives `3` and `x-3` gives `-3`.
        """
        numbers = re.findall(r"-?\d+\.?\d*", without_commas(answer_text))
        return numbers[-1] if numbers else None

    def load(self, *, device: str, dtype: str) -> Reasoner:
        """Load the weights (imports torch)."""
        from latent_tts.checkpoint import loading
        from latent_tts.checkpoint.modules import codi_projector

        lm, tensors = super().load(device=device, dtype=dtype).lm, loading.load_tensors(self.folder, PROJECTOR)
        projector = codi_projector(self.width, tensors["1.bias"].shape[0])
        return Reasoner(lm=lm, next_latent=loading.fill_module(projector, tensors, lm))
