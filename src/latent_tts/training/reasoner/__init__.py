"""Training of latent reasoners.

- `curriculum`: what recipes share (imports nothing of torch): stages, the Protocols, the text to write in each stage.
- `optimization`: how the weights are updated (without torch).
- `backbone`, `vocabulary`, `initial`: the checkpoint that training starts from.
- `batch`: the questions' order and tokens, passes with gradients, losses that families share.
- `coconut` (also for cot), `codi`, `colar`, `pccot`: the objective of each family.
- `train`: the updates by stages, the finished checkpoint.
"""
