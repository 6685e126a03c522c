"""Trains reasoners of every family, with new questions in every update, and writes the finished checkpoint.

All random numbers are keyed: problems by their index, torch's dropout by a seed that is drawn for each update.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainingArguments

from latent_tts.checkpoint import files
from latent_tts.checkpoint.adapter import CheckpointAdapter
from latent_tts.errors import bad_value
from latent_tts.random.philox import Stream, key_of, philox
from latent_tts.task.arith import Arith, words
from latent_tts.training.core import Report, ResumableTrainer, training_arguments
from latent_tts.training.reasoner.backbone import BackboneConfig
from latent_tts.training.reasoner.batch import question_batches
from latent_tts.training.reasoner.curriculum import Objective, Recipe, Stage
from latent_tts.training.reasoner.initial import add_tensors, copy_checkpoint, write_initial_checkpoint
from latent_tts.training.reasoner.optimization import ReasonerOptimization
from latent_tts.training.reasoner.vocabulary import word_level_tokenizer
from latent_tts.training.states import FINISHED, STATES, claim, clean_states, last_state, read_state
from latent_tts.types import Question

VALID_BATCH = 250
METRIC = "eval_exact_match"
INITIAL = "initial"
OLD_STATE = "state.safetensors"


@dataclass(frozen=True)
class TrainedReasoner:
    """A finished training.

    Attributes:
        checkpoint: the checkpoint folder.
        updates: number of updates.
        exact_match: share of the validation questions answered exactly.
    """

    checkpoint: Path
    updates: int
    exact_match: float


class QuestionOrder(Dataset):
    """The training questions in the order of the updates; they can only be read forwards."""

    def __init__(self, stream: Iterator[Question], batch: int, updates: int) -> None:
        self.batches, self.batch, self.updates = question_batches(stream, batch), batch, updates
        self.number, self.current = -1, []

    def __len__(self) -> int:
        return self.batch * self.updates

    def __getitem__(self, place: int) -> Question:
        number, within = divmod(place, self.batch)
        while self.number < number:
            self.number, self.current = self.number + 1, next(self.batches)
        assert self.number == number
        return self.current[within]


class ReasonerModule(nn.Module):
    """All trained weights as one module: the causal LM and the modules that the family adds.

    Attributes:
        objective: the loss.
    """

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.lm, self.own, self.objective = objective.lm, objective.own, objective

    def forward(self, questions: list[Question], stage: Stage) -> Tensor:
        """The loss of a batch."""
        return self.objective.loss(questions, stage)

    def set_dropout(self, rate: float) -> None:
        """Set the rate of every active dropout module."""
        for module in self.modules():
            if isinstance(module, nn.Dropout) and module.p > 0:
                module.p = rate

    @torch.no_grad()
    def exact_match(self, questions: list[Question], stage: Stage) -> float:
        """Share of questions answered exactly, without dropout."""
        self.eval()
        starts = range(0, len(questions), VALID_BATCH)
        hits = sum(self.objective.exact_matches(questions[start : start + VALID_BATCH], stage) for start in starts)
        self.train()
        return hits / len(questions)


class ReasonerTrainer(ResumableTrainer):
    """The Trainer for a recipe: its stages, dropout keyed by the update, evaluation by exact match."""

    def __init__(
        self, recipe: Recipe, module: ReasonerModule, valid: list[Question], *, seed: int, save_every: int, **more: Any
    ) -> None:
        """Create a trainer from recipe, module, validation questions, seed of dropout, and updates between states."""
        super().__init__(model=module, callbacks=[_SaveCallback(recipe, save_every)], **more)
        self.recipe, self.module, self.valid, self.key = recipe, module, valid, key_of(seed, "training")

    def loss_of(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, None]:
        """The loss in the stage of the current update."""
        update = self.state.global_step
        stage = self.recipe.stage_at(update)
        if stage.dropout is not None:
            self.module.set_dropout(stage.dropout)
        counter = (update, len(self.micro_losses), self.args.process_index, int(Stream.TRAINING))
        torch.manual_seed(philox(counter, self.key)[0])
        return model(inputs["questions"], stage), None

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Exact match on the validation questions, in the stage of the last update."""
        stage = self.recipe.stage_at(self.state.global_step - 1)
        figures = {METRIC: self.module.exact_match(self.valid, stage)}
        self.log(figures)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, figures)
        return figures


class _SaveCallback(TrainerCallback):
    """Evaluates and saves every few updates and at the end of each stage."""

    def __init__(self, recipe: Recipe, save_every: int) -> None:
        self.recipe, self.save_every = recipe, save_every

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        done = state.global_step
        ends = done == self.recipe.updates or self.recipe.stage_at(done) != self.recipe.stage_at(done - 1)
        if ends or done % self.save_every == 0:
            control.should_evaluate = control.should_save = True


def train_reasoner(
    recipe: Recipe,
    adapter: CheckpointAdapter,
    start: Path | BackboneConfig,
    task: Arith,
    optimization: ReasonerOptimization,
    *,
    valid_questions: int,
    seed: int,
    device: str,
    output: Path,
    settings: dict,
    save_every: int,
    report: Report,
) -> TrainedReasoner | None:
    """Train a reasoner to the end of its recipe and write its checkpoint; resumes a run that was stopped.

    Args:
        recipe: the stages and the objective.
        adapter: that of the initial checkpoint, which is written to `output`/initial.
        start: the checkpoint to start from, or the size of a new backbone.
        task: the training questions.
        optimization: batch, learning rate and so on.
        valid_questions: number of questions of the validation split on which exact match is measured.
        seed: seed of new weights and dropout.
        device: `auto`, `cpu`, `cuda` or `cuda:INDEX`.
        output: folder for `settings.json`, the initial checkpoint, the states and the finished checkpoint.
        settings: the settings that a resumed run must share with the stopped one.
        save_every: number of updates between saved states.
        report: called as `report(updates_done, figures)` after every update.

    Returns:
        The trained reasoner; None in all processes of a launch except the first.

    Raises:
        UsageError: the initial checkpoint cannot be used, or the folder contains another run.
        RunError: a loss or gradient is not finite; the last state is kept.
        KeyboardInterrupt: Ctrl-C was pressed; the state is saved.
    """
    arguments = trainer_arguments(recipe, optimization, output / STATES, seed=seed, device=device)
    with arguments.main_process_first():
        if (output / OLD_STATE).is_file():
            raise bad_value("output", output, f"contains a {OLD_STATE} of an earlier version; choose another folder")
        claim(output, settings)
        clean_states(output / STATES)
        if arguments.process_index == 0 and last_state(output / STATES) is None:

            def make(folder: Path) -> None:
                if isinstance(start, Path):
                    copy_checkpoint(start, folder)
                else:
                    start.create(word_level_tokenizer([*words(), *recipe.words]), folder, seed)

            write_initial_checkpoint(make, output / INITIAL, recipe, seed)
    adapter.check()
    valid = replace(task, split="valid", limit=valid_questions).questions()
    trainer = train(
        recipe, adapter, task.stream(), valid, optimization, arguments,
        seed=seed, save_every=save_every, report=report,
    )  # fmt: skip
    last = last_state(output / STATES)
    assert last is not None
    if not trainer.is_world_process_zero():
        return None
    export(recipe, last, adapter, output / FINISHED)
    figures = [entry[METRIC] for entry in read_state(last)["log_history"] if METRIC in entry]
    return TrainedReasoner(output / FINISHED, recipe.updates, figures[-1])


def trainer_arguments(
    recipe: Recipe, optimization: ReasonerOptimization, states: Path, *, seed: int, device: str
) -> TrainingArguments:
    """The settings of the Trainer; callbacks decide when it evaluates and saves."""
    return training_arguments(
        optimization,
        states,
        seed=seed,
        bf16=optimization.bf16,
        device=device,
        max_steps=recipe.updates,
        train_sampling_strategy="sequential",
        eval_strategy="no",
        save_strategy="no",
        save_total_limit=1,
        logging_steps=25,
    )


def train(
    recipe: Recipe,
    adapter: CheckpointAdapter,
    stream: Iterator[Question],
    valid: list[Question],
    optimization: ReasonerOptimization,
    arguments: TrainingArguments,
    *,
    seed: int,
    save_every: int,
    report: Report,
) -> ReasonerTrainer:
    """Train to the end of the recipe's stages, from the last state if there is one.

    Args:
        recipe: the stages and the objective.
        adapter: that of the initial checkpoint (the dropout in its config is active).
        stream: endless training questions, always the same in the same order.
        valid: validation questions for exact match.
        optimization: batch, learning rate and so on.
        arguments: result of `trainer_arguments`.
        seed: seed of dropout.
        save_every: number of updates between saved states.
        report: called as `report(updates_done, figures)` after every update.

    Raises:
        RunError: a loss or gradient is not finite; the last state is kept.
        KeyboardInterrupt: Ctrl-C was pressed; the state is saved.
    """
    module = ReasonerModule(recipe.objective(adapter))
    decayed = [p for p in module.parameters() if p.dim() >= 2]
    others = [p for p in module.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": optimization.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.98))  # `lr_at` returns the rate itself, not a factor
    trainer = ReasonerTrainer(
        recipe,
        module,
        valid,
        seed=seed,
        save_every=save_every,
        report=report,
        args=arguments,
        train_dataset=QuestionOrder(stream, optimization.batch, recipe.updates),
        data_collator=lambda questions: {"questions": questions},
        optimizers=(optimizer, LambdaLR(optimizer, lambda update: optimization.lr_at(update))),
    )
    last = last_state(Path(str(arguments.output_dir)))
    if last is None or read_state(last)["global_step"] < recipe.updates:
        trainer.fit()
    return trainer


def export(recipe: Recipe, state: Path, adapter: CheckpointAdapter, folder: Path) -> None:
    """Write the weights of a state as a checkpoint folder in bfloat16, with the tokenizer of the initial checkpoint."""
    module = ReasonerModule(recipe.objective(adapter))
    weights = load_file(state / files.WEIGHTS)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(weights[name])
    objective = module.objective
    objective.lm.config.latent_tts = recipe.trained_with(adapter)
    objective.lm.bfloat16().save_pretrained(folder)
    for prefix, own in objective.own.items():
        add_tensors(folder, f"{prefix}.", own.bfloat16())
    shutil.copyfile(adapter.folder / "tokenizer.json", folder / "tokenizer.json")
