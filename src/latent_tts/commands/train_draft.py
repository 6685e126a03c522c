"""`ltts train-draft`: train a small head that predicts a reasoner's latents, for `schedule.guess=draft`."""

from __future__ import annotations

import math
from pathlib import Path

from omegaconf import DictConfig

from latent_tts.checkpoint.draft import DraftRecord
from latent_tts.config.requests import drawing_options, engine_settings
from latent_tts.errors import LESS_MEMORY, SEED, check_fields, computing, require
from latent_tts.pipeline.spec import encode_prompts, reserved_positions
from latent_tts.results import report
from latent_tts.results.files import locked_folder, whole_file
from latent_tts.task.arith import Arith
from latent_tts.training.reasoner.questions import epochs, hold_out, training_questions

FILE = "draft.safetensors"


def main(cfg: DictConfig) -> None:
    """Train, write `draft.safetensors`, print how well it predicts, and its path.

    Raises:
        UsageError: a value is not usable.
        RunError: a failure while training; nothing was written.
    """
    engine = engine_settings(cfg.engine)
    count = "a positive integer"
    check_fields("", cfg, updates=count, batch=count, valid_questions=count, lr="a positive number", seed=SEED)
    sampler, task, adapter = drawing_options(cfg)
    require("model", adapter.name, adapter.own_schedule is None, "has its own sweeps, which take no draft")
    require("model.latents", adapter.latents, adapter.latents >= 2, "must be 2 or more: a draft predicts h_2 and later")
    if isinstance(task, Arith):
        found = training_questions(task, valid_questions=cfg.valid_questions, seed=cfg.seed, step_results=False)
        stream, valid, known = found.stream(), found.valid, found.valid
    else:
        questions, valid = hold_out(task.questions(), cfg.valid_questions)
        stream, known = epochs(questions, cfg.seed), [*questions, *valid]
    encode_prompts(adapter, known, reserved_positions(adapter, 1))
    output = Path(cfg.output).expanduser()
    with (
        locked_folder(output, "output"),
        computing("training", "nothing was written", LESS_MEMORY),
        report.progress_bar(cfg.updates, "updates") as bar,
    ):
        from latent_tts.engine.draft import save_draft
        from latent_tts.engine.rollout import Engine
        from latent_tts.pipeline.models import find_device, load_reasoner, rollout_plan
        from latent_tts.training.draft import LatentDrawer, relative_errors, train_draft

        loaded = Engine(load_reasoner(adapter, engine, find_device(engine)), rollout_plan(adapter, 1))
        drawer = LatentDrawer(loaded, adapter.encode, sampler, cfg.seed)
        head = train_draft(
            drawer, stream, updates=cfg.updates, batch=cfg.batch, lr=cfg.lr, seed=cfg.seed,
            report=lambda done, loss: bar.show(done, f"loss {loss:.3f}"),
        )  # fmt: skip
        errors = relative_errors(head, drawer, valid)
        with whole_file(output / FILE) as path:
            save_draft(head, path, DraftRecord(adapter.digest, adapter.latents, loaded.width))
    report.print_table(
        f"{adapter.name}, {len(valid)} questions: relative RMS error of each predicted latent",
        ["latent", *(str(place) for place in range(2, adapter.latents + 1))],
        [["error", *("" if math.isnan(error) else f"{error:.2f}" for error in errors)]],
    )
    print(output / FILE)
