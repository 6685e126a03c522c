"""The temperature of the score-weighted vote, chosen on the questions that LatentRM was validated on."""

from __future__ import annotations

from latent_tts.pipeline.rollouts import draw_rollouts
from latent_tts.pipeline.spec import RunSpec
from latent_tts.pipeline.tables import rollout_table
from latent_tts.results import statistics
from latent_tts.results.metrics import rollout_arrays


def choose_temperature(spec: RunSpec) -> float:
    """The temperature at which the vote of the run's rollouts, weighted by its scorer, is right most often.

    Rollouts are drawn where the cache lacks them: annotations say which are right, but a vote needs their predictions.
    """
    assert spec.scorer is not None
    rollouts = rollout_table(spec, draw_rollouts(spec))
    return statistics.choose_temperature(rollout_arrays(rollouts, spec.n))
