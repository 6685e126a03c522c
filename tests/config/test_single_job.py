"""Hydra composes the config of a job once; sweeps and flags go its own way."""

import json

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from refusal import check


@pytest.fixture
def composed(monkeypatch):
    """The configs that were composed, other than the defaults that a job's are compared with."""
    names, load = [], ConfigLoaderImpl.load_configuration

    def counted(self, config_name, overrides, *arguments, **more):
        names.append(list(overrides))
        return load(self, config_name, overrides, *arguments, **more)

    monkeypatch.setattr(ConfigLoaderImpl, "load_configuration", counted)
    return names


def test_a_job_is_composed_once(run, composed):
    assert run("n=2").code == 0
    assert sum("n=2" in overrides for overrides in composed) == 1


def test_a_mode_of_hydra_is_a_sweep_without_a_flag(run):
    swept = run("hydra.mode=MULTIRUN", "seed=3,4", "n=1")
    assert swept.code == 0, swept.err
    folders = [swept.last.parent / str(job) for job in range(2)]
    assert [json.loads((folder / "run.json").read_text())["config"]["seed"] for folder in folders] == [3, 4]


def test_what_cannot_be_composed_is_refused_in_the_usual_words(ltts):
    check(ltts("run", "seed=3,4"), "seed=3,4: several values; -m runs a job for each")
    check(ltts("run", "no_such_key=1"), "no_such_key")
