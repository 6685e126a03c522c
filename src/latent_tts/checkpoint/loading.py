"""Weights of checkpoint folders, loaded: tensors, causal LMs, backbones (imports torch and transformers)."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from latent_tts.checkpoint import files
from latent_tts.errors import bad_value, require

# matrices and biases of blocks, not the causal masks of old checkpoints
IN_BLOCK = re.compile(r"(^|\.)(h|layers)\.\d+\..*(weight|(?<!attn\.)(?<!attention\.)(?<!masked_)bias)$")


def load_tensors(folder: Path, prefix: str, *, keep_prefix: bool = False) -> dict[str, Tensor]:
    """The tensors under a prefix, which is dropped from their names unless it is to be kept."""
    tensors = {}
    for path in files.weight_files(folder):
        wanted = [name for name in files.tensor_shapes(path) if name.startswith(prefix)]
        with safe_open(path, "pt") as file:
            tensors |= {name if keep_prefix else name.removeprefix(prefix): file.get_tensor(name) for name in wanted}
    return tensors


def read_pickles(shards: Sequence[Path]) -> dict[str, Tensor]:
    """A state dict from the shards of a pickle; no code is unpickled.

    Raises:
        UsageError: a file is not a pickle of tensors.
    """
    state: dict[str, Tensor] = {}
    for path in shards:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
            raise bad_value(
                "src", path, f"not a pickle that contains only tensors ({str(error).splitlines()[0][:120]})"
            ) from error
        shard = content.get("state_dict", content) if isinstance(content, dict) else {}
        only_tensors = bool(shard) and all(isinstance(value, Tensor) for value in shard.values())
        require("src", path, only_tensors, "does not hold a dict of tensors")
        state |= shard
    return state


def fill_module(module: nn.Module, tensors: Mapping[str, Tensor], lm: PreTrainedModel) -> Any:
    """A module with these weights, on the device and in the dtype of a model, in evaluation mode."""
    module.load_state_dict(tensors)
    return module.to(lm.device, lm.dtype).eval().requires_grad_(False)


def compute_exactly() -> None:
    """Set torch so that a dtype means the same on every GPU, whatever the environment says.

    Products of float32 do not use TensorFloat-32, and products of half precision are summed in float32. Attention does
    not use cuDNN, which makes a plan for every new shape: nearly every batch of prompts has one.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.enable_cudnn_sdp(False)


def load_causal_lm(
    folder: Path,
    *,
    device: str,
    dtype: str,
    key: str = files.MODEL_KEY,
    auto_class: Any = transformers.AutoModelForCausalLM,
) -> PreTrainedModel:
    """The causal LM of a checkpoint in evaluation mode, its weights cast to `dtype` (`float32`, `bfloat16`, ...).

    With `auto_class=transformers.AutoModel` it is the backbone, without a language-model head.

    Raises:
        UsageError: a weight is missing or has another shape than the config says.
    """
    compute_exactly()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    settings = files.read_json(folder, "config.json", key=key)
    files.check_settings(settings, folder, key=key)
    files.check_shapes(settings, files.weight_shapes(folder, key=key), folder, key=key)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        config._attn_implementation = config._experts_implementation = None
        loaded: Any = auto_class.from_pretrained(
            folder,
            config=config,
            dtype=getattr(torch, dtype),
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=False,
        )
        model, info = loaded
    except (
        *(RuntimeError, ValueError, OSError, KeyError, TypeError, AttributeError),
        *(ImportError, StrictDataclassError),
    ) as error:
        reason = f"transformers cannot load it: {' '.join(str(error).split())[:200]}"
        if "auto_map" in settings and "trust_remote_code" in str(error):
            reason = f"its model_type={settings.get('model_type')} needs code of its own (auto_map), which is never run"
        raise bad_value(key, folder, reason) from error
    missing = ", ".join(sorted(info["missing_keys"])[:3])
    require(key, folder, not missing, f"weights are missing: {missing} ...")
    unused = min((name for name in info["unexpected_keys"] if IN_BLOCK.search(name)), default=None)
    require(
        key, folder, unused is None, f"config.json describes fewer layers or biases than the weights have: {unused} ..."
    )
    name_body(model)
    return model.to(device).eval().requires_grad_(False)


def name_body(model: PreTrainedModel) -> None:
    """Make `base_model` of a causal LM the part without its LM head: some classes give it a name that no part has."""
    if model.get_output_embeddings() is not None and model.base_model is model:
        parts = (name for name, part in model.named_children() if isinstance(part, PreTrainedModel))
        model.base_model_prefix = next(parts, model.base_model_prefix)
