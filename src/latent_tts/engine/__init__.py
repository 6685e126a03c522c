"""Batched parallel latent rollouts: shared-prefix attention, the latent loop, answer decoding, packing."""
