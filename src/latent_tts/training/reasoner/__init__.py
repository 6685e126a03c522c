"""Reasoners: curricula, the loop, an objective per family."""
