"""Training.

- `core`: under both: the Trainer with devices, accumulation, saved states and resuming, Ctrl-C (imports torch).
- `optimization`, `folder`: the values that both share, and the output folder (without torch).
- `reasoner/`: latent reasoners of every family, by recipes (`latent_tts.recipe`).
- `reward_model/`: LatentRM, from annotated rollouts.
"""
