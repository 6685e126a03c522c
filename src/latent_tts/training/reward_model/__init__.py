"""Training of LatentRM.

- `data`, `loss`, `optimization`: the annotated questions, the losses, how the weights are updated (without torch).
- `model`: the backbone with its scalar head, all rollouts of a question in one row.
- `train`: the updates, the choice of the best weights, the finished checkpoint.
"""
