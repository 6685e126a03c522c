"""Parallel test-time scaling of latent reasoning models."""
