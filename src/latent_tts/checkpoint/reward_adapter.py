"""LatentRMs as low-rank adapters: small matrices and a head over the weights of the reasoner, which both share.

Such a folder has PEFT's files, the head (`own.safetensors`), the reasoner's tokenizer and config, and in that
`latent_rm.base`, the reasoner's checkpoint, whose digest is `latent_rm.reasoner`. The products are added as they are
computed, not to the weights; so scores are the same whether the weights are shared or loaded for the scorer alone.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latent_tts.checkpoint import files, joining
from latent_tts.errors import require
from latent_tts.types import read_object

if TYPE_CHECKING:
    from torch import Tensor, nn

HEAD = ("classifier.weight", "classifier.bias")


def is_reward_adapter(folder: Path) -> bool:
    """Whether a folder holds a LatentRM that is an adapter."""
    record = read_object(folder / "config.json").get("latent_rm")
    is_adapter = (folder / files.ADAPTER).is_file() and not joining.is_own_adapter(folder)
    return is_adapter and isinstance(record, dict) and "base" in record


def base_folder(folder: Path, key: str) -> Path:
    """The folder of the reasoner whose weights a LatentRM shares (imports torch where that one is an adapter).

    Raises:
        UsageError: it is missing, or another one.
    """
    record = files.read_json(folder, "config.json", key=key).get("latent_rm") or {}
    return joining.base_folder(joining.find_base(folder, record, record.get("reasoner"), "reasoner", key), key)


def file_paths(folder: Path, key: str) -> list[Path]:
    """The files that hold what was trained.

    Raises:
        UsageError: one is missing.
    """
    paths = [folder / name for name in (files.ADAPTER, joining.WEIGHTS, joining.OWN)]
    for path in paths:
        require(key, folder, path.is_file(), f"the folder lacks {path.name}")
    return paths


def attach(backbone: nn.Module, prefix: str, folder: Path, key: str) -> None:
    """Add the products of an adapter to the linear layers of a backbone, in place; weights are not touched.

    Args:
        backbone: the transformer without a head.
        prefix: what its parameters' names begin with in the causal LM, as in `model`.
        folder: the adapter's.
        key: the config key that errors name.

    Raises:
        UsageError: the adapter has what a product does not cover, or a matrix that fits no layer.
    """
    from safetensors.torch import load_file

    from latent_tts.checkpoint.modules import LowRank

    settings = joining.read_settings(folder, key)
    factors, layers = load_file(folder / joining.WEIGHTS), dict(backbone.named_modules())
    weight, left = next(backbone.parameters()), set(factors)
    scale = float(settings["lora_alpha"]) / int(settings["r"])
    for name in sorted(name for name in factors if name.endswith(joining.FACTORS[0])):
        path = name.removeprefix(joining.PREFIX).removesuffix(joining.FACTORS[0]).removeprefix(f"{prefix}.")
        other = name.replace(*joining.FACTORS)
        require(key, folder, path in layers and other in factors, f"its tensor {name} fits no layer of the reasoner")
        down_RD, up_DR = (factors[each].to(weight.device, weight.dtype) for each in (name, other))
        parent, _, own_name = path.rpartition(".")
        setattr(layers[parent], own_name, LowRank(layers[path], down_RD, up_DR, scale))
        left -= {name, other}
    require(key, folder, not left, f"its tensor {min(left, default='')} fits no layer of the reasoner")


def sharing_copy(module: nn.Module) -> Any:
    """A copy of a module whose layers can be replaced, with the very tensors of the original."""
    from torch import Tensor

    tensors = [value for part in module.modules() for value in (*vars(part).values(), *part._parameters.values(),
                                                                *part._buffers.values())]  # fmt: skip
    return copy.deepcopy(module, {id(value): value for value in tensors if isinstance(value, Tensor)})


def write(
    folder: Path,
    reasoner: Path,
    weights: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    head: Mapping[str, Tensor],
    config: Mapping[str, Any],
) -> None:
    """Write a LatentRM that is an adapter.

    Args:
        folder: to write to.
        reasoner: the folder whose tokenizer it has.
        weights: of PEFT.
        settings: PEFT's config.
        head: `HEAD`.
        config: the `config.json`.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    base = config["latent_rm"]["base"]
    record = config["latent_rm"] | joining.record_of_base(base, folder)
    (folder / files.ADAPTER).write_text(json.dumps({**settings, "base_model_name_or_path": base}, indent=2) + "\n")
    save_file(dict(weights), folder / joining.WEIGHTS, metadata={"format": "pt"})
    save_file(dict(head), folder / joining.OWN, metadata={"format": "pt"})
    shutil.copyfile(reasoner / "tokenizer.json", folder / "tokenizer.json")
    (folder / "config.json").write_text(json.dumps({**config, "latent_rm": record}, indent=2) + "\n")


def join(folder: Path, target: Path, key: str) -> None:
    """Write a LatentRM with weights of its own: those of the reasoner with the products added, in float32.

    Raises:
        UsageError: the reasoner is missing or another one, or a matrix fits no weight of it.
    """
    from safetensors.torch import load_file, save_file

    from latent_tts.checkpoint import loading

    base, settings = base_folder(folder, key), joining.read_settings(folder, key)
    _, weights, own = file_paths(folder, key)
    tensors = {name: value.float() for name, value in loading.load_tensors(base, "").items()}
    settings["transposed"] = files.read_config(base).get("model_type") == joining.TRANSPOSED
    tensors = joining.add_adapter(tensors, load_file(weights), settings, folder, key)
    adapted = {name.removeprefix(joining.PREFIX).partition(".")[0] for name in load_file(weights)}
    kept = {name: value.contiguous() for name, value in tensors.items() if name.partition(".")[0] in adapted}
    kept |= {name: value.float() for name, value in load_file(own).items()}
    target.mkdir(parents=True, exist_ok=True)
    save_file(kept, target / files.WEIGHTS, metadata={"format": "pt"})
    config = files.read_json(folder, "config.json", key=key)
    record = {name: value for name, value in config["latent_rm"].items() if name not in ("base", "base_path")}
    config |= {"latent_rm": record, "dtype": "float32"}
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shutil.copyfile(folder / "tokenizer.json", target / "tokenizer.json")
