"""What families add to a causal LM, with the names that the tensors have in checkpoint files (imports torch)."""

from __future__ import annotations

from torch import nn


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
