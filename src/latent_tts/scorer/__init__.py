"""What gives a rollout a score; one option of the group `scorer` a module."""
