"""Checkpoints of training codes and LoRA adapters, rewritten as folders that `ltts run` reads."""
