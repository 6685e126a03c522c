"""Schemas of the commands' scalar keys; groups are checked by the objects they make."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING


@dataclass
class EngineConfig:
    """How rollouts are computed.

    Attributes:
        dtype: of weights and activations.
        device: auto, cpu, cuda or cuda:INDEX.
        rows: most rows of a batch; null follows from the width, the kind of device and whether prompts are masked.
        quantize: null, int8 or float8: the reasoner's blocks.
    """

    dtype: str = MISSING
    device: str = MISSING
    rows: int | None = MISSING
    quantize: str | None = MISSING


@dataclass
class PathsConfig:
    """Where things are kept.

    Attributes:
        cache: of rollouts, shared by all runs.
    """

    cache: str = MISSING


@dataclass
class AnswerSamplingConfig:
    """How answer tokens are chosen.

    Attributes:
        temperature: 0 takes the most probable token, above 0 it is drawn.
        top_p: share of the nucleus that is drawn from.
    """

    temperature: float = MISSING
    top_p: float = MISSING


@dataclass
class AnswerConfig(AnswerSamplingConfig):
    """How answer tokens are chosen, and which answers are decoded.

    Attributes:
        decode: all, or winners: only the best-of-n pick of each reported n.
        forced_prefix: text that every answer begins with.
    """

    decode: str = MISSING
    forced_prefix: str = MISSING


@dataclass
class RunConfig:
    """Keys of `ltts run`; the groups are checked by the objects they make.

    Attributes:
        n: rollouts of each question.
        seed: of every random number.
        max_answer_tokens: token limit of an answer.
        keep_latents: write `latents.safetensors` beside the tables.
        cache: on, refresh (draw again and replace) or off (nothing stays).
    """

    n: int = MISSING
    seed: int = MISSING
    max_answer_tokens: int = MISSING
    keep_latents: bool = MISSING
    cache: str = MISSING
    answer: AnswerConfig = MISSING
    engine: EngineConfig = MISSING
    paths: PathsConfig = MISSING
    model: Any = MISSING
    task: Any = MISSING
    sampler: Any = MISSING
    schedule: Any = MISSING
    search: Any = MISSING
    budget: Any = MISSING
    scorer: Any = MISSING
    aggregator: Any = MISSING


@dataclass
class ScoringEngineConfig:
    """How kept rollouts are scored; the dtype is the run's.

    Attributes:
        device: auto, cpu, cuda or cuda:INDEX.
        rows: most rows of a batch; null follows from the LatentRM's width and the kind of device.
    """

    device: str = MISSING
    rows: int | None = MISSING


@dataclass
class OptionalPathsConfig:
    """Where things are kept.

    Attributes:
        cache: of rollouts and scores; null is where the run kept its own.
    """

    cache: str | None = MISSING


@dataclass
class AnnotateConfig:
    """Keys of `ltts annotate`.

    Attributes:
        output: the annotation folder; the same line goes on there.
        n: rollouts of each question.
        completions: M, completions of each prefix.
        keep: `mixed` or `all`: which questions get labels.
        seed: of every random number.
        max_answer_tokens: token limit of an answer.
    """

    output: str = MISSING
    n: int = MISSING
    completions: int = MISSING
    keep: str = MISSING
    seed: int = MISSING
    max_answer_tokens: int = MISSING
    answer: AnswerSamplingConfig = MISSING
    engine: EngineConfig = MISSING
    model: Any = MISSING
    task: Any = MISSING
    sampler: Any = MISSING
    schedule: Any = MISSING


@dataclass
class TuneConfig:
    """Keys of `ltts tune`.

    Attributes:
        seconds: most time for measuring.
        dtypes: values of `engine.dtype` to try.
        n: rollouts of each question.
        seed: of every random number.
        max_answer_tokens: token limit of an answer.
        output: the file to write; null is where `engine=tuned` is found.
    """

    seconds: float = MISSING
    dtypes: list[str] = MISSING
    n: int = MISSING
    seed: int = MISSING
    max_answer_tokens: int = MISSING
    output: str | None = MISSING
    engine: EngineConfig = MISSING
    model: Any = MISSING
    task: Any = MISSING
    sampler: Any = MISSING


@dataclass
class RescoreConfig:
    """Keys of `ltts rescore`.

    Attributes:
        run: the run folder.
    """

    run: str = MISSING
    engine: ScoringEngineConfig = MISSING
    paths: OptionalPathsConfig = MISSING
    scorer: Any = MISSING
    aggregator: Any = MISSING


@dataclass
class TrainReasonerConfig:
    """Keys of `ltts train-reasoner`.

    Attributes:
        output: folder of the state, the loss log and the finished checkpoint; a stopped run goes on there.
        init: checkpoint to start from; null makes a fresh backbone.
        seed: of the weights, the questions' order and dropout.
        save_every: updates between two saved states.
        valid_questions: questions of `task.split=valid` for the accuracy in the log.
    """

    output: str = MISSING
    init: str | None = MISSING
    seed: int = MISSING
    save_every: int = MISSING
    valid_questions: int = MISSING
    model: Any = MISSING
    task: Any = MISSING
    recipe: Any = MISSING
    backbone: Any = MISSING
    optimization: Any = MISSING


@dataclass
class QuestionsConfig:
    """What `ltts annotate` makes where `ltts train-rm` is given no folder.

    Attributes:
        split, limit: of the task's questions.
        n: rollouts of each question.
        completions: M, completions of each prefix.
    """

    split: str = MISSING
    limit: int = MISSING
    n: int = MISSING
    completions: int = MISSING


@dataclass
class DefaultAnnotationsConfig:
    """The same for both of its folders, by the key that would name one."""

    annotations: QuestionsConfig = MISSING
    valid_annotations: QuestionsConfig = MISSING


@dataclass
class TrainRMConfig:
    """Keys of `ltts train-rm`.

    Attributes:
        output: folder of the states, the TensorBoard log and the finished checkpoint; a stopped run goes on there.
        annotations: annotated questions to train on; null annotates the default ones.
        valid_annotations: annotated questions to choose by.
        annotate: for each of the two the split, the number of questions, n and M of the default ones.
        init: the backbone's first weights, `reasoner` or `random`.
        seed: of the head's weights and the order of questions.
        bf16: bfloat16 autocast.
        weights_dtype: of the checkpoint.
    """

    output: str = MISSING
    annotations: str | None = MISSING
    valid_annotations: str | None = MISSING
    annotate: DefaultAnnotationsConfig = MISSING
    sampler: Any = MISSING
    init: str = MISSING
    seed: int = MISSING
    bf16: bool = MISSING
    weights_dtype: str = MISSING
    model: Any = MISSING
    loss: Any = MISSING
    optimization: Any = MISSING


@dataclass
class CollectConfig:
    """Keys of `ltts collect`: run folders (or folders of them), and the table to write (null: to stdout)."""

    runs: list[str] = MISSING
    output: str | None = MISSING


@dataclass
class CompareConfig:
    """Keys of `ltts compare`: two run folders (or folders of runs over seeds), what to hold together, a CSV."""

    a: str = MISSING
    b: str = MISSING
    a_figure: str | None = MISSING
    b_figure: str | None = MISSING
    a_n: int | None = MISSING
    b_n: int | None = MISSING
    output: str | None = MISSING


@dataclass
class PlotConfig:
    """Keys of `ltts plot`: run folders or metrics tables, and the figure to write."""

    runs: list[str] = MISSING
    output: str | None = MISSING
    format: str = MISSING
    against: str = MISSING


@dataclass
class CacheConfig:
    """Keys of `ltts cache`.

    Attributes:
        action: list or prune.
        older_than: prune entries that no run has opened for as long, as in 30d or 12h.
        max_size: prune what was used longest ago until the rest is no larger, as in 20GB.
        stale: prune entries that this version of the code does not read.
    """

    action: str = MISSING
    older_than: str | None = MISSING
    max_size: str | None = MISSING
    stale: bool = MISSING
    paths: PathsConfig = MISSING


@dataclass
class ConvertConfig:
    """Keys of `ltts convert`.

    Attributes:
        src: a pickle, or a folder with one or with safetensors of a training code.
        dst: the new checkpoint folder.
        tokenizer: folder of the backbone's tokenizer; null looks beside the weights.
        config: the backbone's `config.json`; null looks beside the weights, then in the tokenizer's folder.
        base: folder or hub id of the model that an adapter of PEFT was trained on; null takes the one that it names.
        lora_alpha: LoRA's scale, which no file holds.
        latents: T of training, kept in the new `config.json`; null leaves it unsaid.
    """

    src: str = MISSING
    dst: str = MISSING
    tokenizer: str | None = MISSING
    config: str | None = MISSING
    base: str | None = MISSING
    lora_alpha: float = MISSING
    latents: int | None = MISSING


SCHEMAS = {
    "run": RunConfig,
    "annotate": AnnotateConfig,
    "rescore": RescoreConfig,
    "tune": TuneConfig,
    "train_reasoner": TrainReasonerConfig,
    "train_rm": TrainRMConfig,
    "cache": CacheConfig,
    "collect": CollectConfig,
    "compare": CompareConfig,
    "plot": PlotConfig,
    "convert": ConvertConfig,
}
