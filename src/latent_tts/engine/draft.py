"""A draft head: one small layer that predicts h_2..h_T of a rollout from h_1 and the prompt's states."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from latent_tts.checkpoint.draft import DraftRecord

MAX_HEADS = 8


class DraftHead(nn.Module):
    """A transformer decoder layer over the latents to predict, which attends to h_1 and to the prompt.

    The layer predicts deviations from each latent's mean, in units of their spread.

    Attributes:
        mean_SD: means of the latents h_2..h_T (S = T - 1).
        scale: their standard deviation around these means.
    """

    mean_SD: Tensor
    scale: Tensor

    def __init__(self, latents: int, width: int) -> None:
        super().__init__()
        heads = next(heads for heads in range(MAX_HEADS, 0, -1) if width % heads == 0)
        self.place_SD = nn.Parameter(torch.randn(latents - 1, width) / width**0.5)
        self.first_norm, self.prompt_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.layer = nn.TransformerDecoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, width)
        self.register_buffer("mean_SD", torch.zeros(latents - 1, width))
        self.register_buffer("scale", torch.ones(()))

    def forward(self, first_RD: Tensor, prompt_RLD: Tensor, lengths_R: Tensor) -> Tensor:
        """Predict h_2..h_T (R, T-1, D), without the rollout's own noise.

        Args:
            first_RD: h_1.
            prompt_RLD: final hidden states of the prompt's tokens but the last one, padded on the right.
            lengths_R: how many there are, 0 or more.
        """
        first_R1D = self.first_norm(first_RD.float())[:, None]
        memory = torch.cat([first_R1D, self.prompt_norm(prompt_RLD.float())], 1)
        padding = torch.arange(memory.shape[1], device=lengths_R.device) > lengths_R[:, None]
        made = self.layer(first_R1D + self.place_SD, memory, memory_key_padding_mask=padding)
        return self.mean_SD + self.scale * self.out(self.norm(made))


def load_draft(path: Path, record: DraftRecord, device: torch.device) -> DraftHead:
    """Load a draft head, in float32."""
    head = DraftHead(record.latents, record.width)
    head.load_state_dict(load_file(path))
    return head.to(device).eval().requires_grad_(False)


def save_draft(head: DraftHead, path: Path, record: DraftRecord) -> None:
    """Write a draft head with the record of its reasoner."""
    save_file({name: tensor.contiguous() for name, tensor in head.state_dict().items()}, path, record.metadata)
