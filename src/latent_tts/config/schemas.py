"""Types of the commands' own keys: a schema per command, see `SCHEMAS`.

`conf/COMMAND.yaml` says what each key means. Groups are checked by the objects that they make.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING


@dataclass
class EngineConfig:
    dtype: str = MISSING
    device: str = MISSING
    rows: int | None = MISSING
    graph: str = MISSING
    quantize: str | None = MISSING


@dataclass
class PathsConfig:
    cache: str = MISSING


@dataclass
class AnswerSamplingConfig:
    temperature: float = MISSING
    top_p: float = MISSING


@dataclass
class AnswerConfig(AnswerSamplingConfig):
    """How answer tokens are chosen, and which answers are decoded."""

    decode: str = MISSING
    forced_prefix: str = MISSING


@dataclass
class DrawingConfig:
    n: int = MISSING
    seed: int = MISSING
    max_answer_tokens: int = MISSING
    engine: EngineConfig = MISSING
    model: Any = MISSING
    task: Any = MISSING
    sampler: Any = MISSING


@dataclass
class RunConfig(DrawingConfig):
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
    question: str | None = MISSING
    json: bool = MISSING


@dataclass
class TraceConfig(RunConfig):
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
    cache: str | None = MISSING


@dataclass
class AnnotateConfig(DrawingConfig):
    output: str = MISSING
    completions: int = MISSING
    keep: str = MISSING
    answer: AnswerSamplingConfig = MISSING
    schedule: Any = MISSING
    executor: Any = MISSING


@dataclass
class TuneConfig(DrawingConfig):
    seconds: float = MISSING
    dtypes: list[str] = MISSING
    output: str | None = MISSING


@dataclass
class ProbeConfig:
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
    run: str = MISSING
    n: int | None = MISSING
    scorer: ReplayScorerConfig = MISSING
    budget: Any = MISSING


@dataclass
class TrainReasonerConfig:
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
    runs: list[str] = MISSING
    output: str | None = MISSING


@dataclass
class CompareConfig:
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
    runs: list[str] = MISSING
    output: str | None = MISSING
    format: str | None = MISSING
    against: str = MISSING


@dataclass
class CacheConfig:
    action: str = MISSING
    older_than: str | None = MISSING
    max_size: str | None = MISSING
    stale: bool = MISSING
    paths: PathsConfig = MISSING


@dataclass
class ConvertConfig:
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
