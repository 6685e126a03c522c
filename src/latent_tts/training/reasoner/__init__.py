"""Training of latent reasoners.

- `curriculum`: shared by all recipes (without torch): stages, Protocols, the text to write in each stage.
- `backbone`, `initial`, `lora`: the checkpoint that training starts from.
- `batch`: order and tokens of questions, forward passes with gradients, shared losses.
- `coconut` (also for cot), `codi`, `colar`, `pccot`: the objective of each family.
- `pace`: the place of each update in the recipe; when to validate and save.
- `train`: the updates of all stages, the finished checkpoint.
"""
