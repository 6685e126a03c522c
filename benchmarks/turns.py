"""Compares two dtypes on a machine whose speed varies: both engines alternate in one process.

    python benchmarks/turns.py [--sides fp32 bf16] [--case 4x64 16x16] [--sampler gaussian dropout] [--repeats 5]
                               [--layers 12] [--width 768]

The model has the size of GPT-2 small and runs on a CPU; rollouts are as in `engine.py`. Prints, for each case and
sampler, the median, minimum and maximum of the paired ratios of seconds (first side over second side), in total and per
phase, after one pair as a warm-up. For each side it also prints the rate of operations in the latent phase as a share
of the rate of matrix products, which is measured right before and right after.
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
from latent_tts.engine.packing import RolloutJob
from latent_tts.engine.rollout import Engine, RolloutPlan
from latent_tts.sampler import Sampler
from latent_tts.search.independent import Independent
from latent_tts.types import Reasoner


@dataclass
class Side:
    """The models of one side, and its measurements."""

    lm: PreTrainedModel
    unprepared: PreTrainedModel  # for the products' rate
    seconds: list[dict[str, float]] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)

    def take_a_turn(self, jobs: list[RolloutJob], sampler: Sampler) -> None:
        """Draw all rollouts once, in one batch."""
        plan = RolloutPlan(bench.LATENTS, [int(self.lm.config.vocab_size) - 1], None, bench.ANSWER)
        engine, rows = Engine(Reasoner(self.lm, lambda hidden: hidden), plan), sum(len(job.rollouts) for job in jobs)
        before = bench.product_rate(self.unprepared, rows, "cpu")
        watch = bench.Stopwatch(sampler, self.lm, bench.LATENTS, "cpu")
        watch.run(lambda watched: Independent().roll(engine, jobs, watched, 0))
        seconds = watch.close()
        after = bench.product_rate(self.unprepared, rows, "cpu")
        latents = seconds["latents"] + seconds["random_latents"]
        phases = {"prefill": seconds["prefill"], "latents": latents, "answers": seconds["answers"]}
        self.seconds.append({"all": sum(seconds.values()), **phases})
        self.shares.append(2 * bench.latent_flops(self.lm, jobs, sampler) / latents / (before + after))


def spread(values: Sequence[float]) -> str:
    """Median, minimum and maximum."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


@torch.inference_mode()
def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", default=["4x64", "16x16"], metavar="QxN")
    parser.add_argument("--sampler", nargs="+", default=["gaussian", "dropout"], choices=bench.SAMPLERS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sides", nargs=2, default=["fp32", "bf16"], choices=bench.DTYPES)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    arguments = parser.parse_args(argv)
    sizes = {"model": "gpt2", "device": "cpu", "layers": arguments.layers, "width": arguments.width}
    models = {}
    for name in dict.fromkeys(arguments.sides):
        make = partial(bench.new_model, argparse.Namespace(**sizes, dtype=[name]))
        models[name] = make(), make()
    vocabulary = int(next(iter(models.values()))[0].config.vocab_size)
    for case in arguments.case:
        questions, rollouts = map(int, case.split("x"))
        jobs = bench.jobs_of(questions, rollouts, vocabulary)
        for sampler in arguments.sampler:
            sides = {name: Side(*models[name]) for name in arguments.sides}
            for _ in range(1 + arguments.repeats):
                for side in sides.values():
                    side.take_a_turn(jobs, bench.SAMPLERS[sampler])
            first, second = (sides[name].seconds[1:] for name in arguments.sides)
            print(f"{case} {sampler}: seconds of {arguments.sides[0]} over {arguments.sides[1]}")
            for phase in first[0]:
                ratios = [a[phase] / b[phase] for a, b in zip(first, second, strict=True)]
                print(f"  {phase}: {spread(ratios)}")
            for name, side in sides.items():
                rate = questions * rollouts / statistics.median(seconds["all"] for seconds in side.seconds[1:])
                print(
                    f"  {name}: {rate:.1f} rollouts/s, latents {spread(side.shares[1:])} of the products' rate",
                    flush=True,
                )


if __name__ == "__main__":
    main()
