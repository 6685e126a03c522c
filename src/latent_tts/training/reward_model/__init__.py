"""LatentRM: data, losses, training."""
