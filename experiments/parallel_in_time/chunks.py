"""Sweeps and time of `schedule=speculative` by chunk: one rollout of a question, all schedules in turn.

python experiments/parallel_in_time/chunks.py OUTPUT.csv FOLDER T TOLERANCE

Processor time of one thread for the whole question, over that of `sequential`: median and 95th percentile.
"""

from __future__ import annotations

import sys
import time

import numpy as np
import pandas as pd
import torch
from latency import adapter_of

from latent_tts.engine.rollout import Engine, Rollouts
from latent_tts.pipeline.models import load_reasoner, rollout_plan
from latent_tts.pipeline.spec import EngineSettings
from latent_tts.random.draw import Draw
from latent_tts.sampler import Sampler
from latent_tts.sampler.gaussian import Gaussian
from latent_tts.sampler.greedy import Greedy
from latent_tts.schedule import Schedule
from latent_tts.schedule.sequential import Sequential
from latent_tts.schedule.speculative import Speculative
from latent_tts.task.arith import Arith

QUESTIONS, WARM_UP = 30, 2
CHUNKS = (None, 2, 4, 8, 12)
SAMPLERS: tuple[Sampler, ...] = (Greedy(), Gaussian(0.4, False))


def schedules(tolerance: float) -> dict[str, Schedule]:
    """All that are compared, by name."""
    chunked = {str(chunk or "all"): Speculative(chunk, tolerance, "token") for chunk in CHUNKS}
    return {"sequential": Sequential()} | chunked


def main() -> None:
    """Measure one model."""
    torch.set_num_threads(1)
    output, folder, latents, tolerance = sys.argv[1:]
    adapter = adapter_of("coconut", folder, int(latents), 0)
    reasoner = load_reasoner(adapter, EngineSettings("float32", "cpu", None), "cpu")
    engines = {
        name: Engine(reasoner, rollout_plan(adapter, 16, schedule))
        for name, schedule in schedules(float(tolerance)).items()
    }
    questions = Arith(split="valid", limit=QUESTIONS + WARM_UP, seed=0, steps=None).questions()
    rows = []
    for sampler in SAMPLERS:
        made: dict[str, list[tuple[float, Rollouts]]] = {name: [] for name in engines}
        for question in questions:
            for name, engine in engines.items():
                draw = Draw.of(0, [question.id], torch.zeros(1, 1, dtype=torch.long), engine.width, engine.blocks)
                begun = time.process_time()
                rollouts = engine.roll([adapter.encode(question)], draw, sampler)
                made[name].append((time.process_time() - begun, rollouts))
        there = made["sequential"][WARM_UP:]
        for name, all_here in made.items():
            here = all_here[WARM_UP:]
            ratio_Q = np.array([ours[0] / theirs[0] for ours, theirs in zip(here, there, strict=True)])
            equal_Q = [ours[1].answer_ids == theirs[1].answer_ids for ours, theirs in zip(here, there, strict=True)]
            rows.append(
                {"sampler": sampler.name, "tolerance": tolerance, "chunk": name,
                 "sweeps": np.mean([int(each.sweeps_R) for _, each in here]),
                 "conflicts": np.mean([int(each.conflicts_R) for _, each in here]),
                 "equal_answers": np.mean(equal_Q), "time": np.median(ratio_Q), "time_95": np.quantile(ratio_Q, 0.95),
                 "questions": len(here)}
            )  # fmt: skip
            print(rows[-1], flush=True)
    pd.DataFrame(rows).to_csv(output, index=False, float_format="%.4g")


if __name__ == "__main__":
    main()
