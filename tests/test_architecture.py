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

# Rooms by layer, lowest first: a room imports only from lower layers, or what its own row allows beside it.
ALLOWED = {
    "errors": set(),
    "philox": set(),
    "types": {"rng", "thoughts"},  # for annotations alone
    "latex": set(),
    "answer": {"errors", "latex"},
    "checkpoint": {"errors", "types", "gpu"},
    "layouts": {"errors"},
    "adapter": {"errors", "types", "checkpoint", "thoughts"},  # thoughts for annotations alone
    "cost": set(),
    "decoding": {"errors", "types", "rng"},
    "cpu": set(),
    "gpu": set(),
    "machine_code": set(),
    "rng": {"philox", "philox_rows"},
    "philox_rows": {"philox", "philox_kernel", "philox_triton", "cpu"},
    "philox_kernel": {"philox", "machine_code"},
    "philox_triton": set(),
    "model": {"errors", "types", "checkpoint", "adapter", "schedule"},
    "sampler": {"errors", "types", "rng"},
    "thoughts": {"types"},
    "schedule": {"errors", "types", "thoughts"},
    "scorer": {"errors", "types", "checkpoint"},
    "task": {"errors", "types", "philox", "answer"},
    "budget": {"errors", "types"},
    "aggregator": {"errors", "types"},
    "store": {"errors", "types"},
    "annotated": {"types"},
    "annotations": {"errors", "annotated", "store"},
    "stats": {"errors", "types", "philox", "aggregator"},
    "metrics": {"errors", "types", "stats", "store"},
    "plot": {"errors", "types", "store"},
    "report": {"errors", "types"},
    "engine": {
        *("errors", "types", "model", "sampler", "schedule", "thoughts", "rng", "cost"),
        *("cpu", "gpu", "machine_code"),
    },
    "training": {
        *("errors", "types", "checkpoint", "adapter", "model", "task", "sampler", "engine", "philox", "rng"),
        "annotations",
    },
    "recipe": {"errors", "adapter", "model", "training"},
    "labelling": {"errors", "types", "engine", "philox", "rng", "store", "annotated", "annotations"},
    "search": {"errors", "types", "philox", "rng", "engine"},
    "executor": {"errors", "types", "cost", "cpu", "gpu", "engine", "sampler", "rng", "store"},
    "schemas": set(),
    "config": {"errors", "types", "schemas"},
    "cli": {"errors", "types", "config", "commands"},
    "__main__": {"cli"},
    "commands": None,  # assembles everything below it
}
HYDRA = {"cli", "config", "schemas", "commands"}
TORCH = {"cpu", "gpu", "philox_rows", "philox_triton", "rng", "engine", "training", "executor", "labelling"}


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
    allowed = ALLOWED[room]
    if allowed is None:
        assert "cli" not in own
    else:
        assert own <= allowed, f"{room} imports {sorted(own - allowed)}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(SRC)))
def test_only_the_command_line_knows_hydra_and_only_heavy_rooms_import_torch(path):
    roots = {name.split(".")[0] for name in imports(path)}
    if room_of(path) not in HYDRA:
        assert not roots & {"hydra", "omegaconf"}
    on_import = {name.split(".")[0] for name in imports(path, top_level=True)}
    if room_of(path) not in TORCH:
        assert not on_import & {"torch", "transformers", "accelerate"}


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(SRC)))
def test_no_file_passes_400_lines(path):
    assert len(path.read_text().splitlines()) <= 400


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
