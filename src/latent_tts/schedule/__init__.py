"""In which order the latents of a rollout are computed; one option of the group `schedule` a module."""
