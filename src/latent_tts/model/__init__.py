"""Adapters of families of reasoners; one option of the group `model` a module."""
