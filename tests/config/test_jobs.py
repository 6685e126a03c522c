"""Jobs and sweeps run as Hydra runs them, and files are composed once per choice of options."""

import json
from collections import Counter
from pathlib import Path

import pytest
from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.core.utils import JobRuntime, setup_globals
from hydra.types import RunMode
from marks import slow
from omegaconf import OmegaConf
from refusal import check

from latent_tts.config import build
from latent_tts.config.build import conf_dir, register_schemas
from latent_tts.config.jobs import Loader


@pytest.fixture
def hydra_is_set_up():
    setup_globals()
    register_schemas()
    version.setbase("1.3")
    JobRuntime().set("name", "run")


def composed_by(loader, *overrides, mode=RunMode.RUN):
    """The config as text, and the flags of its nodes; or what is wrong with the overrides."""
    try:
        cfg = loader(create_config_search_path(conf_dir())).load_configuration("run", list(overrides), mode)
    except Exception as error:
        return repr(error), repr(error.__cause__)
    flags = [OmegaConf.is_struct(node) for node in (cfg, cfg.model, cfg.hydra)]
    return OmegaConf.to_yaml(cfg), flags, OmegaConf.is_readonly(cfg.hydra), OmegaConf.get_type(cfg)


@pytest.mark.every_other
@pytest.mark.parametrize("mode", [RunMode.RUN, slow(RunMode.MULTIRUN)])
@pytest.mark.parametrize(
    "overrides",
    [
        ["n=2", "sampler=gaussian", "sampler.sigma=0.3", "aggregator=[majority]"],
        ["seed=4", "hydra.run.dir=here", "hydra.job.env_copy=[HOME]", "hydra.mode=RUN"],
        ["model={name: a}", "+more=1", "++n=3", "~keep_latents", "~executor"],
        ["n=1", "n=2", "hydra.job.config.override_dirname.exclude_keys=[seed]", "seed=5"],
        ["n=1,2", "sampler=gaussian,dropout"],
        ["n=two"],
        ["no_such_key=1"],
        ["sampler=no_such_option", "n=two"],
    ],
)
def test_a_config_is_hydras_own(hydra_is_set_up, overrides, mode):
    wanted = composed_by(ConfigLoaderImpl, *overrides, mode=mode)
    assert composed_by(Loader, *overrides, mode=mode) == wanted
    composed_by(Loader, "n=7", *(each for each in overrides if each.startswith("sampler")), mode=mode)
    assert composed_by(Loader, *overrides, mode=mode) == wanted


def test_a_file_that_changed_is_read_again(hydra_is_set_up, place):
    own = Path("config/latent_tts/sampler/own.yaml")
    assert "no_such" not in composed_by(Loader, "sampler=greedy")[0]
    assert "Could not find 'sampler/own'" in composed_by(Loader, "sampler=own")[0]
    own.parent.mkdir(parents=True)
    for value in ("first", "second one"):
        own.write_text(f"value: {value}\n")
        assert f"value: {value}\n" in composed_by(Loader, "sampler=own")[0]


def test_a_config_names_the_folders_that_it_was_searched_in(hydra_is_set_up, tmp_path):
    def sources(*folders):
        path = create_config_search_path(conf_dir())
        for folder in folders:
            path.prepend("command-line", f"file://{folder}", "schema")
        cfg = Loader(path).load_configuration("run", [], RunMode.RUN)
        return [source.path for source in cfg.hydra.runtime.config_sources]

    assert str(tmp_path) in sources(tmp_path)  # which is empty
    assert str(tmp_path) not in sources()


@pytest.mark.slow
def test_a_sweep_composes_each_choice_of_options_once(run, monkeypatch):
    composed, compose = Counter(), ConfigLoaderImpl._compose_config_from_defaults_list

    def counted(self, defaults, repo):
        composed.update(default.config_path for default in defaults)
        return compose(self, defaults, repo)

    monkeypatch.setattr(ConfigLoaderImpl, "_compose_config_from_defaults_list", counted)
    monkeypatch.setattr("latent_tts.config.jobs._composed", {})
    build._defaults.cache_clear()
    swept = run("sampler=greedy,gaussian", "scorer=none", "seed=3,4", "n=1", "-m", "hydra.sweep.dir=swept")
    assert swept.code == 0, swept.err
    found = [json.loads(Path(f"swept/{job}/run.json").read_text())["config"] for job in range(4)]
    drawn = [(each["sampler"]["_target_"].split(".")[-2], each["seed"]) for each in found]
    assert drawn == [("greedy", 3), ("greedy", 4), ("gaussian", 3), ("gaussian", 4)]
    assert composed["sampler/gaussian"] == 2  # for the jobs, and for the defaults that they are compared with


def test_a_job_is_composed_once(ltts, monkeypatch):
    composed, compose = Counter(), ConfigLoaderImpl._compose_config_from_defaults_list

    def counted(self, defaults, repo):
        composed.update(default.config_path for default in defaults)
        return compose(self, defaults, repo)

    monkeypatch.setattr(ConfigLoaderImpl, "_compose_config_from_defaults_list", counted)
    monkeypatch.setattr("latent_tts.config.jobs._composed", {})
    build._defaults.cache_clear()
    assert ltts("run", "sampler=greedy", "scorer=none", "n=1", "task.limit=1").code == 0
    assert composed["run"] == composed["scorer/none"] == 1  # for the job, and for the defaults that it is compared with


@pytest.mark.slow
def test_a_mode_of_hydra_is_a_sweep_without_a_flag(run):
    swept = run("hydra.mode=MULTIRUN", "seed=3,4", "n=1")
    assert swept.code == 0, swept.err
    folders = [swept.last.parent / str(job) for job in range(2)]
    assert [json.loads((folder / "run.json").read_text())["config"]["seed"] for folder in folders] == [3, 4]


def test_what_cannot_be_composed_is_refused_in_the_usual_words(ltts):
    check(ltts("run", "seed=3,4"), "seed=3,4: several values; -m runs a job for each")
    check(ltts("run", "no_such_key=1"), "no_such_key")
