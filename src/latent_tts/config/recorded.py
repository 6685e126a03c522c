"""Data is never code: which classes a run folder or an annotation folder may name.

A config of the user's may name any class. What is read back from a folder may name only options: those of this
package, of installed packages that register some, and those of a config that the user gives with the command. Names
are compared as text before anything is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigSource
from omegaconf import DictConfig, OmegaConf

from latent_tts.aggregator import Aggregator
from latent_tts.config.build import build, compose
from latent_tts.config.meant import escaped
from latent_tts.config.reference import TARGET, conf_dir, read_command
from latent_tts.errors import UsageError
from latent_tts.pipeline import sweep
from latent_tts.results.cache import KEY_JSON

RECORDED = ("model", "task", "sampler", "schedule", "search", "budget", "scorer", "aggregator")
NEVER_RECORDED = ("_args_", "_partial_")  # no option has them


def recorded(group: str, node: object, *given: DictConfig) -> DictConfig:
    """The config node of an option as a folder recorded it, safe to `build`.

    Args:
        group: of the option, as in `sampler`.
        node: as read from JSON.
        given: configs of this command; classes that they name are allowed.

    Raises:
        UsageError: it describes no option, or one that is not known here, or has interpolations or `_args_`.
    """
    if not isinstance(node, Mapping):
        raise UsageError(f"{group}: not the record of an option, but {str(node)[:60]!r}")
    name = node.get(TARGET)
    known = _targets_of(group) | {target for cfg in given for target in _targets_of_config(cfg)}
    for target in (str(name), *_targets_in(node)):
        if target not in known:
            raise UsageError(
                f"{group}: the folder names {TARGET}={target[:100]}, which is no known option of the group; it was not "
                f"imported\nif you trust it, name it in a config folder: --config-dir=DIR, with `{TARGET}: ...` in "
                f"DIR/{group}/NAME.yaml"
            )
    for key in NEVER_RECORDED:
        if any(key == name for name, _ in _parts(node)):
            raise UsageError(f"{group}: {name} is recorded with {key}, which no option has")
    for text in (part for pair in _parts(node) for part in pair if isinstance(part, str)):
        if "${" in text:  # Hydra resolves what it builds twice, so no escape would keep it a text
            raise UsageError(f"{group}: the folder names {text[:60]!r}; what is read back has no interpolations")
    made = OmegaConf.create(dict(node))
    assert isinstance(made, DictConfig)
    return made


def recorded_run(record: Mapping[str, Any], cfg: DictConfig, own: Collection[str] = ()) -> Any:
    """The config of a run as its `run.json` has it, its options safe to `build`; other values are literal text.

    Device and rows are those of this command if it has them, and it computes in its own process. The cache is the
    run's if that exists, or else the default one.

    Args:
        record: the `run.json`.
        cfg: the config of this command; classes that it names are allowed.
        own: groups whose options are those of this command.
    """
    typed = OmegaConf.structured(read_command("run").schema)
    values = {key: literal(value) for key, value in record["config"].items() if key in typed.keys()}  # noqa: SIM118
    merged: Any = OmegaConf.merge(typed, values)
    # a record names no new folder, only one that has the run's rollouts
    entry = Path(str(record.get("cache", "")))
    merged.paths.cache = str(entry.parent) if (entry / KEY_JSON).is_file() else compose("run").paths.cache
    for group in RECORDED:
        if group in own:
            # unresolved, so that `${model...}` finds the run's model
            merged[group] = OmegaConf.create(OmegaConf.to_container(cfg[group], resolve=False))
        elif group == "aggregator":
            merged[group] = {name: recorded(group, node, cfg) for name, node in record["aggregators"].items()}
        else:
            merged[group] = recorded(group, record["config"].get(group), cfg)
    if "engine" in cfg:
        merged.engine.device, merged.engine.rows = cfg.engine.device, cfg.engine.rows
    merged.engine.graph, merged.cache = "auto", "on"  # graphs change no result, and scores need a folder
    merged.executor = {TARGET: "latent_tts.executor.local.Local"}
    return merged


def aggregator_builder(*given: DictConfig) -> Callable[[str, Mapping[str, Any]], Aggregator]:
    """What makes an aggregator of its name and its node in a `run.json`; `given` as in `recorded`."""
    return lambda name, node: build(f"aggregator.{name}", recorded("aggregator", node, *given))


def finish_sweep(folder: Path, jobs: Sequence[sweep.SweepJob], configs: Sequence[DictConfig]) -> None:
    """Join the tables of a sweep's jobs, which ran with these configs, and print what was written.

    The sweeper calls it for commands that define `finish_sweep`.
    """
    sweep.finish(folder, jobs, aggregator_builder(*configs))


def literal(value: Any) -> Any:
    """A JSON value in which OmegaConf finds no interpolation."""
    if isinstance(value, str):
        return escaped(value)
    if isinstance(value, Mapping):
        return {key: literal(part) for key, part in value.items()}
    return [literal(part) for part in value] if isinstance(value, list) else value


def _parts(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every part of a plain value with its key, at any depth; parts of a list have the key of the list."""
    yield key, value
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield from _parts(part, str(name))
    elif isinstance(value, list):
        for part in value:
            yield from _parts(part, key)


def _targets_of(group: str) -> frozenset[str]:
    """The `_target_`s in the YAML files of the config folders; in the package's own, only in those of the group."""
    sources = GlobalHydra.instance().config_loader().get_sources()
    others = [each for each in sources if each.provider not in ("hydra", "schema") and each.path != conf_dir()]
    return _own_targets(group).union(*map(_targets_of_source, others))


@cache
def _own_targets(group: str) -> frozenset[str]:
    files = sorted((Path(conf_dir()) / group).rglob("*.yaml"))
    return frozenset(target for file in files for target in _targets_of_config(OmegaConf.load(file)))


def _targets_of_source(source: ConfigSource, group: str = "") -> Iterator[str]:
    for name in source.list(group, ObjectType.CONFIG):
        try:
            content = source.load_config(f"{group}/{name}".lstrip("/")).config
        except Exception:  # a file that cannot be read names nothing; choosing it raises the error
            continue
        yield from _targets_of_config(content)
    for name in source.list(group, ObjectType.GROUP):
        if name != "hydra":
            yield from _targets_of_source(source, f"{group}/{name}".lstrip("/"))


def _targets_of_config(cfg: Any) -> Iterator[str]:
    """Every class that a config names, but for Hydra's own part."""
    content: Any = OmegaConf.to_container(cfg, resolve=False)
    return _targets_in({key: value for key, value in content.items() if key != "hydra"} if content else {})


def _targets_in(value: Any) -> Iterator[str]:
    """Every class that a plain value names, at any depth."""
    return (part if isinstance(part, str) else repr(part) for key, part in _parts(value) if key == TARGET)
