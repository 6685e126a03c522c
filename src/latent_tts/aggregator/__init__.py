"""Many rollouts to one answer; one option of the group `aggregator` a module. Pure arrays."""
