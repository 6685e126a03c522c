"""What makes rollouts differ; one option of the group `sampler` a module."""
