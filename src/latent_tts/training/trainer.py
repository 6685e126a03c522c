"""Shared by the trainings of reasoners and LatentRMs: devices, accumulation, states, resuming, Ctrl-C, finite values.

It is built on transformers' Trainer, which adds mixed precision and, with `accelerate launch`, several processes.
"""

from __future__ import annotations

import logging
import math
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback
from transformers.utils import logging as transformers_logging

from latent_tts.checkpoint import files
from latent_tts.checkpoint.loading import compute_exactly
from latent_tts.engine.device import resolve_device
from latent_tts.errors import LatentTTSError, RunError, UsageError, bad_value, require
from latent_tts.training.optimization import NO_LIMIT, Optimization
from latent_tts.training.states import last_state, write_digests

SHARDING = ("DEEPSPEED", "FSDP", "MEGATRON_LM")  # as in the variables of `accelerate launch`
log = logging.getLogger(__name__)
Report = Callable[[int, Mapping[str, float]], None]  # report(updates_done, figures), called after every update


def training_arguments(
    optimization: Optimization, states: Path, *, seed: int, bf16: bool, device: str, **more: Any
) -> TrainingArguments:
    """The Trainer's settings that both of these trainings share.

    Args:
        optimization: batch, accumulation, learning rate, clipping.
        states: folder of the saved states.
        seed: seed of the order of questions, if it is random.
        bf16: whether the forward pass runs under bfloat16 autocast.
        device: `auto`, `cpu`, `cuda` or `cuda:INDEX`.
        more: further settings.

    Raises:
        UsageError: the machine does not have the device, the batch cannot be divided among the processes, or they are
            launched to share a model's weights.
    """
    for kind in SHARDING:
        if os.environ.get(f"ACCELERATE_USE_{kind}", "").lower() == "true":
            raise UsageError(
                f"accelerate launch with {kind}: each process has to hold the whole model; choose --multi_gpu"
            )
    transformers_logging.set_verbosity_error()
    compute_exactly()
    target = torch.device(resolve_device("device", device))
    arguments = TrainingArguments(
        output_dir=str(states),
        use_cpu=target.type == "cpu",
        seed=seed,
        bf16=bf16,
        gradient_accumulation_steps=optimization.accumulation,
        learning_rate=optimization.lr,
        weight_decay=optimization.weight_decay,
        max_grad_norm=optimization.clip,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=target.type == "cuda",
        **more,
    )
    arguments.mixed_precision = "bf16" if bf16 else "no"  # not what `accelerate config` says
    processes = arguments.world_size
    if target.type == "cuda" and processes == 1:
        # the Trainer would use the first GPU, or DataParallel on all
        torch.cuda.set_device(target)
        arguments._n_gpu = 1
        arguments.distributed_state.device = target  # pyright: ignore[reportOptionalMemberAccess]
        arguments.__dict__["_setup_devices"] = target
    elif ":" in device:
        raise bad_value(
            "device", device, f"must be auto, cpu or cuda: each of the {processes} processes uses its own device"
        )
    shares = processes * optimization.accumulation
    factors = f"{processes} processes * optimization.accumulation={optimization.accumulation}"
    divides = optimization.batch % shares == 0
    require("optimization.batch", optimization.batch, divides, f"must be a multiple of {shares} ({factors})")
    arguments.per_device_train_batch_size = optimization.batch // shares
    arguments.per_device_eval_batch_size = optimization.batch
    return arguments


class ResumableTrainer(Trainer):
    """A Trainer that reports every update, stops at non-finite values, and saves its state on Ctrl-C.

    On a CPU, a resumed run has bit for bit the weights of a run that was never stopped. CUDA adds some gradients in no
    fixed order.
    """

    def __init__(self, *, report: Report, **arguments: Any) -> None:
        """Create a trainer from the arguments of `Trainer` and a function to call after every update."""
        super().__init__(**arguments)
        self.model_accepts_loss_kwargs = False  # losses are means, so accumulated gradients must be averaged
        self.micro_losses: list[float] = []  # of the current update so far
        self.remove_callback(PrinterCallback)  # stdout is for results
        self.updates = _UpdateCallback(self, report)
        self.add_callback(self.updates)

    def checked(self, loss: Tensor) -> Tensor:
        """The loss of a micro-batch (a scalar), which is noted for the report of the update.

        Raises:
            RunError: it is not finite.
        """
        value = loss.item()
        if not math.isfinite(value):
            raise self.not_finite_error(f"loss is {value}")
        if torch.is_grad_enabled():
            self.micro_losses.append(value)
        return loss

    def not_finite_error(self, what: str) -> RunError:
        """The error for a loss or gradient that is not finite."""
        last = last_state(Path(str(self.args.output_dir)))
        kept = f"the last saved state is {last}" if last else "no state was saved yet"
        return RunError(
            f"the {what} at update {self.state.global_step}; {kept}\n"
            "try a smaller optimization.lr or bf16=false, in another output folder"
        )

    def fit(self, last: Path | None) -> None:
        """Train to the end, from the last saved state if there is one.

        Raises:
            RunError: a loss or gradient is not finite; the last state is kept.
            KeyboardInterrupt: Ctrl-C was pressed. The state is saved first, unless Ctrl-C is pressed again.
        """
        states = Path(str(self.args.output_dir))
        if last is not None:
            log.info("resuming from %s", last)
        # with a writer of its own, TensorBoard's thread ends however the training ends
        with SummaryWriter(str(states / "tensorboard")) if self.is_world_process_zero() else nullcontext() as writer:
            self.add_callback(TensorBoardCallback(writer))
            before = signal.signal(signal.SIGINT, self.updates.note_ctrl_c)
            try:
                self.train(resume_from_checkpoint=str(last) if last else None)
            except Exception as error:  # reading a state that is none raises almost anything
                if last is None or self.updates.begun or isinstance(error, LatentTTSError | torch.OutOfMemoryError):
                    raise
                raise UsageError(
                    f"{last}: cannot be resumed from ({type(error).__name__}: {' '.join(str(error).split())[:100]})\n"
                    "remove it to resume from an earlier state or anew"
                ) from error
            finally:
                signal.signal(signal.SIGINT, before)
        self.remove_callback(TensorBoardCallback)
        if self.updates.interrupted:
            update, total = self.state.global_step, self.state.max_steps
            of = f" of {total}" if total < NO_LIMIT else ""
            raise KeyboardInterrupt(
                f"the state after update {update}{of} is saved in {states}; re-run the command to resume"
            )

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save the trained weights; tied weights only once, as safetensors requires."""
        super()._save(
            output_dir, {name: value.detach() for name, value in trained_parameters(cast(nn.Module, self.model))}
        )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save a state, and the digests of its files."""
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # each process writes the state of its random numbers
        if self.is_world_process_zero():
            write_digests(Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load the trained weights of a state."""
        load_parameters(cast(nn.Module, self.model), Path(resume_from_checkpoint))


def trained_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that training changes, by name; those of a frozen base are no part of a state."""
    return ((name, value) for name, value in model.named_parameters() if value.requires_grad)


def load_parameters(model: nn.Module, state: Path) -> None:
    """Copy the weights of a saved state into a model."""
    weights = load_file(state / files.WEIGHTS)
    model.load_state_dict({name: weights[name] for name, _ in trained_parameters(model)}, strict=False)


class _UpdateCallback(TrainerCallback):
    """Reports every update, stops at gradients that are not finite, saves and stops on Ctrl-C.

    Attributes:
        interrupted: whether Ctrl-C was pressed.
        begun: whether an update has begun.
    """

    def __init__(self, trainer: ResumableTrainer, report: Report) -> None:
        self.trainer, self.report, self.interrupted, self.begun = trainer, report, False, False
        self.logged: dict[str, float] = {}

    def note_ctrl_c(self, number: int, frame: FrameType | None) -> None:
        """Defer Ctrl-C until the end of an update, when all weights belong to the same update."""
        # with a launcher, processes receive the same Ctrl-C twice: from the terminal and from the launcher
        if self.interrupted and self.trainer.args.world_size == 1:
            raise KeyboardInterrupt("stopped during an update; re-run the command to resume from the last saved state")
        self.interrupted = True

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        self.logged |= logs or {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        norm = torch.nn.utils.get_total_norm(p.grad for p in kwargs["model"].parameters() if p.grad is not None)
        if not math.isfinite(norm.item()):
            raise self.trainer.not_finite_error(f"gradient's norm is {norm.item()}")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        losses, self.trainer.micro_losses = self.trainer.micro_losses, []
        self.report(state.global_step, self.logged | {"loss": sum(losses) / len(losses)})
        self.interrupted = any(gather_object([self.interrupted]))  # all processes act on it after the same update
        if self.interrupted:
            control.should_save = control.should_training_stop = True
