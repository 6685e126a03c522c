"""The package of docs/add-a-model.md, taken from the page, installed and run."""

import importlib
import re
import sys
import tomllib
from pathlib import Path

import pandas as pd
import pytest
from refusal import check

PAGE = Path(__file__).resolve().parents[2] / "docs" / "add-a-model.md"
BLOCK = re.compile(r'^```\w+ title="(.+?)"\n(.*?)^```$', re.M | re.S)


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The page's files on the path, with the metadata that an installation would write."""
    site = tmp_path / "site"
    for name, text in BLOCK.findall(PAGE.read_text()):
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(text)
    project = tomllib.loads((site / "pyproject.toml").read_text())["project"]
    info = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    lines = [
        f"[{group}]\n" + "\n".join(f"{name} = {value}" for name, value in entries.items())
        for group, entries in project["entry-points"].items()
    ]
    (info / "entry_points.txt").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(site)
    importlib.invalidate_caches()
    yield site
    for name in [name for name in sys.modules if name.partition(".")[0] == "soft_thoughts"]:
        del sys.modules[name]


def test_the_example_is_short():
    lines = [line for _, text in BLOCK.findall(PAGE.read_text()) for line in text.splitlines()]
    assert 0 < len(lines) < 80


def test_the_example_runs_with_samplers_and_schedules(installed, run):
    line = ["model=soft_thoughts", "sampler=gaussian", "sampler.sigma=0.05", "n=2", "task.limit=3"]
    result = run(*line)
    assert result.code == 0, result.err
    assert set(pd.read_csv(result.last)["model"]) == {"soft_thoughts"}
    assert "soft_thoughts" in run("--help").out
    check(run("model=gpt5"), "demo_coconut", "soft_thoughts")
    check(run("model=soft_thoughts", "model.latents=-1"), "model.latents=-1")


def test_without_the_package_there_is_no_such_option(run):
    check(run("model=soft_thoughts"), "model=soft_thoughts", "no such option")
