"""Trains reasoners of every family, with new questions in every update, and writes the finished checkpoint.

All random numbers are keyed: problems by their index, epochs by their number, torch's dropout by a seed that is drawn
for each update.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainingArguments

from latent_tts.checkpoint import files
from latent_tts.checkpoint.adapter import CheckpointAdapter
from latent_tts.checkpoint.joining import probe, write_adapter
from latent_tts.engine.proof import prove_reasoner
from latent_tts.errors import UsageError, bad_value, require
from latent_tts.random.philox import Stream, key_of, philox
from latent_tts.task.arith import words
from latent_tts.text.answer import AnswerRule
from latent_tts.training.reasoner.backbone import BackboneConfig
from latent_tts.training.reasoner.batch import TokenBudget, micro_batch, question_batches
from latent_tts.training.reasoner.curriculum import Objective, Recipe, Stage
from latent_tts.training.reasoner.initial import (
    add_tensors,
    checkpoint_tensors,
    copy_checkpoint,
    write_initial_checkpoint,
)
from latent_tts.training.reasoner.lora import FULL, Lora, plain_settings
from latent_tts.training.reasoner.optimization import ReasonerOptimization
from latent_tts.training.reasoner.pace import LOG, Pace, Timed, pace_of
from latent_tts.training.reasoner.questions import TrainingQuestions, check_lengths, token_lengths
from latent_tts.training.reasoner.validation import (
    Validation,
    best_weights,
    forget_best_after,
    joined_copy,
    keep_if_best,
    read_best,
)
from latent_tts.training.reasoner.vocabulary import word_level_tokenizer
from latent_tts.training.recompute import blocks_of, recomputing_blocks
from latent_tts.training.states import FINISHED, STATES, claim, clean_states, last_state, read_state, set_state_aside
from latent_tts.training.trainer import (
    Report,
    ResumableTrainer,
    load_parameters,
    trained_parameters,
    training_arguments,
)
from latent_tts.types import Computation, Question

MAX_VALID_BATCH, VALID_MICRO_BATCHES = 250, 4  # questions; so many micro-batches need less memory without gradients
METRIC = "eval_exact_match"
INITIAL = "initial"
OLD_STATE = "state.safetensors"
PROBES, PROBE_TOKENS = 4, 12
LENGTHS_KEPT = 100_000  # of questions; sorting asks for each several times
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainedReasoner:
    """A finished training.

    Attributes:
        checkpoint: the checkpoint folder.
        weights: the folder of the weights that were chosen for it.
        updates: number of updates.
        chosen: the update that the weights in the checkpoint are of.
        figures: what they reached on the validation questions.
    """

    checkpoint: Path
    weights: Path
    updates: int
    chosen: int
    figures: Mapping[str, float]


@dataclass(frozen=True)
class Start:
    """The checkpoint that training starts from.

    Attributes:
        checkpoint: as the user named it.
        folder: where it lies.
        only_used: whether the vocabulary is cut to the tokens of the questions.
    """

    checkpoint: str
    folder: Path
    only_used: bool = False


@dataclass(frozen=True)
class DrawnValidation:
    """Validation by the engine.

    Attributes:
        settings: when and how.
        adapter: how prompts are written and answers read.
        rule: of the task.
    """

    settings: Validation
    adapter: CheckpointAdapter
    rule: AnswerRule

    def prove(self, module: ReasonerModule, questions: Sequence[Question]) -> Computation:
        """How the engine has to compute the model, which depends on its architecture and on the longest sequence.

        Raises:
            UsageError: the engine computes it in no way as it computes itself.
        """
        adapter = self.adapter
        after = adapter.latents + len(adapter.thinking_end_ids) + self.settings.max_answer_tokens
        longest = max(len(adapter.encode(question)) for question in questions) + after
        try:
            found = prove_reasoner(joined_copy(module, "float32"), longest)
        except UsageError as error:
            raise bad_value("validation.every", self.settings.every, f"must be null: {error}") from error
        if found.reason:
            log.warning("validation takes longer: %s", found.reason)
        return found


class MicroBatches(Dataset):
    """The micro-batches of all updates in order, those of one update after one another; they are only read forwards."""

    def __init__(self, batches: Iterator[list[Question]], parts: int, updates: int) -> None:
        """Take the questions of each update, its number of micro-batches in all processes, and the updates."""
        self.batches, self.parts, self.updates = batches, parts, updates
        self.number, self.current = -1, []

    def __len__(self) -> int:
        return self.parts * self.updates

    def __getitem__(self, place: int) -> dict[str, Any]:
        """The questions of a micro-batch, and the weight of its loss in the mean over the update's."""
        number, part = divmod(place, self.parts)
        while self.number < number:
            self.number, self.current = self.number + 1, next(self.batches)
        assert self.number == number
        questions = micro_batch(self.current, part, self.parts)
        return {"questions": questions, "weight": len(questions) * self.parts / len(self.current)}


class ReasonerModule(nn.Module):
    """All trained weights as one module: the causal LM and the modules that the family adds.

    Attributes:
        objective: the loss.
        adapted: PEFT's model around the causal LM; None where all weights are trained.
        recompute: whether the backward pass computes activations again.
    """

    adapted: Any

    def __init__(
        self,
        objective: Objective,
        lora: Lora = FULL,
        new_tokens: Sequence[int] = (),
        seed: int = 0,
        *,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.recompute = recompute
        self.lm, self.own, self.objective = objective.lm, objective.own, objective
        # not registered as a module: it has the same weights
        self.__dict__["adapted"] = lora.attach(objective.lm, new_tokens, seed)

    def forward(self, questions: list[Question], stage: Stage) -> Tensor:
        """The loss of a batch."""
        with recomputing_blocks(self.lm, self.recompute):
            return self.objective.loss(questions, stage)

    def set_dropout(self, rate: float) -> None:
        """Set the rate of every active dropout module."""
        for module in self.modules():
            if isinstance(module, nn.Dropout) and module.p > 0:
                module.p = rate

    @torch.no_grad()
    def exact_match(self, questions: list[Question], stage: Stage, batch: int) -> float:
        """Share of questions answered exactly, without dropout, so many at once."""
        self.eval()
        starts = range(0, len(questions), batch)
        hits = sum(self.objective.exact_matches(questions[start : start + batch], stage) for start in starts)
        self.train()
        return hits / len(questions)


class ReasonerTrainer(ResumableTrainer):
    """The Trainer for a recipe: its stages, dropout keyed by the update, evaluation by exact match."""

    def __init__(
        self,
        recipe: Recipe,
        module: ReasonerModule,
        valid: list[Question],
        *,
        pace: Pace,
        drawn: DrawnValidation | None,
        seed: int,
        save_every: int,
        valid_batch: int,
        **more: Any,
    ) -> None:
        """Create a trainer from recipe, module, validation, pace, seed of dropout, and updates between states.

        `valid_batch` questions are compared with their exact answers at once.
        """
        every = None if drawn is None else drawn.settings.every
        super().__init__(model=module, callbacks=[_SaveCallback(recipe, pace, save_every, every)], **more)
        self.recipe, self.module, self.valid, self.key = recipe, module, valid, key_of(seed, "training")
        self.pace, self.drawn, self.computation = pace, drawn, Computation()
        self.valid_batch = valid_batch
        if drawn is not None:
            self.computation = drawn.prove(module, valid)

    def loss_of(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, None]:
        """The loss in the stage of the current update."""
        update = self.state.global_step
        stage = self.recipe.stage_at(self.pace.planned(update))
        if stage.dropout is not None:
            self.module.set_dropout(stage.dropout)
        part = len(self.micro_losses) * self.args.world_size + self.args.process_index
        torch.manual_seed(philox((update, part, 0, int(Stream.TRAINING)), self.key)[0])
        return inputs["weight"] * model(inputs["questions"], stage), None

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Exact match on the validation questions, in the stage of the last update."""
        stage = self.recipe.stage_at(self.pace.planned(self.state.global_step - 1))
        with self.pace.validating(of_first_process):
            figures = {METRIC: self.module.exact_match(self.valid, stage, self.valid_batch)}
            if self.drawn is not None:
                figures |= self._draw(self.drawn, stage)
        self.log(figures)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, figures)
        return figures

    def _draw(self, drawn: DrawnValidation, stage: Stage) -> dict[str, float]:
        """Accuracy and coverage of the weights so far, by the engine; keeps the best of the last stage with updates."""
        self.module.eval()
        reasoner = replace(joined_copy(self.module, drawn.settings.dtype), computation=self.computation)
        figures = drawn.settings.measure(reasoner, drawn.adapter, stage, self.valid, drawn.rule)
        self.module.train()
        if stage == self.recipe.stage_at(self.recipe.updates - 1) and self.is_world_process_zero():
            weights = {name: value.detach().cpu() for name, value in trained_parameters(self.module)}
            keep_if_best(Path(str(self.args.output_dir)), weights, self.state.global_step, figures)
        return figures


class _SaveCallback(TrainerCallback):
    """Evaluates and saves every few updates, at the end of each stage and of the run; keeps the pace."""

    def __init__(self, recipe: Recipe, pace: Pace, save_every: int, validate_every: int | None) -> None:
        self.recipe, self.pace, self.save_every = recipe, pace, save_every
        self.validate_every = validate_every
        self.lr = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.pace.start()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.lr = kwargs["optimizer"].param_groups[0]["lr"]
        self.pace.stop(state.global_step, of_first_process)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        done, pace, recipe = state.global_step, self.pace, self.recipe
        over = pace.finished(done)
        control.should_training_stop = control.should_training_stop or over
        ends = over or recipe.stage_at(pace.planned(done)) != recipe.stage_at(pace.planned(done - 1))
        saves = ends or done % self.save_every == 0
        validates = saves or (self.validate_every is not None and done % self.validate_every == 0)
        if validates and not over:
            validates = pace.may_validate(done - 1)
        if args.process_index == 0:
            stage = recipe.stage_at(pace.planned(done - 1))
            figures = {"latents": stage.latents, "hidden_steps": stage.hidden_steps, "lr": self.lr}
            pace.log(done - 1, figures | {"validated": validates})
        control.should_evaluate = control.should_evaluate or validates
        control.should_save = control.should_save or saves or bool(of_first_process(pace.wants_saving()))


def of_first_process(number: float) -> float:
    """A number of the first process of a launch, in all processes."""
    return broadcast_object_list([number])[0]


def train_reasoner(
    recipe: Recipe,
    adapter: CheckpointAdapter,
    start: Start | BackboneConfig,
    questions: TrainingQuestions,
    optimization: ReasonerOptimization,
    *,
    lora: Lora,
    validation: Validation,
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
        questions: to train and validate on.
        optimization: batch, learning rate and so on.
        lora: the low-rank adapter that is trained in place of the weights, if it has a rank.
        validation: by the engine; it chooses the weights that become the checkpoint. Off without `every`.
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
    pace = pace_of(recipe.updates, optimization.minutes, optimization.follow, output / STATES, validation.share)
    arguments = trainer_arguments(recipe, optimization, output / STATES, seed=seed, device=device, max_steps=pace.limit)
    with arguments.main_process_first():
        claim_folder(output, settings, pace)
        if arguments.process_index == 0 and last_state(output / STATES) is None:

            def make(folder: Path) -> None:
                if isinstance(start, Start):
                    texts = questions.texts if start.only_used else None
                    copy_checkpoint(start.folder, folder, recipe.tokens, recipe.new_tokens, texts)
                else:
                    start.create(word_level_tokenizer([*words(), *recipe.words]), folder, seed)

            write_initial_checkpoint(make, output / INITIAL, recipe, seed)
    adapter.check()
    check_lengths([*questions.finite, *questions.valid], adapter, adapter.latents)
    new_tokens = lacking_tokens(start, recipe, adapter)
    trainer = train(
        recipe, adapter, questions.stream(), questions.valid, optimization, arguments,
        lora=lora, new_tokens=new_tokens, seed=seed, save_every=save_every, report=report, pace=pace,
        drawn=None if validation.every is None else DrawnValidation(validation, adapter, questions.rule),
    )  # fmt: skip
    if not trainer.is_world_process_zero():
        return None
    trained = chosen_state(output, drawn=validation.every is not None)
    if lora.rank is None:
        export(recipe, trained.weights, adapter, trained.checkpoint)
    else:
        assert isinstance(start, Start)
        module = ReasonerModule(recipe.objective(adapter), lora, new_tokens, seed)
        load_parameters(module, trained.weights)
        trained_with = recipe.trained_with(adapter)
        export_adapter(module, trained_with, adapter, new_tokens, start.checkpoint, trained.checkpoint)
    return trained


def claim_folder(output: Path, settings: dict, pace: Pace) -> None:
    """Claim a folder, and set aside the states in it that no training can resume from; processes do so in turn.

    Raises:
        UsageError: it contains another run.
    """
    allowed = f"contains a {OLD_STATE} of an earlier version; choose another folder"
    require("output", output, not (output / OLD_STATE).is_file(), allowed)
    claim(output, settings)
    clean_states(output / STATES)
    while (last := last_state(output / STATES)) is not None and read_state(last)["global_step"] > pace.known():
        why = f"is of update {read_state(last)['global_step']}, but {LOG} is whole to {pace.known()}"
        set_state_aside(last, why)
    if isinstance(pace, Timed):
        forget_best_after(output / STATES, 0 if last is None else read_state(last)["global_step"])


def chosen_state(output: Path, *, drawn: bool) -> TrainedReasoner:
    """The weights that become the checkpoint: of the last state, or the best that a drawn validation found."""
    last = last_state(output / STATES)
    assert last is not None
    updates, best = read_state(last)["global_step"], read_best(output / STATES) if drawn else None
    weights = best_weights(output / STATES) if drawn else last
    if best is not None:
        return TrainedReasoner(output / FINISHED, weights, updates, best["update"], best["figures"])
    figures = [entry[METRIC] for entry in read_state(last)["log_history"] if METRIC in entry]
    return TrainedReasoner(output / FINISHED, weights, updates, updates, {METRIC: figures[-1]})


def trainer_arguments(
    recipe: Recipe,
    optimization: ReasonerOptimization,
    states: Path,
    *,
    seed: int,
    device: str,
    max_steps: int | None = None,
) -> TrainingArguments:
    """The settings of the Trainer; callbacks decide when it evaluates and saves. By default it does all updates."""
    arguments = training_arguments(
        optimization,
        states,
        seed=seed,
        bf16=optimization.bf16,
        device=device,
        max_steps=recipe.updates if max_steps is None else max_steps,
        train_sampling_strategy="sequential",
        eval_strategy="no",
        save_strategy="no",
        save_total_limit=1,
        logging_steps=25,
    )
    arguments.per_device_train_batch_size = 1  # an item is a micro-batch
    return arguments


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
    lora: Lora = FULL,
    new_tokens: Sequence[int] = (),
    pace: Pace | None = None,
    drawn: DrawnValidation | None = None,
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
        lora: the low-rank adapter, if it has a rank.
        new_tokens: ids whose rows are trained beside a low-rank adapter.
        pace: the place of each update in the recipe; None counts updates.
        drawn: validation by the engine; None for exact match alone.

    Raises:
        RunError: a loss or gradient is not finite; the last state is kept.
        KeyboardInterrupt: Ctrl-C was pressed; the state is saved.
    """
    pace = pace or Pace(recipe.updates)
    last = last_state(Path(str(arguments.output_dir)))
    done = 0 if last is None else read_state(last)["global_step"]
    pace.resume(done)
    recompute = optimization.gradient_checkpointing
    module = ReasonerModule(recipe.objective(adapter), lora, new_tokens, seed, recompute=recompute)
    if recompute:
        blocks_of(module.lm)
    parts = arguments.world_size * optimization.accumulation
    batches = question_batches(stream, optimization.batch)
    if optimization.batch_tokens is not None:
        lengths = lru_cache(LENGTHS_KEPT)(lambda question: token_lengths(question, adapter, adapter.latents))
        batches = TokenBudget(optimization.batch, optimization.batch_tokens, parts, lengths, seed).batches(stream)
    trained = [parameter for _, parameter in trained_parameters(module)]
    decayed = [p for p in trained if p.dim() >= 2]
    others = [p for p in trained if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": optimization.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.98))  # `lr_at` returns the rate itself, not a factor
    trainer = ReasonerTrainer(
        recipe,
        module,
        valid,
        pace=pace,
        drawn=drawn,
        seed=seed,
        save_every=save_every,
        valid_batch=min(MAX_VALID_BATCH, VALID_MICRO_BATCHES * max(1, optimization.batch // parts)),
        report=lambda done, figures: report(pace.planned(done - 1) + 1, figures),
        args=arguments,
        train_dataset=MicroBatches(batches, parts, pace.limit),
        data_collator=lambda items: items[0],
        optimizers=(optimizer, LambdaLR(optimizer, lambda update: optimization.lr_at(pace.place(update)))),
    )
    if not pace.finished(done):
        trainer.fit()
    return trainer


def export(recipe: Recipe, state: Path, adapter: CheckpointAdapter, folder: Path) -> None:
    """Write the weights of a state as a checkpoint folder in bfloat16, with the tokenizer of the initial checkpoint."""
    module = ReasonerModule(recipe.objective(adapter))
    load_parameters(module, state)
    objective = module.objective
    objective.lm.config.latent_tts = recipe.trained_with(adapter)
    objective.lm.bfloat16().save_pretrained(folder)
    for prefix, own in objective.own.items():
        add_tensors(folder, f"{prefix}.", own.bfloat16())
    shutil.copyfile(adapter.folder / "tokenizer.json", folder / "tokenizer.json")
    files.copy_beside_tokenizer(adapter.folder, folder)


def lacking_tokens(start: Start | BackboneConfig, recipe: Recipe, adapter: CheckpointAdapter) -> list[int]:
    """The ids of the recipe's tokens that the model to start from lacks."""
    if not isinstance(start, Start):
        return []
    old = files.load_tokenizer(start.folder, key="init")
    lacking = [token for token in recipe.tokens if old.token_to_id(token) is None]
    return [files.token_id(adapter.tokenizer, token, adapter.folder) for token in lacking]


@torch.no_grad()
def export_adapter(
    module: ReasonerModule,
    trained_with: dict[str, Any],
    adapter: CheckpointAdapter,
    new_tokens: Sequence[int],
    base: str,
    folder: Path,
) -> None:
    """Write a trained low-rank adapter in bfloat16, with the probe of the model as its rounded weights make it.

    The probe reads and writes the new tokens, so that it finds rows in another order.
    """
    from peft import get_peft_model_state_dict

    for _, parameter in trained_parameters(module):
        parameter.copy_(parameter.bfloat16())
    module.eval()
    state = get_peft_model_state_dict(module.adapted, save_embedding_layers=False)
    own = {}
    for prefix, part in module.objective.own.items():
        own |= checkpoint_tensors(f"{prefix}.", part)
    vocabulary = int(module.lm.config.vocab_size)
    prompts_PL = torch.arange(PROBES * PROBE_TOKENS).reshape(PROBES, PROBE_TOKENS) * 7919 % vocabulary
    if new_tokens:
        prompts_PL[:, -len(new_tokens) :] = torch.tensor(new_tokens)
    found = probe(module.lm.cpu(), prompts_PL, max(1, adapter.latents), prompts_PL.unique())
    of_projector = ("projector", "projector_hidden_size") if any(name.startswith("projector.") for name in own) else ()
    config = {"latent_tts": trained_with} | {
        name: value for name, value in adapter.config.items() if name.endswith("_token_id") or name in of_projector
    }
    write_adapter(
        folder, base, adapter.folder / "tokenizer.json",
        {name: value.detach().cpu().bfloat16().contiguous() for name, value in state.items()},
        plain_settings(module.adapted),
        {name: value.bfloat16() for name, value in own.items()}, found, config, "init",
    )  # fmt: skip
