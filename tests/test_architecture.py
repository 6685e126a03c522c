"""The rules of docs/architecture.md, held by reading the source."""

import ast
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src" / "latent_tts"
SETTINGS = {"engine"}  # groups of settings alone: their options build nothing
ROOMS = [
    path.name
    for path in sorted((ROOT / "conf").iterdir())
    if path.is_dir() and (SRC / path.name).is_dir() and path.name not in SETTINGS
]

# The order of rooms, lowest first: a file imports from its own room and from rooms of earlier lines.
ORDER = [
    ["errors", "types"],
    ["text", "random", "schedule", "budget", "aggregator"],
    ["checkpoint", "sampler", "task"],
    ["model"],
    ["scorer", "results"],
    ["engine"],
    ["search", "training"],
    ["recipe", "pipeline"],
    ["config"],
    ["commands"],
    ["cli"],
    ["__main__"],
]
PLACE = {room: place for place, rooms in enumerate(ORDER) for room in rooms}
HYDRA = {"cli", "config", "commands"}
TORCH = {"random", "checkpoint", "engine", "training", "pipeline"}


def modules() -> list[Path]:
    return sorted(path for path in SRC.rglob("*.py") if path.name != "__init__.py")


def room_of(path: Path) -> str:
    return path.relative_to(SRC).parts[0].removesuffix(".py")


def imports(path: Path, *, top_level: bool = False) -> list[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level else list(ast.walk(tree))
    names = []
    for node in nodes:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(SRC)))
def test_imports_go_down_only(path):
    room = room_of(path)
    own = {name.split(".")[1] for name in imports(path) if name.startswith("latent_tts.")} - {room}
    above = sorted(name for name in own if PLACE[name] >= PLACE[room])
    assert not above, f"{room} imports {above}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(SRC)))
def test_only_the_command_line_knows_hydra_and_only_heavy_rooms_import_torch(path):
    roots = {name.split(".")[0] for name in imports(path)}
    if room_of(path) not in HYDRA:
        assert not roots & {"hydra", "omegaconf"}
    on_import = {name.split(".")[0] for name in imports(path, top_level=True)}
    if room_of(path) not in TORCH:
        assert not on_import & {"torch", "transformers", "accelerate"}


def targets(room: str) -> dict[str, str]:
    files = sorted((ROOT / "conf" / room).glob("*.yaml"))
    return {file.stem: yaml.safe_load(file.read_text())["_target_"] for file in files}


@pytest.mark.parametrize("room", ROOMS)
def test_every_option_lives_in_its_room_and_every_module_of_a_room_is_an_option(room):
    used = {target.rpartition(".")[0] for target in targets(room).values()}
    assert used == {f"latent_tts.{room}.{path.stem}" for path in (SRC / room).glob("*.py") if path.stem != "__init__"}
    assert len(targets(room)) >= 2


def test_the_groups_are_the_rooms_that_users_know():
    assert ROOMS == ["aggregator", "budget", "model", "recipe", "sampler", "schedule", "scorer", "search", "task"]
