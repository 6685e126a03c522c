"""Schemas of the scalar keys, the way configs become objects, and what Hydra needs to find the YAML files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import MISSING, DictConfig, OmegaConf

from latent_tts.errors import LatentTTSError, UsageError, bad_value


@dataclass
class EngineConfig:
    """How rollouts are computed.

    Attributes:
        dtype: of weights and activations.
        device: auto, cpu, cuda or cuda:INDEX.
        rows: most rows of a batch; null follows from the model's width and the kind of device.
    """

    dtype: str = MISSING
    device: str = MISSING
    rows: int | None = MISSING


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
    """

    n: int = MISSING
    seed: int = MISSING
    max_answer_tokens: int = MISSING
    keep_latents: bool = MISSING
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
    annotate: Any = MISSING
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
    """Keys of `ltts compare`: two run folders (or folders of runs over seeds), figures to hold together, a CSV."""

    a: str = MISSING
    b: str = MISSING
    a_figure: str | None = MISSING
    b_figure: str | None = MISSING
    output: str | None = MISSING


@dataclass
class PlotConfig:
    """Keys of `ltts plot`: run folders or metrics tables, and the figure to write."""

    runs: list[str] = MISSING
    output: str | None = MISSING
    format: str = MISSING
    against: str = MISSING


@dataclass
class ConvertConfig:
    """Keys of `ltts convert`.

    Attributes:
        src: a pickle, or a folder with one or with safetensors of a training code.
        dst: the new checkpoint folder.
        tokenizer: folder of the backbone's tokenizer; null looks beside the weights.
        config: the backbone's `config.json`; null looks beside the weights, then in the tokenizer's folder.
        lora_alpha: LoRA's scale, which no file holds.
        latents: T of training, kept in the new `config.json`; null leaves it unsaid.
    """

    src: str = MISSING
    dst: str = MISSING
    tokenizer: str | None = MISSING
    config: str | None = MISSING
    lora_alpha: float = MISSING
    latents: int | None = MISSING


SCHEMAS = {
    "run": RunConfig,
    "annotate": AnnotateConfig,
    "rescore": RescoreConfig,
    "train_reasoner": TrainReasonerConfig,
    "train_rm": TrainRMConfig,
    "collect": CollectConfig,
    "compare": CompareConfig,
    "plot": PlotConfig,
    "convert": ConvertConfig,
}


def register_schemas() -> None:
    """Make the schemas known to Hydra as `NAME_schema`."""
    for name, schema in SCHEMAS.items():
        ConfigStore.instance().store(f"{name}_schema", schema)


def conf_dir() -> str:
    """Directory of the YAML files: packaged in a wheel, `conf/` in a checkout."""
    here = Path(__file__).resolve().parent
    packaged = here / "conf"
    return str(packaged if packaged.is_dir() else here.parents[1] / "conf")


def output_dir() -> Path:
    """The folder of the running job."""
    return Path(HydraConfig.get().runtime.output_dir)


def build(group: str, node: Any) -> Any:
    """The object that a config node describes.

    Raises:
        UsageError: the object refuses a value.
    """
    if not OmegaConf.is_dict(node):
        raise bad_value(group, node, f"an option of the group, as in `{group}=NAME`")
    try:
        return instantiate(node, _convert_="all")
    except InstantiationException as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, LatentTTSError):
            cause = cause.__cause__
        if cause is not None:
            raise cause from None
        raise UsageError(f"{group}: {str(error.__cause__ or error).splitlines()[0]}") from error


def node(spec: Mapping[str, Any]) -> DictConfig:
    """A config node from plain values, as `run.json` holds them."""
    return OmegaConf.create(dict(spec))


def require(key: str, value: Any, ok: bool, allowed: str) -> None:
    """Raise the usual error unless a value is allowed."""
    if not ok:
        raise bad_value(key, value, allowed)


def non_defaults(cfg: DictConfig, known: set[str]) -> dict[str, Any]:
    """The keys that differ from their defaults under the same group choices, with their values.

    Args:
        cfg: the job's config.
        known: dotted keys (or whole nodes) that have columns of their own.
    """
    hydra_cfg = HydraConfig.get()
    choices = hydra_cfg.runtime.choices
    chosen = {str(group): choices.get(str(group)) for group in cfg}
    overrides = [f"{group}={option}" for group, option in chosen.items() if option and "[" not in option]
    sources = tuple(source.path for source in hydra_cfg.runtime.config_sources)
    before, after = _flat(_defaults(str(hydra_cfg.job.config_name), tuple(overrides), sources)), _flat(cfg)
    changed = {key: value for key, value in after.items() if before.get(key) != value}
    hidden = tuple(f"{key}." for key in known)
    return {k: v for k, v in sorted(changed.items()) if k not in known and not k.startswith(hidden)}


@lru_cache(maxsize=8)
def _defaults(command: str, overrides: tuple[str, ...], sources: tuple[str, ...]) -> DictConfig:
    """The same config again for the jobs of a sweep: composing takes as long as a small run. Not to be changed."""
    return compose(command, overrides)


def compose(command: str, overrides: Sequence[str] = ()) -> DictConfig:
    """The config of a command under some overrides, open to changes."""
    loader = GlobalHydra.instance().config_loader()
    cfg = loader.load_configuration(command, list(overrides), run_mode=RunMode.RUN)
    OmegaConf.set_struct(cfg, False)
    return cfg


def is_given(group: str) -> bool:
    """Whether the command line chooses an option of a group."""
    return any(override.lstrip("+~").partition("=")[0] == group for override in HydraConfig.get().overrides.task)


def is_default(group: str, cfg: DictConfig) -> bool:
    """Whether nobody chose the options of a group of several: neither the command line nor an experiment."""
    if is_given(group):
        return False
    # read from the command's own file: composing the defaults again would take as long as a small run
    own: Any = OmegaConf.load(Path(conf_dir()) / f"{HydraConfig.get().job.config_name}.yaml")
    return any(OmegaConf.is_dict(entry) and set(entry.get(group, ())) == set(cfg[group]) for entry in own.defaults)


def _flat(cfg: DictConfig) -> dict[str, Any]:
    flat: dict[str, Any] = {}

    def walk(prefix: str, node: Any) -> None:
        if isinstance(node, Mapping):
            for key, value in node.items():
                walk(f"{prefix}{key}.", value)
        else:
            flat[prefix.removesuffix(".")] = node

    container = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(container, dict)
    container.pop("hydra", None)
    walk("", container)
    resolved = {key: OmegaConf.select(cfg, key) for key in flat}
    return {k: OmegaConf.to_container(v) if OmegaConf.is_config(v) else v for k, v in resolved.items()}
