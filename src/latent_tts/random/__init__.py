"""Counter-based randomness: Philox, and the draws made of it."""
