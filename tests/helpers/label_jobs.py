"""Labelling jobs of plain token ids; an answer is right if the sum of its ids is even."""

import tiny

from latent_tts.engine.labelling import LabelJob, Labelling

LENGTHS = [9, 1]
N, M = 2, 2  # rollouts per question, completions per prefix


def is_right(ids):
    return sum(ids) % 2 == 0


def jobs(lengths=LENGTHS):
    prompts = tiny.prompts(lengths)
    return [LabelJob(f"q{i}", i, prompt, is_right) for i, prompt in enumerate(prompts)]


def labelling(**changes):
    values = {
        "rollouts": N,
        "completions": M,
        "keep_all": True,
        "seed": 0,
        "rows": 64,
        "latent_id": 59,
    }
    return Labelling(**values | changes)
