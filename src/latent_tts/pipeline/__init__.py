"""From a specification to a run folder: spec, keys, rollouts, tables."""
