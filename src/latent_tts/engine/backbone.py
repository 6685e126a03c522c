"""What rollouts and scores do to a loaded transformer: make it fast, pad prompts for it, run it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import NewGELUActivation

from latent_tts.engine.attention import AttentionState, use_shared_prefix_attention


def prepare(lm: PreTrainedModel) -> None:
    """Make a model's layers read shared prefixes, and GPT-2's activation one kernel instead of eight.

    The activation is the same function; in half precision it rounds once instead of after each of its eight operations.
    """
    use_shared_prefix_attention(lm)
    for parent in list(lm.modules()):
        for name, child in parent.named_children():
            if type(child) is NewGELUActivation:
                setattr(parent, name, nn.GELU(approximate="tanh"))


def padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids (Q, L) of prompts, padded on the right with 0, and their lengths (Q)."""
    lengths = [len(prompt) for prompt in prompts]
    ids_QL = torch.zeros(len(prompts), max(lengths), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids_QL[row, : len(prompt)] = torch.tensor(prompt, dtype=torch.long)
    return ids_QL.to(device), torch.tensor(lengths, device=device)


def run(backbone: nn.Module, embeddings: Tensor, positions: Tensor, state: AttentionState) -> Tensor:
    """Final hidden states (rows, S, D) of one pass, which writes the prefixes of `state` or reads them."""
    return backbone(inputs_embeds=embeddings, position_ids=positions, use_cache=False, state=state).last_hidden_state
