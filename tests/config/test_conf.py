"""Every YAML file binds to what it names, without building anything."""

import importlib
import inspect
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

import compose_once
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import OmegaConf

from latent_tts.config import build as config
from latent_tts.config import schemas

CONF = Path(config.conf_dir())
GROUPS = {
    "annotate": ["model", "task", "sampler", "schedule"],
    "rescore": ["scorer", "aggregator"],
    "run": ["model", "task", "sampler", "schedule", "search", "budget", "scorer", "aggregator"],
    "train_reasoner": ["model", "task", "recipe"],
    "train_rm": ["model", "sampler"],
    "tune": ["model", "task", "sampler"],
}


def choices() -> Iterator[tuple[str, dict[str, str]]]:
    """Commands and options such that each option comes once: a sampler, which reads the command's model, in each."""
    seen: set[str] = set()
    for command, groups in GROUPS.items():
        new = [group for group in groups if group not in seen or group == "sampler"]
        seen.update(new)
        columns = {group: sorted(path.stem for path in (CONF / group).glob("*.yaml")) for group in new}
        for model in columns.pop("model", []):  # alone, since samplers read it
            yield command, {"model": model}
        for row in zip_longest(*columns.values()):
            yield command, {group: option for group, option in zip(columns, row, strict=True) if option is not None}


@pytest.fixture(autouse=True)
def hydra_here():
    config.register_schemas()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def bind(node) -> None:
    values = OmegaConf.to_container(node, resolve=True)
    module, _, name = values.pop("_target_").rpartition(".")
    inspect.signature(getattr(importlib.import_module(module), name)).bind(**values)


@pytest.mark.parametrize(("command", "options"), list(choices()), ids=str)
def test_options_bind_to_their_targets(command, options):
    model = {"model": options["recipe"]} if "recipe" in options else {}  # what it reads
    cfg = compose(command, overrides=[f"{group}={option}" for group, option in (options | model).items()])
    for group, option in options.items():
        bind(cfg[group] if group != "aggregator" else cfg[group][option])


def test_nodes_without_a_group_bind_too():
    cfg = compose("train_reasoner")
    for key in ("backbone", "recipe", "optimization"):
        bind(cfg[key])
    cfg = compose("train_rm")
    for key in ("loss", "optimization"):
        bind(cfg[key])


@pytest.mark.parametrize("family", ["coconut", "codi", "colar", "cot"])
def test_a_model_takes_the_recipe_of_its_name_unless_told_another(family):
    assert compose("train_reasoner", overrides=[f"model={family}"]).recipe._target_.startswith(
        f"latent_tts.recipe.{family}."
    )
    assert compose("train_reasoner", overrides=[f"model={family}", "recipe=cot"]).recipe._target_.endswith("cot.Cot")


@pytest.mark.parametrize("command", sorted(schemas.SCHEMAS))
def test_every_command_composes_and_shows_every_key_of_its_schema(command):
    cfg = compose(command)
    assert set(cfg) == set(schemas.SCHEMAS[command].__dataclass_fields__)
    for key in cfg:
        assert not OmegaConf.is_missing(cfg, key) or key in ("a", "b", "src", "dst", "run")


@pytest.mark.parametrize("experiment", sorted(path.stem for path in (CONF / "experiment").glob("*.yaml")))
def test_experiments_compose(experiment):
    compose("run", overrides=[f"experiment={experiment}"])


@pytest.mark.parametrize(
    ("command", "overrides"),
    [
        ("run", []),
        ("run", ["sampler=gaussian", "sampler.sigma=0.5", "n=2"]),
        ("run", ["experiment=smoke", "aggregator=majority", "hydra.job.name=x"]),
        ("run", ["sampler=gaussian,dropout", "n=1,2"]),
        ("train_reasoner", ["model=codi", "recipe=cot", "+optimization.more=1"]),
    ],
    ids=str,
)
def test_composing_once_a_process_gives_what_hydra_gives(command, overrides, monkeypatch):
    def composed():
        loader = GlobalHydra.instance().config_loader()
        mode = RunMode.MULTIRUN if any("," in override for override in overrides) else RunMode.RUN
        return OmegaConf.to_yaml(loader.load_configuration(command, overrides, mode))

    first = composed()
    compose(command, [*overrides, "seed=7"] if "," not in "".join(overrides) else [])
    assert composed() == first
    monkeypatch.setattr(compose_once, "_has_other_sources", lambda repo: True)
    assert composed() == first


def test_several_aggregators_or_one_can_be_chosen():
    assert set(compose("run").aggregator) == {"majority", "likelihood", "best_of_n", "weighted"}
    assert set(compose("run", overrides=["aggregator=majority"]).aggregator) == {"majority"}


def test_samplers_take_their_defaults_from_the_model():
    cfg = compose("run", overrides=["sampler=gaussian", "model.recommended.sigma=0.25"])
    assert cfg.sampler.sigma == 0.25
