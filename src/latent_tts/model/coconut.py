"""COCONUT: the last hidden state is the next latent. T latents are followed by `<|end-latent|>` and the answer.

Source: Hao et al. 2024 (arXiv 2412.06769); checkpoint layout of ModalityDance/LatentTTS at 6657f20.
"""

from __future__ import annotations

from latent_tts.checkpoint.adapter import CheckpointAdapter


class Coconut(CheckpointAdapter):
    """Adapter of COCONUT checkpoints on any causal LM of transformers."""

    family = "COCONUT"
    question_end = "\n"
