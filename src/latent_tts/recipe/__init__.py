"""Training recipes, one option of the group `recipe` per module; objectives are in `training.reasoner`."""
