"""Training of latent reasoners.

- `curriculum`: shared by all recipes (without torch): stages, Protocols, the text to write in each stage.
- `optimization`: settings of the updates (without torch).
- `backbone`, `vocabulary`, `initial`: the checkpoint that training starts from.
- `batch`: order and tokens of questions, forward passes with gradients, shared losses.
- `coconut` (also for cot), `codi`, `colar`, `pccot`: the objective of each family.
- `train`: the updates of all stages, the finished checkpoint.
"""
