"""Adapters of the families of reasoners: one option of the group `model` per module.

What they share, and so what an option has to offer, is `checkpoint.adapter.CheckpointAdapter`.
"""
