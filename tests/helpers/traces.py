"""Traces made by hand."""

import numpy as np

from latent_tts.results.trace import DependencyGraph, Lens, Trace, TracedQuestion, TracedRollouts, draw_map

LATENTS, WIDTH = 3, 4


def rollouts(name, count, *, scored=True, gold=True, seed=0):
    """Rollouts with random latents; the second one has fewer."""
    generator = np.random.default_rng(seed)
    steps_N = np.array([LATENTS, *[LATENTS - 1] * (count > 1), *[LATENTS] * (count - 2)])
    latents_NTD = generator.normal(size=(count, LATENTS, WIDTH)).astype(np.float32)
    own_NT = np.arange(LATENTS) < steps_N[:, None]
    latents_NTD[~own_NT] = 0
    first_NS = np.minimum(np.arange(LATENTS), steps_N[:, None])
    stop_NS = np.minimum(first_NS + 1, steps_N[:, None])
    step_scores_NT = np.where(own_NT, generator.normal(size=own_NT.shape), np.nan).astype(np.float32)
    return TracedRollouts(
        sampler=name, latents_NTD=latents_NTD, steps_N=steps_N,
        predictions=[str(number % 2) for number in range(count)],
        correct_N=[number % 2 == 0 for number in range(count)] if gold else None,
        texts=[name] * count, answer_logprob_N=np.linspace(-1, 0, count),
        step_scores_NT=step_scores_NT if scored else None,
        score_N=np.arange(count, dtype=float) if scored else None,
        counts={"sweeps": steps_N.tolist(), "commits": steps_N.tolist(), "conflicts": [0] * count},
        sweeps_3NS=np.stack([first_NS, stop_NS, stop_NS]),
        lens=Lens(
            token_NTK=np.where(own_NT[..., None], [0, 1], -1),
            probability_NTK=np.where(own_NT[..., None], [0.75, 0.25], np.nan).astype(np.float32),
            rank_NTG=np.where(own_NT[..., None], 0, -1),
        ),
    )  # fmt: skip


def made(text="a question", gold="0", **more):
    """A trace of one question whose texts are all `text`."""
    samplers = [rollouts(f"{text} {place}", count, gold=gold is not None, seed=place, **more) for place, count in
                enumerate((4, 4, 1))]  # fmt: skip
    question = TracedQuestion(
        id=text, text=text, gold=gold, steps=(text,), results=[(0, text)], samplers=samplers,
        picks={text: {"answer": text, "rollout": 1, "correct": None if gold is None else True}},
        maps=[draw_map("pca", samplers, step) for step in (None, *range(LATENTS))],
        dependencies=DependencyGraph(np.tril(np.full((LATENTS, LATENTS), 0.5), -1), 0.1, [0, 1, 2], -0.5),
    )  # fmt: skip
    return Trace(
        {"model": text, "run": text},
        text,
        {0: text, 1: "b"},
        text if samplers[0].score_N is not None else None,
        "",
        [question],
    )
