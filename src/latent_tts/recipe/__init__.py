"""Training recipes, one per family, checked without torch; objectives are in `latent_tts.training.reasoner`."""
