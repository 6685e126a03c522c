"""What families add to a causal LM, with the names that the tensors have in checkpoint files (imports torch)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F


def codi_projector(width: int, hidden: int, dropout: float = 0.0) -> nn.Sequential:
    """Dropout, Linear, GELU, Linear, LayerNorm, with random weights."""
    return nn.Sequential(
        nn.Dropout(dropout), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width), nn.LayerNorm(width)
    )


def pccot_projection(width: int) -> nn.Sequential:
    """Linear, GELU, Linear, LayerNorm, with random weights."""
    return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.LayerNorm(width))


def colar_head(width: int, hidden: int, *, spread: bool) -> nn.ModuleDict:
    """CoLaR's latent head: fc.0, fc.2, fc.3, mean and, for a head that predicts a spread, log_std."""
    layers: dict[str, nn.Module] = {
        "fc": nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.LayerNorm(hidden)),
        "mean": nn.Linear(hidden, width),
    }
    if spread:
        layers["log_std"] = nn.Linear(hidden, width)
    return nn.ModuleDict(layers)


class LowRank(nn.Module):
    """A linear layer with a low-rank product added to its output.

    Attributes:
        layer: the linear layer. One with `product` and `finish` computes more than a product; see
            `engine.backbone.PackedLinear`.
        down_RD, up_DR: the matrices of rank R.
        scale: by which their product counts.
    """

    def __init__(self, layer: nn.Module, down_RD: Tensor, up_DR: Tensor, scale: float) -> None:
        super().__init__()
        self.layer, self.scale = layer, scale
        self.down_RD, self.up_DR = (nn.Parameter(value, requires_grad=False) for value in (down_RD, up_DR))

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output."""
        added = self.scale * F.linear(F.linear(x, self.down_RD), self.up_DR)
        layer: Any = self.layer
        if hasattr(layer, "product"):
            return layer.finish(layer.product(x) + added)
        return layer(x) + added
