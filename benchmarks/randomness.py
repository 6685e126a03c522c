"""The cost of random numbers, as a share of a latent step of GPT-2 small.

    python benchmarks/randomness.py [--rows 256] [--dtypes float32 bfloat16] [--compile]

Measures a latent step (one token per row, 64 rollouts per question, prompts of 64 tokens, random weights) without
random numbers, and separately the random numbers that a step needs with each sampler, on a CPU (a GPU draws masks in
the kernel that applies them). Targets: at most 5 % of a step in float32, 15 % in bfloat16, 5 % of a step compiled by
torch.compile (which needs a C++ compiler).
On a busy machine, use LTTS_BENCH_CLOCK=cpu and OMP_NUM_THREADS=1 to count processor seconds.
Prints a table, then JSON as the last line.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from typing import cast

import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from baseline import seconds_of
from latent_tts.engine.backbone import prepare_backbone
from latent_tts.engine.state import KeyValueState
from latent_tts.random.draw import Draw
from latent_tts.sampler.dropout import Dropout
from latent_tts.types import Forward, Site

LAYERS, WIDTH, PROMPT = 12, 768, 64
BARS = {"float32": 0.05, "bfloat16": 0.15}


def median_seconds(call: Callable[[], object], repeats: int) -> float:
    """Median seconds of a call after two warm-ups."""
    return statistics.median([seconds_of(call, "cpu") for _ in range(repeats + 2)][2:])


def latent_step(dtype: torch.dtype, rows: int, compiled: bool) -> Callable[[], object]:
    """A function that runs one latent step without random numbers."""
    lm = GPT2LMHeadModel(GPT2Config(dtype=dtype)).eval()
    lm.to(dtype=dtype)  # type: ignore[call-arg]
    prepare_backbone(lm)
    questions = max(1, rows // 64)
    backbone = cast(PreTrainedModel, torch.compile(lm.base_model) if compiled else lm.base_model)
    state = KeyValueState(backbone, rows // questions, capacity=8)
    state.prefill(torch.randn(questions, PROMPT, WIDTH, dtype=dtype), torch.full((questions,), PROMPT))
    latent = torch.randn(rows, 1, WIDTH, dtype=dtype)
    state.append(latent.expand(-1, 3, -1))

    def step() -> None:
        state.append(latent)
        state.rewind(3)  # back to the middle of six latents

    return step


def masks(site: str, rows: int) -> Callable[[], object]:
    """A function that draws every dropout decision of a step, without applying them."""
    sampler = Dropout(0.1, site, ["thoughts"], "fresh")
    draw = new_draw(rows)
    sites: tuple[Site, ...] = ("attention", "ffn")
    places: list[tuple[int, Site]] = [(layer, place) for layer in range(LAYERS) for place in sites]

    def step() -> None:
        for layer, place in places:
            sampler.factors(place, layer, draw, Forward("thoughts", 3, 1))

    return step


def new_draw(rows: int) -> Draw:
    """The random numbers of the rollouts of one question."""
    return Draw.of(0, ["question"], torch.arange(rows)[None], WIDTH, LAYERS)


@torch.inference_mode()
def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dtypes", nargs="+", default=list(BARS))
    parser.add_argument("--compile", action="store_true", help="compile the step by torch.compile")
    arguments = parser.parse_args()
    repeats = arguments.repeats
    draw = new_draw(arguments.rows)
    numbers = {
        "gaussian": lambda: draw.normal(3, WIDTH),
        "dropout ffn": masks("ffn", arguments.rows),
        "dropout residual": masks("residual", arguments.rows),
    }
    results = []
    for dtype in arguments.dtypes:
        run = latent_step(getattr(torch, dtype), arguments.rows, arguments.compile)
        step = median_seconds(run, repeats)
        for name, call in numbers.items():
            share = median_seconds(call, repeats) / step
            results.append(
                {
                    "dtype": dtype,
                    "sampler": name,
                    "share": round(share, 4),
                    "bar": 0.05 if arguments.compile else BARS.get(dtype),
                }
            )
            print(f"{dtype:9} {name:17} step {1e3 * step:7.1f} ms   random numbers {100 * share:5.2f} % of it")
    print(
        json.dumps(
            {
                "rows": arguments.rows,
                "threads": torch.get_num_threads(),
                "compiled": arguments.compile,
                "results": results,
            }
        )
    )


if __name__ == "__main__":
    main()
