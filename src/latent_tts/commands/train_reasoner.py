"""`ltts train-reasoner`: train a reasoner by its family's recipe; the same line resumes a stopped run."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from latent_tts.checkpoint import files as checkpoint
from latent_tts.config import build as config
from latent_tts.errors import UsageError, bad_value
from latent_tts.results import report
from latent_tts.results.files import locked_folder
from latent_tts.task.arith import Arith, words

log = logging.getLogger(__name__)
INITIAL, FINISHED = "initial", "checkpoint"


def main(cfg: DictConfig) -> None:
    """Train, then write the checkpoint folder and print its path.

    Raises:
        UsageError: a value is not usable, or the output folder holds another run or is another
            process's.
        RunError: the loss stopped being finite.
    """
    with locked_folder(Path(cfg.output).expanduser(), "output"):
        train(cfg)


def train(cfg: DictConfig) -> None:
    """The command, in a folder that no other process writes to."""
    config.require("save_every", cfg.save_every, cfg.save_every >= 1, "a number of updates, 1 or more")
    config.require("valid_questions", cfg.valid_questions, cfg.valid_questions >= 1, "1 or more")
    task = config.build("task", cfg.task)
    if not isinstance(task, Arith):
        raise bad_value("task", task.name, "training needs a task that writes out its steps: task=arith")
    config.require("task.split", task.split, task.split == "train", "train: the other splits are to report on")
    config.require("task.limit", task.limit, task.limit is None, "only null: every update takes new questions")
    for key in config.given_keys() if cfg.init else ():
        why = f"init={cfg.init} brings its own shape and weights; no backbone is made"
        config.require(key, OmegaConf.select(cfg, key), not key.startswith("backbone."), why)
    output = Path(cfg.output).expanduser()
    initial = output / INITIAL
    if OmegaConf.is_missing(cfg, "recipe"):
        raise bad_value("recipe", "???", f"model={cfg.model.name} names no recipe; give one, as in recipe=coconut")
    recipe = config.build("recipe", cfg.recipe)
    adapter = config.build("model", OmegaConf.merge(cfg.model, {"checkpoint": str(initial)}))
    if recipe.family != adapter.family:
        raise bad_value(
            "recipe",
            type(recipe).__name__.lower(),
            f"it trains {recipe.family} reasoners, and model={adapter.name} reads {adapter.family} checkpoints",
        )
    recipe.check(adapter)
    source = checkpoint.resolve(str(cfg.init), key="init") if cfg.init else None
    if output.exists() and not output.is_dir():
        raise bad_value("output", output, "a folder is wanted, this is a file")
    # these import torch: everything above has been checked without it
    backbone = config.build("backbone", cfg.backbone)
    optimization = config.build("optimization", cfg.optimization)
    output.mkdir(parents=True, exist_ok=True)
    from latent_tts.training.reasoner import loop
    from latent_tts.training.reasoner.initial import copy_checkpoint, prepare
    from latent_tts.training.reasoner.vocabulary import word_level_tokenizer

    def start(folder: Path) -> None:
        if source is not None:
            copy_checkpoint(source, folder)
        else:
            backbone.create(word_level_tokenizer([*words(), *recipe.words]), folder, cfg.seed)

    if not (output / loop.STATE).is_file():
        prepare(start, initial, recipe, cfg.seed)
    adapter.check()
    settings = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(settings, dict)
    for key in ("output", "save_every"):  # may change between a stop and going on
        settings.pop(key)
    valid = replace(task, split="valid", limit=cfg.valid_questions).questions()
    with report.progress_bar(recipe.updates, "updates") as bar:
        record = loop.train(
            recipe,
            adapter,
            task.stream(),
            valid,
            optimization,
            seed=cfg.seed,
            output=output,
            settings=json.loads(json.dumps(settings)),
            save_every=cfg.save_every,
            report=lambda done, record: report.show(bar, done, f"loss {record['loss']:.3f}"),
        )
    if "seconds" not in record:
        raise UsageError(f"output={output}: holds no trained state, and the recipe has no updates")
    loop.export(recipe, output, adapter, output / FINISHED)
    log.info(
        "%d updates in %.0f s, exact match on valid %.3f",
        record["update"],
        record["seconds"],
        record["valid_exact_match"],
    )
    print(output / FINISHED)
