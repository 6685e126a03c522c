"""`python -m latent_tts`: the same as `ltts`, for launchers that start a module."""

from latent_tts.cli import entry

entry()
