"""The GFLOP of a question's rollouts, as figures and budgets count them."""

from __future__ import annotations

import numpy as np

from latent_tts.engine.cost import Shape
from latent_tts.pipeline.spec import RunSpec
from latent_tts.schedule import OF_OTHERS
from latent_tts.types import Float64, Int64, Question


def rollout_gflop(
    spec: RunSpec,
    question: Question,
    steps_N: Int64,
    tokens_N: Int64 | None,
    conflicts_N: Int64 | None = None,
    *,
    scored: bool = True,
) -> tuple[float, Float64]:
    """The GFLOP that the rollouts of a question share, and what each of them adds (N).

    Args:
        spec: the run.
        question: whose rollouts they are.
        steps_N: latents of each.
        tokens_N: answer tokens of each, forced ones included; None where no answer is decoded.
        conflicts_N: latents of each that were computed again; None for none.
        scored: whether the run's scorer, if it has one, reads them.
    """
    passes, prompt = spec.passes, len(spec.prompts[question.id])
    shared = passes.shared_flops(prompt)
    if tokens_N is None:
        each_N = passes.thinking_flops(prompt, steps_N)
    else:
        each_N = passes.rollout_flops(prompt, steps_N, tokens_N - len(spec.forced_ids))
    if spec.schedule.first_guess in OF_OTHERS:
        shared += passes.guess_flops(prompt)
    if spec.draft is not None:
        each_N = each_N + spec.draft.record.flops(prompt)
    if conflicts_N is not None:  # with all latents before them, which is a little too many
        each_N = each_N + conflicts_N * passes.again_flops(prompt, steps_N)
    if scored and spec.scorer is not None:
        head = Shape.from_config(spec.scorer.sizes)
        shared, each_N = shared + head.prompt_flops(prompt), each_N + head.scoring_flops(prompt, steps_N)
    return float(shared) / 1e9, np.asarray(each_N, dtype=np.float64) / 1e9
