"""What both trainings share: devices, accumulation, saved states and resuming, Ctrl-C, an end at values not finite.

It is transformers' Trainer, which brings mixed precision and, by `accelerate launch`, several processes.
"""

from __future__ import annotations

import logging
import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback
from transformers.utils import logging as transformers_logging

from latent_tts.checkpoint import files
from latent_tts.checkpoint.loading import compute_exactly
from latent_tts.errors import RunError, bad_value
from latent_tts.training.optimization import Optimization
from latent_tts.training.states import last_state, remove_incomplete_states

log = logging.getLogger(__name__)
Report = Callable[[int, Mapping[str, float]], None]  # called as report(updates_done, figures) after every update


def resolve_device(wanted: str) -> torch.device:
    """The device of a `device` key that `check_device` accepts: CUDA for `auto`, where there is one.

    Raises:
        UsageError: CUDA is asked for and not there.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cpu" or (wanted == "auto" and not count):
        return torch.device("cpu")
    index = int(wanted.partition(":")[2] or 0)
    if index >= count:
        raise bad_value("device", wanted, f"this machine has {count} CUDA devices; device=cpu works anywhere")
    return torch.device("cuda", index)


def training_arguments(
    optimization: Optimization, states: Path, *, seed: int, bf16: bool, device: str, **more: Any
) -> TrainingArguments:
    """The Trainer's settings that both trainings share.

    Args:
        optimization: batch, accumulation, learning rate, clipping.
        states: folder of the saved states.
        seed: of the order of the questions, where that is random.
        bf16: whether the forward pass runs under bfloat16 autocast.
        device: `auto`, `cpu`, `cuda` or `cuda:INDEX`.
        more: further settings.

    Raises:
        UsageError: the device is not there, or the batch cannot be shared by the processes.
    """
    transformers_logging.set_verbosity_error()
    compute_exactly()
    target = resolve_device(device)
    arguments = TrainingArguments(
        output_dir=str(states),
        use_cpu=target.type == "cpu",
        seed=seed,
        bf16=bf16,
        gradient_accumulation_steps=optimization.accumulation,
        learning_rate=optimization.lr,
        weight_decay=optimization.weight_decay,
        max_grad_norm=optimization.clip,
        restore_callback_states_from_checkpoint=True,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=target.type == "cuda",
        **more,
    )
    processes = arguments.world_size
    if target.type == "cuda" and processes == 1:
        _pin(arguments, target)
    elif ":" in device:
        raise bad_value("device", device, f"auto, cpu or cuda: each of the {processes} processes takes its own")
    shares = processes * optimization.accumulation
    if optimization.batch % shares:
        whose = f"{processes} processes times optimization.accumulation={optimization.accumulation}"
        raise bad_value("optimization.batch", optimization.batch, f"a multiple of {shares} ({whose})")
    arguments.per_device_train_batch_size = optimization.batch // shares
    arguments.per_device_eval_batch_size = optimization.batch
    return arguments


def _pin(arguments: TrainingArguments, device: torch.device) -> None:
    """Train on one GPU, this one; the Trainer would take the first, and with several use DataParallel."""
    torch.cuda.set_device(device)
    arguments._n_gpu = 1
    arguments.distributed_state.device = device  # pyright: ignore[reportOptionalMemberAccess]
    arguments.__dict__["_setup_devices"] = device


class ResumableTrainer(Trainer):
    """A Trainer that reports every update, ends when a value is not finite, and saves its state on Ctrl-C.

    A run that was stopped and resumed has the weights of one that was not, bit for bit on a CPU; CUDA adds some
    gradients in no fixed order.
    """

    def __init__(self, *, report: Report, **arguments: Any) -> None:
        """Take what `Trainer` takes, and what to call after every update."""
        super().__init__(**arguments)
        self.model_accepts_loss_kwargs = False  # losses are means: accumulated gradients are averaged
        self.micro_losses: list[float] = []  # of the micro-batches of the update so far
        self.remove_callback(PrinterCallback)  # stdout is for results
        self.updates = _UpdateCallback(self, report)
        self.add_callback(self.updates)

    def loss_of(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
        """The loss of a micro-batch, a scalar, and what else evaluation needs."""
        raise NotImplementedError

    def compute_loss(
        self, model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a micro-batch; with `return_outputs` the other result of `loss_of` too.

        Raises:
            RunError: it is not finite.
        """
        loss, outputs = self.loss_of(model, inputs)
        value = loss.item()
        if not math.isfinite(value):
            raise self.not_finite(f"loss is {value}")
        if torch.is_grad_enabled():
            self.micro_losses.append(value)
        return (loss, outputs) if return_outputs else loss

    def not_finite(self, what: str) -> RunError:
        """The error for a value that is not finite."""
        last = last_state(Path(str(self.args.output_dir)))
        kept = f"the last good state is {last}" if last else "no state had been kept yet"
        return RunError(
            f"the {what} at update {self.state.global_step}; {kept}\n"
            "a smaller optimization.lr, or bf16=false, may help (in another output folder)"
        )

    def fit(self) -> None:
        """Train to the end, from the last saved state if there is one.

        Raises:
            RunError: a loss or gradient is not finite; the last state is kept.
            KeyboardInterrupt: on Ctrl-C, after the state has been saved; a second Ctrl-C does not wait for that.
        """
        states = Path(str(self.args.output_dir))
        remove_incomplete_states(states)
        last = last_state(states)
        if last is not None:
            log.info("resuming from %s", last)
        writer = SummaryWriter(str(states / "tensorboard")) if self.is_world_process_zero() else None
        board = TensorBoardCallback(writer)
        self.add_callback(board)
        with self.updates.noting_ctrl_c():
            self.train(resume_from_checkpoint=str(last) if last else None)
        self.remove_callback(board)
        if self.updates.interrupted:
            update, total = self.state.global_step, self.state.max_steps
            raise KeyboardInterrupt(
                f"the state after update {update} of {total} is saved in {states}; re-run the command to resume"
            )

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save the weights; tied ones once, which safetensors asks for."""
        assert self.model is not None
        super()._save(output_dir, {name: value.detach() for name, value in self.model.named_parameters()})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load the weights of a state, every one of them."""
        assert self.model is not None
        weights = load_file(Path(resume_from_checkpoint) / files.WEIGHTS)
        with torch.no_grad():
            for name, value in self.model.named_parameters():
                value.copy_(weights[name])


class _UpdateCallback(TrainerCallback):
    """Acts at each update: reports, stops at gradients that are not finite, saves and stops on Ctrl-C.

    Attributes:
        interrupted: whether Ctrl-C was pressed.
    """

    def __init__(self, trainer: ResumableTrainer, report: Report) -> None:
        self.trainer, self.report, self.interrupted = trainer, report, False
        self.logged: dict[str, float] = {}

    @contextmanager
    def noting_ctrl_c(self) -> Iterator[None]:
        """Within the block a Ctrl-C is only noted, to be acted on between two updates, when weights are whole."""
        if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
            yield
            return

        def note(number: int, frame: FrameType | None) -> None:
            # a launcher passes on the Ctrl-C that its processes have had from the terminal
            if self.interrupted and self.trainer.args.world_size == 1:
                raise KeyboardInterrupt("stopped within an update; re-run the command to resume from the last state")
            self.interrupted = True

        before = signal.signal(signal.SIGINT, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        self.logged |= logs or {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        norm = torch.nn.utils.get_total_norm(p.grad for p in kwargs["model"].parameters() if p.grad is not None)
        if not math.isfinite(norm.item()):
            raise self.trainer.not_finite(f"gradient's norm is {norm.item()}")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        losses, self.trainer.micro_losses = self.trainer.micro_losses, []
        try:
            self.report(state.global_step, self.logged | {"loss": sum(losses) / len(losses)})
        except KeyboardInterrupt:
            self.interrupted = True
        self.interrupted = _in_any_process(self.interrupted, args)
        if self.interrupted:
            control.should_save = control.should_training_stop = True


def _in_any_process(flag: bool, arguments: TrainingArguments) -> bool:
    """Whether a flag is set in any of the processes, so that all of them act on it at the same update."""
    if arguments.world_size == 1:
        return flag
    flags = torch.tensor(int(flag), device=arguments.device)
    torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
    return bool(flags.item())
