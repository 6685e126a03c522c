"""What rollouts and scores do to a loaded transformer: make it fast, pad prompts for it, run it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import NewGELUActivation

from latent_tts.engine.attention import AttentionState, use_shared_prefix_attention
from latent_tts.engine.packed import PackedLinear, can_be_packed
from latent_tts.engine.sites import find_blocks


def prepare(lm: PreTrainedModel) -> None:
    """Make a model's layers read shared prefixes, GPT-2's activation one kernel, and packed what can be packed.

    All of it is the same function; in half precision GPT-2's activation rounds once instead of after each of its eight
    operations.
    """
    use_shared_prefix_attention(lm)
    for parent in list(find_blocks(lm).modules()):
        children = dict(parent.named_children())
        in_front_of_gelu = None
        for name, child in children.items():
            if type(child) is NewGELUActivation:
                in_front_of_gelu = children.get("c_fc")
                packed = in_front_of_gelu is not None and can_be_packed(in_front_of_gelu)
                setattr(parent, name, nn.Identity() if packed else nn.GELU(approximate="tanh"))
        for name, child in children.items():
            if can_be_packed(child):
                setattr(parent, name, PackedLinear(child, gelu=child is in_front_of_gelu))


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
