"""Time of prompt, latents and answer, for reasoners side by side: writes latency.csv.

python experiments/parallel_in_time/latency.py OUTPUT NAME=FAMILY:FOLDER:T:K[:DTYPE]..., as in seq=coconut:FOLDER:12:0
FAMILY is coconut, pccot, or pccot-first where the sweeps begin with h_1. DTYPE is float32 unless given.

One question after another, the reasoners in turn, so that a busy machine meets all of them alike. Processor seconds of
one thread: milliseconds per question, median and 95th percentile over questions. Where the machine has a counter of the
processor's energy (RAPL) that may be read, also joules per question; the counter includes what else runs.
"""

from __future__ import annotations

import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from latent_tts.engine.rollout import Engine, RolloutState
from latent_tts.engine.sites import SiteHooks
from latent_tts.model.coconut import Coconut
from latent_tts.model.pccot import Pccot
from latent_tts.pipeline.models import load_reasoner, rollout_plan
from latent_tts.pipeline.spec import EngineSettings
from latent_tts.random.draw import Draw
from latent_tts.sampler.gaussian import Gaussian
from latent_tts.task.arith import Arith

QUESTIONS, WARM_UP, SIZES = 60, 5, (1, 16)
PHASES = ("prompt", "latents", "answer")
ENERGY = Path("/sys/class/powercap/intel-rapl:0/energy_uj")


def joules() -> float:
    """The processor's energy counter; NaN without one. It begins again at some value, which a difference may meet."""
    try:
        return int(ENERGY.read_text()) / 1e6
    except OSError:
        return float("nan")


def adapter_of(family: str, folder: str, latents: int, sweeps: int) -> Any:
    """The adapter of a trained reasoner."""
    shared: dict[str, Any] = {"name": family, "checkpoint": folder, "revision": None, "eos": None, "latents": latents}
    more: dict[str, Any] = {"trained_latents": None, "recommended": {}}
    if family.startswith("pccot"):
        return Pccot(**shared, **more, sweeps=sweeps, answer_prompt="", known_first=family == "pccot-first")
    return Coconut(**shared, **more, latent_rm=None)


@torch.inference_mode()
def phases(engine: Engine, prompt: list[int], name: str, rollouts: int) -> list[float]:
    """Processor milliseconds of the phases of one question; the answer's pass runs the last latents, too."""
    sampler = Gaussian(0.4, False)
    draw = Draw.of(0, [name], torch.arange(rollouts)[None], engine.width, engine.blocks)
    with SiteHooks(engine.lm, sampler) as hooks:
        at = [time.process_time()]
        state = RolloutState.start(engine, [prompt], draw, hooks)
        at.append(time.process_time())
        state.make_latents()
        at.append(time.process_time())
        state.decode_answers()
        at.append(time.process_time())
    return [1000 * (end - start) for start, end in pairwise(at)]


def main() -> None:
    """Measure the reasoners that are given."""
    torch.set_num_threads(1)
    output, *given = sys.argv[1:]
    engines = {}
    for item in given:
        name, _, where = item.rpartition("=")
        family, folder, latents, sweeps, *dtype = where.split(":")
        adapter = adapter_of(family, folder, int(latents), int(sweeps))
        reasoner = load_reasoner(adapter, EngineSettings(dtype[0] if dtype else "float32", "cpu", None), "cpu")
        engines[name] = adapter, Engine(reasoner, rollout_plan(adapter, 16, adapter.own_schedule))
    questions = Arith(split="valid", limit=QUESTIONS + WARM_UP, seed=0, steps=None).questions()
    rows = []
    for rollouts in SIZES:
        taken = {name: [] for name in engines}
        energy = {name: [] for name in engines}
        for question in questions:
            for name, (adapter, engine) in engines.items():
                begun = joules()
                taken[name].append(phases(engine, adapter.encode(question), question.id, rollouts))
                energy[name].append(joules() - begun)
        for name, times in taken.items():
            times_QP = np.array(times[WARM_UP:])
            whole = {"whole": times_QP.sum(1)} | dict(zip(PHASES, times_QP.T, strict=True))
            for phase, ms_Q in whole.items():
                rows.append(
                    {"reasoner": name, "rollouts": rollouts, "phase": phase, "median_ms": np.median(ms_Q),
                     "p95_ms": np.quantile(ms_Q, 0.95), "questions": QUESTIONS,
                     "joules": np.median(energy[name][WARM_UP:]) if phase == "whole" else float("nan")}
                )  # fmt: skip
            print(rows[-4:], flush=True)
    pd.DataFrame(rows).to_csv(output, index=False, float_format="%.4g")


if __name__ == "__main__":
    main()
