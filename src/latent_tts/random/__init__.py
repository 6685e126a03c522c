"""Counter-based randomness: Philox, and the random numbers made from it."""
