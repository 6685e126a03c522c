"""Time of `schedule=auto` over `schedule=sequential`, by rows of a batch. Target: never above 1.1.

    python benchmarks/schedules.py [--layers 4] [--width 128] [--latents 12] [--questions 15] [--rows 1 4 16 64]

Models have random weights. In one, latents hardly depend on each other, so that sweeps pay where the device has
arithmetic to spare; in the other they do, and sweeps never pay. As `ltts probe` does, sweeps are timed once to find the
rows up to which auto follows the plan; then auto and sequential take turns, question by question, answers included.
Processor seconds of one thread; prints the median of the paired ratios with its minimum and maximum.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from latent_tts.engine.rollout import Engine, RolloutPlan
from latent_tts.pipeline import probing
from latent_tts.random.draw import Draw
from latent_tts.sampler.greedy import Greedy
from latent_tts.schedule import Schedule
from latent_tts.schedule.sequential import Sequential
from latent_tts.schedule.speculative import Speculative
from latent_tts.types import Reasoner

VOCABULARY, ANSWER, PROMPT = 1000, 4, 40
TOLERANCE, TARGET = 0.1, 1.1
COUPLING = {"independent": 1e-3, "dependent": 1.0}


def new_engine(arguments: argparse.Namespace, coupling: float, schedule: Schedule) -> Engine:
    """An engine whose latents depend on each other by as much as `coupling` says."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=arguments.width,
        n_layer=arguments.layers,
        n_head=max(arguments.width // 32, 1),
        bos_token_id=None,
        eos_token_id=None,
    )
    lm = GPT2LMHeadModel(config).eval().requires_grad_(False)
    constant_D = torch.linspace(-1, 1, arguments.width)
    next_latent: Callable[[Tensor], Tensor] = lambda hidden: coupling * hidden + constant_D  # noqa: E731
    plan = RolloutPlan(arguments.latents, [VOCABULARY - 1], None, ANSWER, schedule=schedule)
    return Engine(Reasoner(lm, next_latent), plan)


def roll(engine: Engine, name: str, prompt: list[int], rows: int) -> tuple[float, float]:
    """Processor seconds of the rollouts of a question, and their sweeps on average."""
    draw = Draw.of(0, [name], torch.arange(rows)[None], engine.width, engine.blocks)
    begun = time.process_time()
    rollouts = engine.roll([prompt], draw, Greedy())
    return time.process_time() - begun, float(rollouts.sweeps_R.float().mean())


def chosen(sequential: Engine, parallel: Engine, prompts: Mapping[str, list[int]]) -> int:
    """The rows up to which auto takes the parallel schedule, as `ltts probe` finds them."""
    sweeps = np.mean([roll(parallel, name, prompt, 1)[1] for name, prompt in prompts.items()])
    if (parallel.plan.latents - 1) / sweeps <= probing.MIN_COMMITS_PER_SWEEP:
        return 0
    ratios = probing.time_ratios(sequential, parallel, prompts)
    return max((rows for rows, ratio in ratios.items() if ratio < 1), default=0)


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for key, value in {"layers": 4, "width": 128, "latents": 12, "questions": 15}.items():
        parser.add_argument(f"--{key}", type=int, default=value)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 64])
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    generator = np.random.default_rng(0)
    prompts = {str(i): generator.integers(0, VOCABULARY, PROMPT).tolist() for i in range(arguments.questions + 1)}
    for kind, coupling in COUPLING.items():
        sequential = new_engine(arguments, coupling, Sequential())
        parallel = new_engine(arguments, coupling, Speculative(None, TOLERANCE, "zero"))
        parallel.reasoner = replace(parallel.reasoner, lm=sequential.reasoner.lm)
        max_rows = chosen(sequential, parallel, prompts)
        print(f"{kind} latents: auto is speculative up to {max_rows} rows")
        for rows in arguments.rows:
            auto = parallel if rows <= max_rows else sequential
            pairs = [[roll(engine, *item, rows)[0] for engine in (auto, sequential)] for item in prompts.items()]
            ratios = [ours / theirs for ours, theirs in pairs[1:]]
            middle = float(np.median(ratios))
            print(
                f"  {rows} rows, {'speculative' if auto is parallel else 'sequential'}: {middle:.2f} "
                f"({min(ratios):.2f} to {max(ratios):.2f}), target {TARGET}: {'met' if middle <= TARGET else 'missed'}",
                flush=True,
            )


if __name__ == "__main__":
    main()
