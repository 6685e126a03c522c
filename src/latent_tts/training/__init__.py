"""Training.

- `reasoner/`: latent reasoners of every family, by recipes (`latent_tts.recipe`).
- `reward_model/`: LatentRM, from annotated rollouts.
"""
