"""Weights of checkpoint folders, loaded: tensors, causal LMs, backbones (imports torch and transformers)."""

from __future__ import annotations

import pickle as pickles
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from latent_tts.checkpoint import files
from latent_tts.errors import bad_value

IN_BLOCK = re.compile(r"(^|\.)(h|layers)\.\d+\..*weight$")  # matrices, not the buffers of old checkpoints


def load_tensors(folder: Path, prefix: str) -> dict[str, Tensor]:
    """The tensors under a prefix, which is dropped from their names."""
    tensors = {}
    for path in files.weight_files(folder):
        wanted = [name for name in files.tensor_shapes(path) if name.startswith(prefix)]
        with safe_open(path, "pt") as file:
            tensors |= {name.removeprefix(prefix): file.get_tensor(name) for name in wanted}
    return tensors


def read_pickle(pickle: Path) -> dict[str, Tensor]:
    """A state dict from a pickle (nothing but tensors is unpickled).

    Raises:
        UsageError: the file is no pickle of tensors.
    """
    try:
        state = torch.load(pickle, map_location="cpu", weights_only=True)
    except (pickles.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise bad_value("src", pickle, f"no pickle of tensors alone ({str(error).splitlines()[0][:120]})") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    if not tensors or len(tensors) != len(state):
        raise bad_value("src", pickle, "does not hold a dict of tensors")
    return tensors


def load_causal_lm(folder: Path, *, device: str, dtype: str, key: str = files.MODEL_KEY) -> PreTrainedModel:
    """The causal LM of a checkpoint in evaluation mode, its weights cast to `dtype` (`float32`, `bfloat16`, ...).

    Raises:
        UsageError: a weight is missing or has another shape than the config says.
    """
    return _load("AutoModelForCausalLM", folder, device, dtype, key)


def load_backbone(folder: Path, *, device: str, dtype: str, key: str) -> PreTrainedModel:
    """The same without a language-model head, for checkpoints that have another head.

    Raises:
        UsageError: a weight is missing or has another shape than the config says.
    """
    return _load("AutoModel", folder, device, dtype, key)


def compute_exactly() -> None:
    """Set torch so that a dtype means the same on every GPU, whatever an environment asked for.

    Products of float32 without TensorFloat-32, sums within products of half precision in float32. Attention without
    cuDNN, which makes a plan for every new shape, as nearly every batch of prompts has one.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.enable_cudnn_sdp(False)


def _load(auto_class: str, folder: Path, device: str, dtype: str, key: str) -> PreTrainedModel:
    compute_exactly()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        loaded: Any = getattr(transformers, auto_class).from_pretrained(
            folder, dtype=getattr(torch, dtype), output_loading_info=True, local_files_only=True
        )
        model, info = loaded
    except (RuntimeError, ValueError, OSError, KeyError, TypeError, StrictDataclassError) as error:
        raise bad_value(key, folder, f"transformers cannot load it: {' '.join(str(error).split())[:200]}") from error
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise bad_value(key, folder, f"weights are missing: {missing} ...")
    unused = sorted(name for name in info["unexpected_keys"] if IN_BLOCK.search(name))
    if unused:
        raise bad_value(key, folder, f"config.json describes fewer layers than the weights have: {unused[0]} ...")
    return model.to(device).eval().requires_grad_(False)
