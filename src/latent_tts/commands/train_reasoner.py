"""`ltts train-reasoner`: train a reasoner by its family's recipe; re-run the command to resume a stopped run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from latent_tts.checkpoint import files as checkpoint
from latent_tts.checkpoint import joining
from latent_tts.config import build as config
from latent_tts.config.requests import plain
from latent_tts.errors import DEVICE, SEED, UsageError, bad_value, check_fields, computing, require
from latent_tts.results import report
from latent_tts.results.files import locked_folder
from latent_tts.task import Task
from latent_tts.task.arith import Arith
from latent_tts.training.reasoner.lora import Lora
from latent_tts.training.reasoner.questions import TrainingQuestions, training_questions
from latent_tts.training.states import STATES, log_once_per_launch

MAY_CHANGE = ("output", "save_every", "device")  # keys that a resumed run need not share with the stopped one


def main(cfg: DictConfig) -> None:
    """Train, then write the checkpoint folder and print its path.

    Raises:
        UsageError: a value is not usable, or the output folder holds another run or is another process's.
        RunError: the loss stopped being finite, or the device failed; the last state is kept.
    """
    with locked_folder(Path(cfg.output).expanduser(), "output"):
        train(cfg)


def train(cfg: DictConfig) -> None:
    """The command, in a folder that no other process writes to."""
    log_once_per_launch()
    check_values(cfg)
    task, lora = config.build("task", cfg.task), config.build("lora", cfg.lora)
    check_start(cfg, task, lora)
    output = Path(cfg.output).expanduser()
    recipe, adapter = build_recipe(cfg, output)
    optimization, validation = (
        config.build("optimization", cfg.optimization),
        config.build("validation", cfg.validation),
    )
    require(
        "validation.share",
        validation.share,
        optimization.minutes is not None or not config.is_given("validation.share"),
        "needs optimization.minutes: it bounds runs by the clock",
    )
    if adapter.family == "CoLaR":
        require(
            "validation.every",
            validation.every,
            validation.every is None,
            "must be null for CoLaR, whose exact match is drawn by the engine anyway",
        )
    questions = training_questions(
        task,
        valid_questions=cfg.valid_questions,
        seed=cfg.seed,
        step_results=getattr(recipe, "step_loss", 0) > 0,
    )
    if cfg.init_vocabulary == "used":
        require("init_vocabulary", "used", bool(questions.finite), f"must be all: task={task.name} is no finite set")
    source = joining.join_once(checkpoint.resolve(str(cfg.init), key="init"), "init") if cfg.init else None
    # these import torch: everything above has been checked without it
    backbone = config.build("backbone", cfg.backbone)
    from latent_tts.training.reasoner.train import Start, train_reasoner

    used = cfg.init_vocabulary == "used"
    start = backbone if source is None else Start(joining.lasting_name(str(cfg.init)), source, used)
    with (
        report.progress_bar(recipe.updates, "updates") as bar,
        computing("training", f"the states in {output / STATES} are kept"),
    ):
        trained = train_reasoner(
            recipe,
            adapter,
            start,
            questions,
            optimization,
            lora=lora,
            validation=validation,
            seed=cfg.seed,
            device=cfg.device,
            output=output,
            settings=shared_settings(cfg, questions),
            save_every=cfg.save_every,
            report=lambda done, figures: bar.show(done, f"loss {figures['loss']:.3f}"),
        )
    if trained is not None:  # in the first process of a launch
        print(trained)


def shared_settings(cfg: DictConfig, questions: TrainingQuestions) -> dict[str, Any]:
    """What a resumed run must share with the stopped one: its settings, and its questions wherever their file is."""
    settings = {key: value for key, value in plain(cfg).items() if key not in MAY_CHANGE}
    settings["task"] = {key: value for key, value in settings["task"].items() if key != "path"}
    return settings | {"question_set": questions.digest}


def check_values(cfg: DictConfig) -> None:
    """Check the command's own keys.

    Raises:
        UsageError: a value is not allowed.
    """
    counts = dict.fromkeys(("save_every", "valid_questions"), "a positive integer")
    check_fields("", cfg, **counts, init_vocabulary=("all", "used"), seed=SEED, device=DEVICE)
    if config.is_given("model.checkpoint"):
        raise bad_value("model.checkpoint", cfg.model.checkpoint, f"to train from it give init={cfg.model.checkpoint}")


def check_start(cfg: DictConfig, task: Task, lora: Lora) -> None:
    """Check that nothing is asked of a new backbone that only `init` has, and the other way round.

    Raises:
        UsageError: something is.
    """
    if cfg.init:
        for key, value in config.given_values().items():
            require(
                key,
                value,
                not key.startswith("backbone."),
                f"init={cfg.init} brings its own shape and weights; no backbone is made",
            )
        return
    require(
        "task", task.name, isinstance(task, Arith), "must be arith without init=: a new backbone knows only its words"
    )
    require("lora.rank", lora.rank, lora.rank is None, "must be null without init=: a new backbone has no base")
    require("init_vocabulary", cfg.init_vocabulary, cfg.init_vocabulary == "all", "must be all without init=")


def build_recipe(cfg: DictConfig, output: Path) -> tuple[Any, Any]:
    """The recipe, and the adapter of the checkpoint that training starts from.

    Raises:
        UsageError: there is none, or both do not fit.
    """
    if OmegaConf.is_missing(cfg, "recipe"):
        raise UsageError(f"recipe: model={cfg.model.name} names no recipe; give one, as in recipe=coconut")
    recipe = config.build("recipe", cfg.recipe)
    name = type(recipe).__name__.lower()
    require("recipe", name, recipe.updates >= 1, "must have at least one update")
    adapter = config.build("model", OmegaConf.merge(cfg.model, {"checkpoint": str(output / "initial")}))
    require(
        "recipe",
        name,
        recipe.family == adapter.family,
        f"it trains {recipe.family} reasoners, and model={adapter.name} reads {adapter.family} checkpoints",
    )
    return recipe, adapter
