"""What the engine does to a loaded transformer before it runs it."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel
from transformers.activations import NewGELUActivation

from latent_tts.engine.attention import use_own_attention, use_shared_prefix_attention
from latent_tts.engine.packed import PackedLinear, can_be_packed
from latent_tts.engine.sites import find_blocks
from latent_tts.types import Computation

SHARED_PREFIX = Computation()


def prepare_backbone(lm: PreTrainedModel, computation: Computation = SHARED_PREFIX) -> None:
    """Make a model's layers read shared prefixes, run GPT-2's activation as one kernel, and pack the layers it can.

    None of it changes the function; in half precision GPT-2's activation rounds once instead of after each of its eight
    operations. A model that is computed by transformers gets its own attention back, and nothing else changes.
    """
    if computation.attention == "transformers":
        use_own_attention(lm)
        return
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
