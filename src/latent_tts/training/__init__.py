"""Curricula, batches and the loop that train reasoners."""
