"""Configs become objects; where the YAML files are; what the command line says."""

from __future__ import annotations

import ast
import inspect
import logging
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from hydra.utils import get_object, instantiate
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from latent_tts.config.jobs import Loader
from latent_tts.config.reference import TARGET, command_files, conf_dir, nested_groups, option_names, read_command
from latent_tts.errors import LatentTTSError, UsageError, is_whole, require, unknown_key
from latent_tts.results.files import LOCK

# groups whose settings tell one curve from another; their modules import no torch
IN_CURVES = {"aggregator", "budget", "model", "sampler", "schedule", "scorer", "search", "task"}


@cache
def register_schemas() -> None:
    """Make the types of the commands' keys known to Hydra as `NAME_schema`."""
    for name in command_files():
        ConfigStore.instance().store(f"{name}_schema", read_command(name).schema)


def output_dir() -> Path:
    """The folder of the running job, as it is printed; see `from_here`."""
    return from_here(Path(HydraConfig.get().runtime.output_dir))


def from_here(path: Path) -> Path:
    """A path, relative to the working folder if it lies in it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def in_sweep() -> bool:
    """Whether the running job is one of a sweep."""
    return HydraConfig.get().mode == RunMode.MULTIRUN


def remove_record() -> None:
    """Remove the folder of a refused job, so that it does not look like an interrupted run.

    A folder that holds more, as of an earlier run, is left alone.
    """
    hydra_cfg = HydraConfig.get()
    if hydra_cfg.output_subdir is None:
        return
    folder, own = output_dir(), {hydra_cfg.output_subdir, f"{hydra_cfg.job.name}.log", LOCK}
    if {path.name for path in folder.iterdir()} <= own:
        shutil.rmtree(folder / hydra_cfg.output_subdir)
    # a launcher whose process goes on would log into a folder that is not there
    for handler in logging.getLogger().handlers[:]:
        if isinstance(handler, logging.FileHandler) and Path(handler.baseFilename).parent == folder.absolute():
            logging.getLogger().removeHandler(handler)
            handler.close()
    if not any(folder.iterdir()) and folder != Path():
        folder.rmdir()


def build(group: str, node: Any) -> Any:
    """The object that a config node describes.

    Raises:
        UsageError: the object refuses a value.
    """
    require(group, node, OmegaConf.is_dict(node), f"must be an option of the group, as in `{group}=NAME`")
    for nested in nested_groups(group):
        name = nested.rpartition("/")[2]
        fits = name not in node or OmegaConf.is_dict(node[name])
        require(nested.replace("/", "."), node.get(name), fits, f"must be an option, as in `{nested}=NAME`")
    try:
        return instantiate(node, _convert_="all")
    except InstantiationException as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, LatentTTSError):
            cause = cause.__cause__
        if cause is not None:
            raise _with_typed_number(cause) from None
        if isinstance(error.__cause__, TypeError):
            known = list(inspect.signature(get_object(node[TARGET])).parameters)
            for key in map(str, node):
                if key not in known and not (key.startswith("_") and key.endswith("_")):  # those are Hydra's
                    raise unknown_key(f"{group}.{key}", known) from None
        reason = " ".join(str(error.__cause__ or error).split())[:200].rstrip(":")
        if isinstance(error.__cause__, AttributeError | TypeError | ValueError | KeyError):
            reason = f"a value is of a wrong type ({reason})"
        raise UsageError(f"{group}: {reason}") from error


def _with_typed_number(error: LatentTTSError) -> LatentTTSError:
    """A refusal with the number that the command line has, which `spell_numbers_alike` may have made a float."""
    key, _, rest = str(error).partition("=")
    shown, _, why = rest.partition(": ")
    with suppress(ValueError, SyntaxError):  # no number; no command line
        typed = given_values().get(key, "")
        if ast.literal_eval(typed) == ast.literal_eval(shown):
            return type(error)(f"{key}={typed}: {why}")
    return error


def refuse_unknown_keys(cfg: DictConfig, prefix: str = "") -> None:
    """Raise the usual error for a key that a schema lacks, since Hydra takes every one that `+` adds.

    Nodes without a schema describe an object; `build` checks them against the object's arguments.
    """
    schema: Any = OmegaConf.get_type(cfg)
    known = [field.name for field in fields(schema)]
    for key in map(str, cfg):
        if key not in known:
            raise unknown_key(prefix + key, known)
        if is_dataclass(OmegaConf.get_type(cfg, key)):
            refuse_unknown_keys(cfg[key], f"{prefix}{key}.")


def changed_keys(cfg: DictConfig, known: set[str]) -> dict[str, Any]:
    """The keys that differ from this package's defaults under the same group choices, with their values.

    What files of the user and of other packages set counts as changed, so that runs under other files are other curves.

    Args:
        cfg: the job's config.
        known: dotted keys (or whole nodes) that have columns of their own.
    """
    hydra_cfg = HydraConfig.get()
    choices = hydra_cfg.runtime.choices
    # an option of `engine` is no choice of its own, but settings
    chosen = {str(group): choices.get(str(group)) for group in cfg if group != "engine"}
    command, own = str(hydra_cfg.job.config_name), [Path(conf_dir())]
    usual = read_command(command).groups
    overrides = [
        f"{group}={option}"
        for group, option in chosen.items()
        if option in option_names(group, own) and usual.get(group) != [option]
    ]
    before, after = _defaults(command, tuple(overrides)), _flat(cfg)
    changed = {key: value for key, value in after.items() if before.get(key) != value}
    hidden = tuple(f"{key}." for key in known)
    return {k: v for k, v in sorted(changed.items()) if k not in known and not k.startswith(hidden)}


@lru_cache(maxsize=64)
def _defaults(command: str, overrides: tuple[str, ...]) -> Mapping[str, Any]:
    """The values by key, from this package's files alone; the same for the jobs of a sweep: composing is slow."""
    places, conf = ConfigSearchPathImpl(), conf_dir()
    for provider, path in (("hydra", "pkg://hydra.conf"), ("main", f"file://{conf}"), ("schema", "structured://")):
        places.append(provider, path)
    local = "local" in read_command(command).groups and option_names("local", [Path(conf)])
    without_local = ["~local"] if local else []  # a clone's conf/local is the user's
    return _flat(compose(command, [*overrides, *without_local], Loader(places)))


def compose(command: str, overrides: Sequence[str] = (), loader: ConfigLoader | None = None) -> DictConfig:
    """The config of a command under some overrides, open to changes; by default from all that Hydra was told."""
    loader = loader or GlobalHydra.instance().config_loader()
    cfg = loader.load_configuration(command, list(overrides), run_mode=RunMode.RUN)
    OmegaConf.set_struct(cfg, False)
    del cfg["hydra"]  # as in the config of a job
    return cfg


def given_values() -> dict[str, str]:
    """The groups and keys that the command line says something about, with what it says."""
    parts = (override.lstrip("+~").partition("=") for override in HydraConfig.get().overrides.task)
    return {key: value for key, _, value in parts}


def name_after_checkpoint(cfg: DictConfig) -> None:
    """Name a model after its checkpoint where the command line gives that alone: the default's name is another's."""
    given = set(given_values())
    if "model.checkpoint" in given and not given & {"model", "model.name"} and cfg.model.checkpoint:
        cfg.model.name = Path(str(cfg.model.checkpoint).rpartition(":")[2]).name


def spell_numbers_alike(cfg: DictConfig) -> None:
    """Make integers floats where an option takes floats: 1 and 1.0 are one setting, one curve, one cache entry."""
    with suppress(OmegaConfBaseException):  # the command says so where it reads that value
        values: Any = OmegaConf.to_container(cfg, resolve=True)
        for group in IN_CURVES & values.keys():
            _spell_floats(cfg, group, values[group])


def _spell_floats(cfg: DictConfig, place: str, node: Any) -> None:
    """The same for a node of a config and those in it."""
    if not isinstance(node, dict):
        return
    # the values that models recommend are those of samplers
    names = {"sigma", "rate"} if place == "model.recommended" else _float_parameters(node.get(TARGET))
    for key, value in node.items():
        _spell_floats(cfg, f"{place}.{key}", value)
        if key in names and repr(_as_floats(value)) != repr(value):
            OmegaConf.update(cfg, f"{place}.{key}", _as_floats(value))


def _float_parameters(target: Any) -> set[str]:
    """The parameters of an option's object that take floats."""
    if not isinstance(target, str):
        return set()
    try:
        parameters = inspect.signature(get_object(target)).parameters
    except Exception:  # whatever its module raises; building the option says so
        return set()
    kinds = {name: set(re.findall(r"\w+", str(parameter.annotation))) for name, parameter in parameters.items()}
    return {name for name, words in kinds.items() if "float" in words and "int" not in words}


def _as_floats(value: Any) -> Any:
    """An integer, or those of a list, as floats; anything else as it is."""
    if isinstance(value, list):
        return [_as_floats(each) for each in value]
    return float(value) if is_whole(value) and abs(value) < 1 << 53 else value


def stay_where_started() -> None:
    """Relative paths mean the folder that the command was started in, also under `hydra.job.chdir`."""
    os.chdir(HydraConfig.get().runtime.cwd)


def is_given(group: str) -> bool:
    """Whether the command line chooses an option of a group."""
    return group in given_values()


def is_default(group: str, cfg: DictConfig) -> bool:
    """Whether neither the command line nor an experiment chose the options of a group of several."""
    usual = read_command(str(HydraConfig.get().job.config_name)).groups
    return not is_given(group) and set(usual.get(group, ())) == set(cfg[group])


def _flat(cfg: DictConfig) -> dict[str, Any]:
    flat: dict[str, Any] = {}

    def walk(prefix: str, node: Any, resolved: Any) -> None:
        if isinstance(node, Mapping):
            for key, value in node.items():
                walk(f"{prefix}{key}.", value, resolved[key])
        else:
            flat[prefix.removesuffix(".")] = None if resolved == MISSING else resolved

    walk("", *(OmegaConf.to_container(cfg, resolve=resolve) for resolve in (False, True)))
    return flat
