"""Checkpoint folders: found, checked, read; what adapters share."""
