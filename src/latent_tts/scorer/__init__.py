"""How rollouts are scored; one option of the group `scorer` per module.

An option makes a `latent_rm.LatentRM` (an own scorer inherits it), or `none.NoScorer`.
"""
