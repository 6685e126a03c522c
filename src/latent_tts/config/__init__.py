"""Hydra and OmegaConf: configs become objects here."""
