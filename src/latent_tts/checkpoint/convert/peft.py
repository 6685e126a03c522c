"""Merges LoRA adapters of PEFT into their base models; PCCoT publishes its models as such adapters.

A folder of PCCoT's training code contains `adapter_config.json` and `adapter_model.safetensors` (or whole weights), the
config with its number of sweeps, the tokenizer, and `pccot_args.json` with the ids of its latent tokens and the number
of latents.

Source: whyNLP/PCCoT `example.py`, `test_ccot.py`, `models/pccot_arguments.py`.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from latent_tts.checkpoint import files
from latent_tts.errors import bad_value, is_whole, require

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)
WEIGHTS = "adapter_model.safetensors"
HUB_IDS = {"gpt2": "openai-community/gpt2"}  # names without an owner, which the hub still accepts
PCCOT_ARGUMENTS = "pccot_args.json"
TOKENS = {"bot_token_id": "<|start-latent|>", "eot_token_id": "<|end-latent|>", "latent_token_id": "<|latent|>"}


def merge(folder: Path, base: str | None, tokens: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and config of a causal LM with the adapter merged into its weights, in float32 (imports torch and peft).

    Args:
        folder: folder of the adapter.
        base: folder or hub id of the base model; None for the one that the adapter names.
        tokens: size of the tokenizer; a smaller embedding is extended to as many rows, as in training.

    Raises:
        UsageError: peft is not installed, the base model cannot be read, or the adapter does not fit it.
    """
    from latent_tts.checkpoint import loading

    require(
        "src",
        folder,
        find_spec("peft") is not None,
        "a LoRA adapter needs PEFT, which is not installed: pip install peft",
    )
    settings = read_settings(folder)
    own = settings.get("base_model_name_or_path")
    named = base or HUB_IDS.get(str(own), own) or ""
    require(
        "base", None, bool(named), f"{files.ADAPTER} does not name the base model; give it as base=FOLDER_OR_HUB_ID"
    )
    lm: Any = loading.load_causal_lm(files.resolve(named, key="base"), device="cpu", dtype="float32", key="base")
    if tokens > lm.get_input_embeddings().weight.shape[0]:
        lm.resize_token_embeddings(tokens, mean_resizing=False)
    if "prj" in (settings.get("modules_to_save") or ()):
        from latent_tts.checkpoint.modules import pccot_projection

        lm.prj = pccot_projection(lm.config.hidden_size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT uses deprecated names of transformers
        merged: Any = attach(lm, folder, named).merge_and_unload()
    return dict(merged.state_dict()), merged.config.to_dict()


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of an adapter whose weights can be read.

    Raises:
        UsageError: they cannot be read, or name code that would be imported.
    """
    settings = files.read_json(folder, files.ADAPTER, key="src")
    for name in ("megatron_config", "megatron_core"):  # PEFT imports the module that they name
        plain = settings.get(name) in (None, "megatron.core")
        require("src", folder, plain, f"{files.ADAPTER} has {name}, which is not supported")
    require("src", folder, (folder / WEIGHTS).is_file(), f"lacks {WEIGHTS}")
    files.tensor_shapes(folder / WEIGHTS, key="src")
    return settings


def attach(lm: PreTrainedModel, folder: Path, named: str) -> Any:
    """Attach an adapter to its base model, by PEFT.

    Raises:
        UsageError: it does not fit, or has tensors that belong nowhere.
    """
    from peft import PeftConfig, get_peft_model, set_peft_model_state_dict
    from safetensors.torch import load_file

    try:
        adapter = PeftConfig.from_pretrained(str(folder))
        adapter.base_model_name_or_path = None  # otherwise PEFT warns that the base model was moved
        model: Any = get_peft_model(lm, adapter)
        weights = load_file(folder / WEIGHTS)
        loaded = set_peft_model_state_dict(model, weights)
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise bad_value(
            "src", folder, f"the adapter does not fit base={named}: {' '.join(str(error).split())[:200]}"
        ) from error
    # a tied head shares rows with the embedding: PEFT keeps them once, but its files may contain them twice
    state, used = model.state_dict(), [weights[name] for name in weights.keys() - loaded.unexpected_keys]
    read = {value.data_ptr() for name, value in state.items() if name not in loaded.missing_keys}
    wanted = [name for name in loaded.missing_keys if "lora_" in name or "trainable_tokens" in name]
    unmatched = [name for name in wanted if state[name].data_ptr() not in read]
    unmatched += [name for name in loaded.unexpected_keys if not any(map(weights[name].equal, used))]
    require(
        "src",
        folder,
        not unmatched,
        f"the adapter does not fit base={named}: tensor {min(unmatched, default='')} exists only in one of them",
    )
    return model


def read_pccot(folder: Path, tokenizer: Tokenizer) -> tuple[dict[str, Any], Tokenizer, Mapping[str, str]]:
    """What the files of PCCoT's training code say, and the command to run the model.

    Args:
        folder: of the training code.
        tokenizer: that of the folder.

    Returns:
        What to record in `config.json`, the tokenizer whose latent tokens have the names of the other families, and
        the renamed tokens (old to new names).

    Raises:
        UsageError: a number is missing, or the tokenizer does not have the tokens.
    """
    arguments = files.read_json(folder, PCCOT_ARGUMENTS, key="src")
    sweeps = files.read_json(folder, "config.json", key="src").get("num_iterations")
    recorded = {"latents": arguments.get("num_latent_tokens"), "sweeps": sweeps}
    for name, value in recorded.items():
        require(
            "src", folder, is_whole(value), f"{PCCOT_ARGUMENTS} and config.json do not contain the number of {name}"
        )
    content = json.loads(tokenizer.to_str())
    added = {token["id"]: token for token in content["added_tokens"]}
    renamed = {}
    for key, name in TOKENS.items():
        place = arguments.get(key)
        require(
            "src",
            folder,
            place in added,
            f"{PCCOT_ARGUMENTS} has {key}={place}, which is not an added token in tokenizer.json",
        )
        renamed[added[place]["content"]] = name
        added[place]["content"] = name
    log.info(
        "a checkpoint of PCCoT: run the new folder with model=pccot model.latents=%d model.sweeps=%d "
        "\"model.answer_prompt='%s'\"", *recorded.values(), arguments.get("answer_prompt", ""),
    )  # fmt: skip
    return {"latent_tts": recorded}, Tokenizer.from_str(json.dumps(content)), renamed
