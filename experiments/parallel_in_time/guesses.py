"""Sweeps until all latents are committed, by model, sampler, tolerance, guess and mixing.

python experiments/parallel_in_time/guesses.py OUTPUT.csv [draft=FILE] OVERRIDE..., as in model=coconut
model.checkpoint=FOLDER, or model=demo_codi
"""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path

import pandas as pd
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from latent_tts.checkpoint.draft import DraftRecord, find_draft
from latent_tts.config.build import conf_dir, register_schemas
from latent_tts.config.requests import run_request
from latent_tts.engine.draft import load_draft
from latent_tts.engine.rollout import Engine, Rollouts
from latent_tts.errors import UsageError
from latent_tts.pipeline.models import load_reasoner, rollout_plan
from latent_tts.pipeline.spec import RunSpec, check_run
from latent_tts.random.draw import Draw
from latent_tts.schedule import Schedule
from latent_tts.schedule.sequential import Sequential
from latent_tts.schedule.speculative import Speculative

SAMPLERS = ("greedy", "gaussian", "dropout")
TOLERANCES = (0.0, 0.01, 0.1, 0.3)
GUESSES = ("token", "zero", "greedy", "sibling", "draft")
MIXING = (0, 2)  # sweeps that the guesses `token` and `draft` are mixed from
QUESTIONS, ROLLOUTS = 100, 4


def roll(engine: Engine, spec: RunSpec, schedule: Schedule) -> Rollouts:
    """All rollouts of a run in one batch, under a schedule."""
    engine.plan = rollout_plan(spec.adapter, spec.max_answer_tokens, schedule)
    numbers_QN = torch.arange(spec.n).repeat(len(spec.questions), 1)
    draw = Draw.of(spec.seed, [question.id for question in spec.questions], numbers_QN, engine.width, engine.blocks)
    prompts = [spec.prompts[question.id] for question in spec.questions]
    return engine.roll(prompts, draw, spec.answers.over(spec.sampler))


def measure(model: list[str], draft: str | None) -> list[dict[str, object]]:
    """A row per sampler, tolerance, guess and mixing."""
    rows, engine = [], None
    for sampler in SAMPLERS:
        line = [f"sampler={sampler}", f"n={ROLLOUTS}", f"task.limit={QUESTIONS}", "task.split=valid", *model]
        cfg = compose("run", [*line, "scorer=none"], return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)
        OmegaConf.set_struct(cfg, False)
        del cfg["hydra"]
        spec = check_run(run_request(cfg))
        if engine is None:
            reasoner = load_reasoner(spec.adapter, spec.engine, "cpu", longest=spec.longest_sequence)
            head = None if draft is None else load_draft(*draft_of(draft, spec), reasoner.lm.device)
            engine = Engine(reasoner, rollout_plan(spec.adapter, spec.max_answer_tokens), head)
        there = roll(engine, spec, Sequential())
        for tolerance, guess, mixing in product(TOLERANCES, GUESSES, MIXING):
            if mixing and (guess not in ("token", "draft") or not tolerance):
                continue
            try:
                schedule = Speculative(None, tolerance, guess, draft if guess == "draft" else None, mixing)
                schedule.check(spec.adapter)
            except UsageError:  # sibling at a tolerance; a model without the token; no draft
                continue
            here = roll(engine, spec, schedule)
            equal = [one == other for one, other in zip(here.answer_ids, there.answer_ids, strict=True)]
            rows.append(
                {
                    "model": spec.adapter.name, "latents": spec.adapter.latents, "sampler": sampler,
                    "tolerance": tolerance, "guess": guess, "mixing": mixing,
                    "sequential_passes": float(there.steps_R.float().mean()),
                    "sweeps": float(here.sweeps_R.float().mean()),
                    "sweeps_95": float(here.sweeps_R.float().quantile(0.95)),
                    "commits": float(here.commits_R.float().mean()),
                    "conflicts": float(here.conflicts_R.float().mean()),
                    "equal_answers": sum(equal) / len(equal),
                    "questions": len(spec.questions), "rollouts": spec.n,
                }
            )  # fmt: skip
            print(rows[-1], flush=True)
    return rows


def draft_of(draft: str, spec: RunSpec) -> tuple[Path, DraftRecord]:
    """The file of a draft head, and its record."""
    found = find_draft(draft, spec.adapter.digest, spec.adapter.latents)
    return found.path, found.record


def main() -> None:
    """Measure the model that is given."""
    output, *given = sys.argv[1:]
    drafts = [each.removeprefix("draft=") for each in given if each.startswith("draft=")]
    register_schemas()
    with initialize_config_dir(conf_dir(), version_base=None):
        rows = measure([each for each in given if not each.startswith("draft=")], drafts[0] if drafts else None)
    pd.DataFrame(rows).to_csv(output, index=False, float_format="%.4g")


if __name__ == "__main__":
    main()
