"""bfloat16 against float32 where the machine's speed wavers: both engines in one process, by turns.

    python benchmarks/turns.py [--case 4x64 16x16] [--sampler gaussian dropout] [--repeats 5]
                               [--layers 12] [--width 768]

GPT-2 small's shape on a CPU, rollouts as in `engine.py`. For each case and sampler: median, lowest and highest of the
paired ratios of seconds, after one pair that warms up; and for each dtype the share of the products' rate that latents
reach, where that rate is the mean of what is measured right before and right after.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from transformers import PreTrainedModel

import engine as bench
from latent_tts.engine.packing import Job
from latent_tts.engine.rollout import Engine, Plan
from latent_tts.executor import draw_batch
from latent_tts.types import Reasoner, Sampler


@dataclass
class Side:
    """One dtype's models and what was measured of it."""

    lm: PreTrainedModel
    unprepared: PreTrainedModel  # for the products' rate
    seconds: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)

    def take_a_turn(self, jobs: list[Job], sampler: Sampler) -> None:
        """Draw all rollouts once, in one batch."""
        plan = Plan(bench.LATENTS, [int(self.lm.config.vocab_size) - 1], None, bench.ANSWER)
        engine, rows = Engine(Reasoner(self.lm, lambda hidden: hidden), plan), sum(len(job.rollouts) for job in jobs)
        before = bench.product_rate(self.unprepared, rows, "cpu")
        watch = bench.Stopwatch(sampler, self.lm, bench.LATENTS, "cpu")
        watch.run(lambda watched: draw_batch(jobs, engine, watched, 0))
        watch.close()
        self.seconds.append(sum(watch.seconds.values()))
        after = bench.product_rate(self.unprepared, rows, "cpu")
        latents = watch.seconds["latents"] + watch.seconds["random_latents"]
        self.shares.append(2 * bench.latent_flops(self.lm, jobs, sampler) / latents / (before + after))


def spread(values: Sequence[float]) -> str:
    """Median, lowest and highest."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


@torch.inference_mode()
def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", default=["4x64", "16x16"], metavar="QxN")
    parser.add_argument("--sampler", nargs="+", default=["gaussian", "dropout"], choices=bench.SAMPLERS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    arguments = parser.parse_args(argv)
    sizes = {"model": "gpt2", "device": "cpu", "layers": arguments.layers, "width": arguments.width}
    new = {dtype: partial(bench.new_model, argparse.Namespace(**sizes, dtype=[dtype])) for dtype in bench.DTYPES}
    models = {dtype: (make(), make()) for dtype, make in new.items()}
    for case in arguments.case:
        questions, rollouts = map(int, case.split("x"))
        jobs = bench.jobs_of(questions, rollouts, int(models["fp32"][0].config.vocab_size))
        for name in arguments.sampler:
            sides = {dtype: Side(*pair) for dtype, pair in models.items()}
            for _ in range(1 + arguments.repeats):
                for side in sides.values():
                    side.take_a_turn(jobs, bench.SAMPLERS[name])
            slow, fast = (side.seconds[1:] for side in (sides["fp32"], sides["bf16"]))
            rates = [
                f"{dtype} {questions * rollouts / statistics.median(side.seconds[1:]):.1f}"
                for dtype, side in sides.items()
            ]
            ratios = [a / b for a, b in zip(slow, fast, strict=True)]
            print(f"{case} {name}: bf16 over fp32 {spread(ratios)}; rollouts/s {', '.join(rates)}")
            for dtype, side in sides.items():
                print(f"  latents in {dtype}: {spread(side.shares[1:])} of the products' rate", flush=True)


if __name__ == "__main__":
    main()
