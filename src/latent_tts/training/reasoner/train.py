"""Trains reasoners of every family, with new questions in every update, and writes the finished checkpoint.

All random numbers are keyed: problems by their index, epochs by their number, torch's dropout by a seed that is drawn
for each update.
"""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset
from transformers import TrainingArguments

from latent_tts.checkpoint import files
from latent_tts.checkpoint.adapter import CheckpointAdapter
from latent_tts.checkpoint.joining import probe, write_adapter
from latent_tts.random.philox import Stream, key_of, philox
from latent_tts.task.arith import words
from latent_tts.training.optimization import NO_LIMIT, ReasonerOptimization
from latent_tts.training.reasoner.backbone import BackboneConfig, word_level_tokenizer
from latent_tts.training.reasoner.batch import question_batches, token_batches
from latent_tts.training.reasoner.curriculum import Objective, Recipe, Stage
from latent_tts.training.reasoner.initial import (
    add_tensors,
    checkpoint_tensors,
    copy_checkpoint,
    write_initial_checkpoint,
)
from latent_tts.training.reasoner.lora import FULL, Lora, plain_settings
from latent_tts.training.reasoner.pace import LOG, Pace, Timed, of_first_process, read_log
from latent_tts.training.reasoner.questions import TrainingQuestions, check_lengths, token_lengths
from latent_tts.training.reasoner.validation import COVERAGE, GREEDY, Validation
from latent_tts.training.recompute import recomputing_blocks
from latent_tts.training.states import FINISHED, STATES, best_state, claim, last_state, read_state, resumable_state
from latent_tts.training.trainer import (
    Report,
    ResumableTrainer,
    load_parameters,
    trained_parameters,
    training_arguments,
)
from latent_tts.types import Computation, Question, Reasoner

MAX_VALID_BATCH, VALID_MICRO_BATCHES = 250, 4  # questions; so many micro-batches need less memory without gradients
METRIC = "eval_exact_match"
INITIAL = "initial"
PROBES, PROBE_TOKENS = 4, 12
log = logging.getLogger(__name__)


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
        size, parts = len(self.current), self.parts
        questions = self.current[part * size // parts : (part + 1) * size // parts]
        return {"questions": questions, "weight": len(questions) * parts / size}


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

    def joined_copy(self, dtype: str) -> Reasoner:
        """A copy as a run would load it, with the adapter joined in float32 and cast once."""
        kind, next_latent = getattr(torch, dtype), cast(Any, self.objective).next_latent
        lm: Any = copy.deepcopy(self.lm if self.adapted is None else self.adapted)
        lm = lm if self.adapted is None else lm.merge_and_unload()
        if isinstance(next_latent, nn.Module):
            next_latent = copy.deepcopy(next_latent).to(kind).eval()
        return Reasoner(lm.to(kind).eval().requires_grad_(False), next_latent)


class ReasonerTrainer(ResumableTrainer):
    """The Trainer for a recipe: its stages, dropout keyed by the update, validation."""

    def __init__(
        self,
        module: ReasonerModule,
        adapter: CheckpointAdapter,
        questions: TrainingQuestions,
        pace: Pace,
        validation: Validation | None,
        *,
        seed: int,
        valid_batch: int,
        **more: Any,
    ) -> None:
        """Create a trainer from what is trained on what, pace, validation by the engine, and seed of dropout.

        `valid_batch` questions are compared with their exact answers at once.
        """
        super().__init__(model=module, callbacks=[pace], **more)
        self.module, self.adapter, self.questions, self.pace = module, adapter, questions, pace
        self.validation, self.valid_batch, self.key = validation, valid_batch, key_of(seed, "training")
        self.computation = Computation()
        if validation is not None:
            self.computation = validation.prove(module, adapter, questions.valid)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any) -> Tensor:
        """The loss of a micro-batch in the stage of the current update."""
        update = self.state.global_step
        stage = self.pace.stage(update)
        for each in self.module.modules():
            if stage.dropout is not None and isinstance(each, nn.Dropout) and each.p > 0:
                each.p = stage.dropout
        part = len(self.micro_losses) * self.args.world_size + self.args.process_index
        torch.manual_seed(philox((update, part, 0, int(Stream.TRAINING)), self.key)[0])
        return self.checked(inputs["weight"] * model(inputs["questions"], stage))

    @torch.no_grad()
    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Share of validation questions answered exactly, in the stage of the last update, without dropout.

        With validation by the engine also its figures; the best weights of the last stage are kept as a state.
        """
        state: Any = self.state
        stage, valid = self.pace.stage(state.global_step - 1), self.questions.valid
        self.module.eval()
        parts = [valid[start : start + self.valid_batch] for start in range(0, len(valid), self.valid_batch)]
        figures = {METRIC: sum(self.module.objective.exact_matches(part, stage) for part in parts) / len(valid)}
        if self.validation is not None:
            reasoner = replace(self.module.joined_copy(self.validation.dtype), computation=self.computation)
            drawn = self.validation.measure(reasoner, self.adapter, stage, valid, self.questions.rule)
            figures |= drawn
            score, recipe = of_first_process(list(drawn.values())), self.pace.recipe
            in_last_stage = stage == recipe.stage_at(recipe.updates - 1)
            if in_last_stage and (state.best_metric is None or score > state.best_metric):
                state.best_metric, state.best_global_step = score, state.global_step
                self.control.should_save = True
        self.module.train()
        self.log(figures)
        self.control = self.callback_handler.on_evaluate(self.args, state, self.control, figures)
        return figures


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
) -> Path | None:
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
        The checkpoint folder; None in all processes of a launch except the first.

    Raises:
        UsageError: the initial checkpoint cannot be used, or the folder contains another run.
        RunError: a loss or gradient is not finite; the last state is kept.
        KeyboardInterrupt: Ctrl-C was pressed; the state is saved.
    """
    states, follow = output / STATES, optimization.follow
    followed = [] if follow is None else read_log(follow, recipe.updates)
    arguments = trainer_arguments(optimization, states, seed=seed, device=device)
    with arguments.main_process_first():
        claim(output, settings)
        last = resumable_state(states)
        if arguments.process_index == 0 and last is None:

            def make(folder: Path) -> None:
                if isinstance(start, Start):
                    texts = questions.texts if start.only_used else None
                    copy_checkpoint(start.folder, folder, recipe.tokens, recipe.new_tokens, texts)
                else:
                    start.create(word_level_tokenizer([*words(), *recipe.words]), folder, seed)

            write_initial_checkpoint(make, output / INITIAL, recipe, seed)
    adapter.check()
    check_lengths([*questions.finite, *questions.valid], adapter, adapter.latents)
    if optimization.minutes is None:
        pace = Pace(recipe, save_every, validation.every, followed)
    else:
        rows = [] if last is None else read_state(last)["stateful_callbacks"][Timed.__name__]["attributes"]["rows"]
        plan = recipe, save_every, validation.every, rows
        pace = Timed(*plan, minutes=optimization.minutes, share=validation.share, path=states / LOG)
    drawn = None if validation.every is None else validation
    new_tokens = lacking_tokens(start, recipe, adapter)
    trainer = train(
        adapter, questions, optimization, arguments, pace, last,
        seed=seed, report=report, lora=lora, new_tokens=new_tokens, validation=drawn,
    )  # fmt: skip
    if not trainer.is_world_process_zero():
        return None
    last = last_state(states)
    assert last is not None
    weights, folder = best_state(last), output / FINISHED
    if lora.rank is None:
        export(recipe, weights, adapter, folder)
    else:
        assert isinstance(start, Start)
        module = ReasonerModule(recipe.objective(adapter), lora, new_tokens, seed)
        load_parameters(module, weights)
        export_adapter(module, recipe.trained_with(), adapter, new_tokens, start.checkpoint, folder)
    chosen = read_state(weights)
    found = [entry for entry in chosen["log_history"] if METRIC in entry][-1]
    names = [METRIC] if drawn is None else [GREEDY, COVERAGE.format(validation.rollouts)]
    figures = [f"{name.removeprefix('eval_').replace('_', ' ')} {found[name]:.3f}" for name in names]
    done = chosen["global_step"], read_state(last)["global_step"]
    log.info("weights of update %d of %d; on valid: %s", *done, ", ".join(figures))
    return folder


def trainer_arguments(optimization: ReasonerOptimization, states: Path, *, seed: int, device: str) -> TrainingArguments:
    """The settings of the Trainer but for the number of updates; `Pace` decides when it evaluates and saves."""
    arguments = training_arguments(
        optimization,
        states,
        seed=seed,
        bf16=optimization.bf16,
        device=device,
        train_sampling_strategy="sequential",
        eval_strategy="no",
        save_strategy="steps",
        save_steps=NO_LIMIT,
        logging_steps=25,
    )
    arguments.per_device_train_batch_size = 1  # an item is a micro-batch
    return arguments


def train(
    adapter: CheckpointAdapter,
    questions: TrainingQuestions,
    optimization: ReasonerOptimization,
    arguments: TrainingArguments,
    pace: Pace,
    last: Path | None,
    *,
    seed: int,
    report: Report,
    lora: Lora = FULL,
    new_tokens: Sequence[int] = (),
    validation: Validation | None = None,
) -> ReasonerTrainer:
    """Train to the end of the recipe's stages, from the last state if there is one.

    Args:
        adapter: that of the initial checkpoint (the dropout in its config is active).
        questions: to train and validate on.
        optimization: batch, learning rate and so on.
        arguments: result of `trainer_arguments`.
        pace: the recipe, and the place of each update in it.
        last: the state to resume from.
        seed: seed of dropout.
        report: called as `report(updates_done, figures)` after every update.
        lora: the low-rank adapter, if it has a rank.
        new_tokens: ids whose rows are trained beside a low-rank adapter.
        validation: by the engine; None for exact match alone.

    Raises:
        RunError: a loss or gradient is not finite; the last state is kept.
        KeyboardInterrupt: Ctrl-C was pressed; the state is saved.
    """
    module = ReasonerModule(
        pace.recipe.objective(adapter), lora, new_tokens, seed, recompute=optimization.gradient_checkpointing
    )
    parts = arguments.world_size * optimization.accumulation
    batches = question_batches(questions.stream(), optimization.batch)
    if optimization.batch_tokens is not None:
        batches = token_batches(
            questions.stream(), questions=optimization.batch, tokens=optimization.batch_tokens, parts=parts, seed=seed,
            lengths=lambda question: token_lengths(question, adapter, adapter.latents),
        )  # fmt: skip
    trained = [parameter for _, parameter in trained_parameters(module)]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": optimization.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.98))  # `lr_at` returns the rate itself, not a factor
    arguments.max_steps = pace.limit
    arguments.save_total_limit = 1 if validation is None else 2  # the last state and the best one
    trainer = ReasonerTrainer(
        module,
        adapter,
        questions,
        pace,
        validation,
        seed=seed,
        valid_batch=min(MAX_VALID_BATCH, VALID_MICRO_BATCHES * max(1, optimization.batch // parts)),
        report=lambda done, figures: report(pace.planned(done - 1) + 1, figures),
        args=arguments,
        train_dataset=MicroBatches(batches, parts, pace.limit),
        data_collator=lambda items: items[0],
        optimizers=(optimizer, LambdaLR(optimizer, lambda update: optimization.lr_at(pace.place(update)))),
    )
    if last is None or not pace.finished(read_state(last)["global_step"]):
        trainer.fit(last)
    return trainer


def export(recipe: Recipe, state: Path, adapter: CheckpointAdapter, folder: Path) -> None:
    """Write the weights of a state as a checkpoint folder in bfloat16, with the tokenizer of the initial checkpoint."""
    module = ReasonerModule(recipe.objective(adapter))
    load_parameters(module, state)
    objective = module.objective
    objective.lm.config.latent_tts = recipe.trained_with()
    objective.lm.bfloat16().save_pretrained(folder)
    if objective.own:
        add_tensors(folder, "", objective.own.bfloat16())
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
    own = checkpoint_tensors("", module.objective.own)
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
