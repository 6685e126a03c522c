"""Training of reasoners, LatentRMs and draft heads.

- `trainer`: shared by both: the Trainer with devices, accumulation, saved states, resuming and Ctrl-C (imports torch).
- `optimization`, `states`: settings of updates, and the output folder (without torch).
- `reasoner/`: training of latent reasoners of every family, by recipes (`latent_tts.recipe`).
- `reward_model/`: training of LatentRM on annotated rollouts.
- `draft`: training of draft heads, on rollouts drawn for each update.
"""
