"""What the engine does to a loaded transformer before it runs it."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.activations import NewGELUActivation
from transformers.pytorch_utils import Conv1D

from latent_tts.engine.attention import use_own_attention, use_shared_prefix_attention
from latent_tts.engine.sites import find_blocks
from latent_tts.types import Computation

SHARED_PREFIX = Computation()
ROWS = 256  # what oneDNN lays weights out for; any number of rows works


def prepare_backbone(lm: PreTrainedModel, computation: Computation = SHARED_PREFIX) -> None:
    """Make a model's layers read shared prefixes, and join operations: none of it changes the function.

    GPT-2's activation is one kernel, on a GPU Llama's norms are one each, and layers that can be packed are. In half
    precision activation and norms round once instead of several times. A model that is computed by transformers gets
    its own attention back, and nothing else changes.
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
            elif hasattr(child, "variance_epsilon") and child.weight.is_cuda and can_be_fused(child):
                setattr(parent, name, FusedRMSNorm(child))


def can_be_fused(module: nn.Module) -> bool:
    """Whether a norm of transformers is not in training and what `FusedRMSNorm` computes: some families' are not."""
    weight: Any = module.weight
    if weight.requires_grad:
        return False
    x = torch.linspace(-3, 2, weight.shape[-1], dtype=weight.dtype, device=weight.device)[None]
    wanted, found = (norm(x).double() for norm in (module, FusedRMSNorm(module)))
    return torch.allclose(found, wanted, rtol=4 * torch.finfo(weight.dtype).eps, atol=0)


class FusedRMSNorm(nn.Module):
    """A norm of transformers (Llama's, Qwen's and so on) as one kernel instead of six."""

    def __init__(self, norm: Any) -> None:
        """Take over its weight; the sum of squares is in float32, as there."""
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        """The norm's output."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def can_be_packed(layer: nn.Module) -> TypeGuard[nn.Linear | Conv1D]:
    """Whether a layer is linear, in bfloat16 on a CPU that multiplies it, and not in training."""
    if type(layer) not in (nn.Linear, Conv1D):
        return False
    weight = layer.weight
    assert isinstance(weight, Tensor)
    on_cpu = weight.device.type == "cpu" and torch.backends.mkldnn.is_available()
    # a quantised weight is a tensor of another class
    suits = weight.dtype == torch.bfloat16 and not weight.requires_grad and type(weight.data) is Tensor
    # operators that torch.compile's CPU code is made of, though not documented
    there = hasattr(torch.ops.mkldnn, "_linear_pointwise") and hasattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported")
    return on_cpu and suits and there and torch.ops.mkldnn._is_mkldnn_bf16_supported()


class PackedLinear(nn.Module):
    """A linear layer in bfloat16 on a CPU, and GPT-2's GELU of it if asked for; the given layer's weight is not kept.

    Its weight is laid out once as oneDNN's products want it. Without that oneDNN rearranges it in every product, and
    GELU goes over the widest activations once more.
    """

    def __init__(self, layer: nn.Linear | Conv1D, *, gelu: bool = False) -> None:
        super().__init__()
        weight = layer.weight.t() if type(layer) is Conv1D else layer.weight
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS)
        self.bias = layer.bias
        self._after = ("gelu", [], "tanh") if gelu else ("none", [], "")

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output."""
        return torch.ops.mkldnn._linear_pointwise(x, self._weight, self.bias, *self._after)

    def product(self, x: Tensor) -> Tensor:
        """The output without GELU."""
        return torch.ops.mkldnn._linear_pointwise(x, self._weight, self.bias, "none", [], "")

    def finish(self, product: Tensor) -> Tensor:
        """GELU of a product, if asked for."""
        return F.gelu(product, approximate="tanh") if self._after[0] == "gelu" else product
