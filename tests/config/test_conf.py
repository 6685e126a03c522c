"""Every YAML file binds to what it names, without building anything."""

import importlib
import inspect
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from latent_tts.config import build as config
from latent_tts.config import reference

CONF = Path(reference.conf_dir())
OPTIONS = sorted(path.relative_to(CONF).with_suffix("").parts for path in CONF.glob("*/*.yaml"))
BUILDING = [option for option in OPTIONS if "_target_" in OmegaConf.load(CONF.joinpath(*option).with_suffix(".yaml"))]


def load(group: str, option: str) -> DictConfig:
    loaded = OmegaConf.load(CONF / group / f"{option}.yaml")
    assert isinstance(loaded, DictConfig)
    for entry in loaded.pop("defaults", []):  # options of a group within the group
        for key in entry if OmegaConf.is_dict(entry) else ():
            loaded[key] = load(f"{group}/{key}", entry[key])
    return loaded


def bind(node) -> None:
    values = OmegaConf.to_container(node, resolve=True)
    module, _, name = values.pop("_target_").rpartition(".")
    inspect.signature(getattr(importlib.import_module(module), name)).bind(**values)


@pytest.mark.parametrize(("group", "option"), BUILDING, ids="=".join)
def test_options_bind_to_their_targets(group, option):
    model = option if group in ("model", "recipe") else "demo_coconut"  # what other groups take values from
    root = OmegaConf.create({"model": load("model", model)})
    root[group] = load(group, option)
    bind(root[group])


@pytest.mark.parametrize("model", [option for group, option in OPTIONS if group == "model"])
@pytest.mark.parametrize("sampler", [option for group, option in OPTIONS if group == "sampler"])
def test_every_model_has_what_samplers_take_from_it(sampler, model):
    bind(OmegaConf.create({"model": load("model", model), "sampler": load("sampler", sampler)}).sampler)


def test_options_of_all_groups_are_tested():
    assert {group for group, _ in OPTIONS} - {group for group, _ in BUILDING} == {"engine", "experiment"}


@pytest.fixture(autouse=True)
def hydra_here():
    config.register_schemas()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def test_nodes_without_a_group_bind_too():
    cfg = compose("train_reasoner")
    for key in ("backbone", "recipe", "optimization"):
        bind(cfg[key])
    cfg = compose("train_rm")
    for key in ("loss", "optimization"):
        bind(cfg[key])


@pytest.mark.every_other
@pytest.mark.parametrize("family", ["coconut", "codi", "colar", "cot"])
def test_a_model_takes_the_recipe_of_its_name_unless_told_another(family):
    assert compose("train_reasoner", overrides=[f"model={family}"]).recipe._target_.startswith(
        f"latent_tts.recipe.{family}."
    )
    assert compose("train_reasoner", overrides=[f"model={family}", "recipe=cot"]).recipe._target_.endswith("cot.Cot")


@pytest.mark.parametrize("command", sorted(reference.command_files()))
def test_every_command_composes_and_shows_every_key_of_its_schema(command):
    cfg = compose(command)
    assert set(cfg) == set(reference.read_command(command).schema.__dataclass_fields__)
    for key in cfg:
        assert not OmegaConf.is_missing(cfg, key) or key in ("a", "b", "src", "dst", "run")


@pytest.mark.parametrize("experiment", sorted(path.stem for path in (CONF / "experiment").glob("*.yaml")))
def test_experiments_compose(experiment):
    compose("run", overrides=[f"experiment={experiment}"])


def test_several_aggregators_or_one_can_be_chosen():
    assert set(compose("run").aggregator) == {"majority", "likelihood", "best_of_n", "weighted"}
    assert set(compose("run", overrides=["aggregator=majority"]).aggregator) == {"majority"}


def test_samplers_take_their_defaults_from_the_model():
    cfg = compose("run", overrides=["sampler=gaussian", "model.recommended.sigma=0.25"])
    assert cfg.sampler.sigma == 0.25
