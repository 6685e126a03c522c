"""Types of the commands' own keys; `conf/COMMAND.yaml` says what each means, groups are checked by their objects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING


@dataclass
class EngineConfig:
    """How rollouts are computed."""

    dtype: str = MISSING
    device: str = MISSING
    rows: int | None = MISSING
    graph: str = MISSING
    quantize: str | None = MISSING


@dataclass
class PathsConfig:
    """Where things are kept."""

    cache: str = MISSING


@dataclass
class AnswerSamplingConfig:
    """How answer tokens are chosen."""

    temperature: float = MISSING
    top_p: float = MISSING


@dataclass
class AnswerConfig(AnswerSamplingConfig):
    """How answer tokens are chosen, and which answers are decoded."""

    decode: str = MISSING
    forced_prefix: str = MISSING


@dataclass
class DrawingConfig:
    """Keys of the commands that draw rollouts; the groups are checked by the objects they make."""

    n: int = MISSING
    seed: int = MISSING
    max_answer_tokens: int = MISSING
    engine: EngineConfig = MISSING
    model: Any = MISSING
    task: Any = MISSING
    sampler: Any = MISSING


@dataclass
class RunConfig(DrawingConfig):
    """Keys of `ltts run`."""

    keep_latents: bool = MISSING
    cache: str = MISSING
    answer: AnswerConfig = MISSING
    paths: PathsConfig = MISSING
    schedule: Any = MISSING
    search: Any = MISSING
    budget: Any = MISSING
    scorer: Any = MISSING
    aggregator: Any = MISSING
    executor: Any = MISSING


@dataclass
class AskConfig(RunConfig):
    """Keys of `ltts ask`: those of `ltts run`, the question, and how the answer is printed."""

    question: str | None = MISSING
    json: bool = MISSING


@dataclass
class TraceConfig(RunConfig):
    """Keys of `ltts trace`: those of `ltts run`, the questions, and what is shown of their rollouts."""

    question: list[str] = MISSING
    run: str | None = MISSING
    beside: str | None = MISSING
    maps: list[str] = MISSING
    top: int = MISSING
    threshold: float = MISSING
    directions: int = MISSING


@dataclass
class ScoringEngineConfig:
    """How kept rollouts are scored; the dtype is the run's."""

    device: str = MISSING
    rows: int | None = MISSING


@dataclass
class OptionalPathsConfig:
    """Where things are kept."""

    cache: str | None = MISSING


@dataclass
class AnnotateConfig(DrawingConfig):
    """Keys of `ltts annotate`."""

    output: str = MISSING
    completions: int = MISSING
    keep: str = MISSING
    answer: AnswerSamplingConfig = MISSING
    schedule: Any = MISSING
    executor: Any = MISSING


@dataclass
class TuneConfig(DrawingConfig):
    """Keys of `ltts tune`."""

    seconds: float = MISSING
    dtypes: list[str] = MISSING
    output: str | None = MISSING


@dataclass
class ProbeConfig:
    """Keys of `ltts probe`."""

    tolerances: list[float] = MISSING
    guesses: list[str] | None = MISSING
    draft: str | None = MISSING
    mixing: int = MISSING
    chunks: list[int] | None = MISSING
    threshold: float = MISSING
    directions: int = MISSING
    max_answer_tokens: int = MISSING
    output: str = MISSING
    engine: EngineConfig = MISSING
    model: Any = MISSING
    task: Any = MISSING


@dataclass
class RescoreConfig:
    """Keys of `ltts rescore`."""

    run: str = MISSING
    engine: ScoringEngineConfig = MISSING
    paths: OptionalPathsConfig = MISSING
    scorer: Any = MISSING
    aggregator: Any = MISSING


@dataclass
class ReplayScorerConfig:
    """What a replay says of the run's scores."""

    range: list[float] | None = MISSING


@dataclass
class ReplayConfig:
    """Keys of `ltts replay`."""

    run: str = MISSING
    n: int | None = MISSING
    scorer: ReplayScorerConfig = MISSING
    budget: Any = MISSING


@dataclass
class TrainReasonerConfig:
    """Keys of `ltts train-reasoner`."""

    output: str = MISSING
    init: str | None = MISSING
    init_vocabulary: str = MISSING
    seed: int = MISSING
    device: str = MISSING
    save_every: int = MISSING
    valid_questions: int = MISSING
    lora: Any = MISSING
    validation: Any = MISSING
    model: Any = MISSING
    task: Any = MISSING
    recipe: Any = MISSING
    backbone: Any = MISSING
    optimization: Any = MISSING


@dataclass
class TrainDraftConfig:
    """Keys of `ltts train-draft`."""

    output: str = MISSING
    updates: int = MISSING
    batch: int = MISSING
    lr: float = MISSING
    valid_questions: int = MISSING
    seed: int = MISSING
    engine: EngineConfig = MISSING
    model: Any = MISSING
    task: Any = MISSING
    sampler: Any = MISSING


@dataclass
class QuestionsConfig:
    """What `ltts annotate` makes where `ltts train-rm` is given no folder."""

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
    """Keys of `ltts train-rm`."""

    output: str = MISSING
    annotations: str | None = MISSING
    valid_annotations: str | None = MISSING
    annotate: DefaultAnnotationsConfig = MISSING
    sampler: Any = MISSING
    init: str = MISSING
    seed: int = MISSING
    device: str = MISSING
    bf16: bool = MISSING
    weights_dtype: str = MISSING
    model: Any = MISSING
    loss: Any = MISSING
    lora: Any = MISSING
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
    questions: str = MISSING
    output: str | None = MISSING


@dataclass
class PlotConfig:
    """Keys of `ltts plot`: run folders or metrics tables, and the figure to write."""

    runs: list[str] = MISSING
    output: str | None = MISSING
    format: str | None = MISSING
    against: str = MISSING


@dataclass
class CacheConfig:
    """Keys of `ltts cache`."""

    action: str = MISSING
    older_than: str | None = MISSING
    max_size: str | None = MISSING
    stale: bool = MISSING
    paths: PathsConfig = MISSING


@dataclass
class ConvertConfig:
    """Keys of `ltts convert`."""

    src: str = MISSING
    dst: str = MISSING
    tokenizer: str | None = MISSING
    config: str | None = MISSING
    base: str | None = MISSING
    lora_alpha: float = MISSING
    latents: int | None = MISSING


SCHEMAS = {
    "run": RunConfig,
    "ask": AskConfig,
    "trace": TraceConfig,
    "annotate": AnnotateConfig,
    "rescore": RescoreConfig,
    "replay": ReplayConfig,
    "tune": TuneConfig,
    "probe": ProbeConfig,
    "train_reasoner": TrainReasonerConfig,
    "train_rm": TrainRMConfig,
    "train_draft": TrainDraftConfig,
    "cache": CacheConfig,
    "collect": CollectConfig,
    "compare": CompareConfig,
    "plot": PlotConfig,
    "convert": ConvertConfig,
}
