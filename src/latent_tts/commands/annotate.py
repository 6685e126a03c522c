"""`ltts annotate`: rollouts of training questions with step-wise labels; re-run the command to resume."""

from __future__ import annotations

from omegaconf import DictConfig

from latent_tts.config.requests import annotation_spec
from latent_tts.pipeline.annotation import annotate


def main(cfg: DictConfig) -> None:
    """Annotate, then print the folder.

    Raises:
        UsageError: a value or a question is not usable, or the folder holds annotations made with other settings or of
            other gold answers.
        RunError: a failure while drawing; the finished questions are kept.
    """
    print(annotate(annotation_spec(cfg)))
