"""Converts checkpoints of training codes and LoRA adapters into folders that `ltts run` reads."""
