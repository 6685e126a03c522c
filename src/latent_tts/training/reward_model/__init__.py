"""Training of LatentRM.

- `data`, `loss`: annotated questions, losses (without torch).
- `model`: the backbone with a scalar head; all rollouts of a question are one row.
- `train`: the updates, the choice of the best weights, the finished checkpoint.
"""
