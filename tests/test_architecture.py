"""The rules of docs/architecture.md, held by reading the source."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from latent_tts.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src" / "latent_tts"

# The order of rooms, lowest first: a file imports from its own room and from rooms of earlier lines.
ORDER = [
    {"errors", "types"},
    {"text", "random", "schedule", "aggregator", "executor"},
    {"budget", "checkpoint", "sampler", "task"},
    {"model"},
    {"scorer", "results"},
    {"engine"},
    {"search", "training"},
    {"recipe", "pipeline"},
    {"config"},
    {"commands"},
    {"cli"},
]
PLACE = {room: place for place, rooms in enumerate(ORDER) for room in rooms}
LOOSE_MODULES = {"__init__", "__main__", "cli", "errors", "types"}
GROUPS = {"aggregator", "budget", "executor", "model", "recipe", "sampler", "schedule", "scorer", "search", "task"}
KNOW_HYDRA = {"cli", "config", "commands"}
MAX_STATEMENTS_PER_COMMAND = 100


def module_name(path: Path) -> str:
    """`engine.rollout` for engine/rollout.py, `engine` for engine/__init__.py."""
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


PATHS = {module_name(path): path for path in sorted(SRC.rglob("*.py"))}


def tree_of(module: str) -> ast.Module:
    return ast.parse(PATHS[module].read_text())


@cache
def imports(module: str) -> set[str]:
    """All that a file imports, for types and inside functions too: `package.module` or `package.module.name`."""
    names = set()
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{'.' * node.level}{node.module}.{alias.name}" for alias in node.names}
    return names


def own_imports(module: str) -> set[str]:
    """The modules of the package that one of its modules imports."""
    names = {name.removeprefix("latent_tts.") for name in imports(module) if name.startswith("latent_tts.")}
    return {name if name in PATHS else name.rpartition(".")[0] for name in names} - {module}


def room_of(module: str) -> str:
    return module.partition(".")[0]


def test_every_import_is_absolute():
    assert not [module for module in PATHS if any(name.startswith(".") for name in imports(module))]


def test_rooms_import_from_lower_rooms_only():
    inside = {module for module in PATHS if module not in ("", "__main__")}
    assert {room_of(module) for module in inside} == set(PLACE), "ORDER lists other rooms than there are"
    above = [
        f"{module} imports {name}"
        for module in inside
        for name in own_imports(module)
        if room_of(name) != room_of(module) and PLACE[room_of(name)] >= PLACE[room_of(module)]
    ]
    assert not above


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Circles of imports, found one by one: each loses its last import before the next is looked for."""
    graph, found = {module: set(names) for module, names in graph.items()}, []
    while True:
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            circle = error.args[1]
            graph[circle[1]].discard(circle[0])
            found.append(circle)
        else:
            return found


def test_files_do_not_import_one_another_in_a_circle():
    found = circles({module: own_imports(module) for module in PATHS})
    assert not [" -> ".join(reversed(circle)) for circle in found]


def test_a_circle_is_found_over_three_files_and_beside_another():
    graph = {"a": {"b", "d"}, "b": {"c"}, "c": {"a"}, "d": {"e"}, "e": {"d"}, "f": {"a"}}
    assert sorted(sorted(set(circle)) for circle in circles(graph)) == [["a", "b", "c"], ["d", "e"]]
    assert circles({"a": {"b"}, "b": {"c"}, "c": set()}) == []


def test_no_module_lies_loose_beside_the_rooms():
    assert {path.stem for path in SRC.glob("*.py")} == LOOSE_MODULES


def test_only_cli_config_and_commands_know_hydra():
    knowing = {
        room_of(module)
        for module in PATHS
        if {name.partition(".")[0] for name in imports(module)} & {"hydra", "omegaconf"}
    }
    assert knowing <= KNOW_HYDRA


def statements(tree: ast.Module) -> int:
    return sum(isinstance(node, ast.stmt) for node in ast.walk(tree))


def test_commands_are_short_and_import_no_other_command():
    commands = {module for module in PATHS if module.startswith("commands.")}
    assert commands == {f"commands.{name.replace('-', '_')}" for name in COMMANDS}
    importing = {module for module in commands if any(name in commands for name in own_imports(module))}
    assert not importing
    long = {module for module in commands if statements(tree_of(module)) > MAX_STATEMENTS_PER_COMMAND}
    assert not long


REFUSED = [
    "run n=0",
    "ask question n=0",
    "rescore nowhere",
    "replay nowhere",
    "annotate n=0",
    "train-reasoner save_every=0",
    "train-rm optimization.lr=0",
    "train-draft updates=0",
    "tune n=0",
    "probe directions=0",
    "trace question n=0",
    "collect nowhere",
    "compare nowhere nothere",
    "plot nowhere",
    "cache older_than=0",
    "convert nowhere new",
]


@pytest.mark.slow
def test_a_refused_command_imports_no_torch(tmp_path):
    assert [line.split()[0] for line in REFUSED] == list(COMMANDS)
    options = [f"latent_tts.{module}" for module in PATHS if room_of(module) in GROUPS]
    code = f"""
import importlib, sys
from latent_tts import cli
for option in {options}:
    importlib.import_module(option)
codes = [cli.main(line.split()) for line in {REFUSED}]
assert codes == {[2] * len(REFUSED)}, codes
assert not {{"torch", "transformers", "accelerate", "datasets"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def targets(group: str) -> dict[str, str]:
    files = sorted((ROOT / "conf" / group).glob("*.yaml"))
    return {file.stem: yaml.safe_load(file.read_text())["_target_"] for file in files}


@pytest.mark.parametrize("group", sorted([*GROUPS, "budget/rule"]))
def test_every_option_of_a_group_lies_in_its_room_and_every_module_of_the_room_is_an_option(group):
    used = {target.rpartition(".")[0] for target in targets(group).values()}
    room = f"latent_tts.{group.replace('/', '.')}"
    assert used == {f"{room}.{path.stem}" for path in (SRC / group).glob("*.py") if path.stem != "__init__"}
    assert len(targets(group)) >= 2


def test_the_groups_are_the_folders_of_conf_that_are_rooms():
    settings_alone = {"engine"}  # its options build nothing
    folders = {path.name for path in (ROOT / "conf").iterdir() if path.is_dir()}
    assert (folders & set(PLACE)) - settings_alone == GROUPS


def test_tests_lie_in_the_same_rooms_as_the_code():
    rooms = {path.name for path in SRC.iterdir() if path.is_dir()}
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders <= rooms | {"helpers", "golden", "parity"}
    loose = {path.stem for path in (ROOT / "tests").glob("*.py")}
    about = {"architecture", "benchmarks", "errors", "experiments", "wheel"}
    assert loose == {"conftest", *(f"test_{what}" for what in about)}


def test_tests_share_code_through_helpers_alone():
    importing = re.compile(r"^\s*(from|import) test_", re.MULTILINE)
    assert not [str(path) for path in (ROOT / "tests").rglob("*.py") if importing.search(path.read_text())]


def test_property_tests_draw_the_same_cases_whatever_is_imported(tmp_path, monkeypatch):
    drawn: list[int] = []

    @given(st.integers())
    def draw(number):
        drawn.append(number)

    draw()
    first = drawn[:]
    drawn.clear()
    (tmp_path / "numbers_of_its_own.py").write_text(f"NUMBERS = {list(range(10**9, 10**9 + 99))}")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("numbers_of_its_own")
    draw()
    assert drawn == first


@pytest.mark.parametrize("turn", [1, 2])
def test_torch_draws_the_same_numbers_whatever_ran_before(turn, checkpoint):
    assert torch.rand(9).equal(torch.rand(9, generator=torch.Generator().manual_seed(0)))


def test_the_page_has_the_order_of_rooms_and_names_every_file_of_large_rooms():
    page = (ROOT / "docs" / "architecture.md").read_text()
    (block,) = [block for block in page.split("```") if "errors types <" in block]
    assert [set(rooms.split()) for rooms in block.split("<")] == ORDER
    rooms = ("checkpoint", "config", "engine", "pipeline", "results", "training")
    files = [path.name for room in rooms for path in (SRC / room).rglob("*.py") if path.parent.name != "convert"]
    assert not [name for name in files if name != "__init__.py" and not re.search(rf"\b{name}", page)]


def test_every_guarantee_names_a_test():
    rows = [line for line in (ROOT / "docs" / "guarantees.md").read_text().splitlines() if line.startswith("| ")][2:]
    assert len(rows) >= 10
    for row in rows:
        path, _, name = row.split("`")[-2].partition(": ")
        assert f"def {name}(" in (ROOT / path).read_text(), row
