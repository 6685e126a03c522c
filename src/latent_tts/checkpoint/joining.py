"""Adapters as checkpoints: a folder with small matrices and a few rows, which is joined with its base once.

Such a folder holds `adapter_config.json` and `adapter_model.safetensors` of PEFT, the tokenizer, the family's own
tensors (`own.safetensors`), the record `latent_tts.json` that names the base, and a probe: what the trained model
computed from a few prompts in float32. The join of adapter and base is a checkpoint folder like any other, in float32,
kept beside converted models under a digest of both; loading casts it once, to the dtype of the run. A join that does
not compute what the probe says is not kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latent_tts.checkpoint import files, gguf
from latent_tts.checkpoint.model_cache import make_once
from latent_tts.errors import RunError, UsageError, bad_value, is_number, is_whole, require
from latent_tts.types import file_digest, file_sha256

if TYPE_CHECKING:
    from torch import Tensor

RECORD, WEIGHTS, OWN, PROBE = "latent_tts.json", "adapter_model.safetensors", "own.safetensors", "probe.safetensors"
PREFIX = "base_model.model."  # of PEFT's names
ROWS, FACTORS = ".token_adapter.trainable_tokens_delta", (".lora_A.weight", ".lora_B.weight")
# options of PEFT that a product alpha / rank * B A does not cover
PLAIN: dict[str, Any] = {
    **{"peft_type": "LORA", "bias": "none", "use_rslora": False, "use_dora": False},
    **{"alpha_pattern": {}, "rank_pattern": {}, "target_parameters": None},
}
TRANSPOSED = "gpt2"  # the kind of model with layers that keep their weights transposed (Conv1D): these
TRANSPOSED_LAYERS = ("c_attn", "c_proj", "c_fc")
TOLERANCE = 1e-3


def is_own_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter that names its base, as `train-reasoner` writes it."""
    return (folder / files.ADAPTER).is_file() and (folder / RECORD).is_file()


def base_digest(base: str, key: str) -> str:
    """The digest of a base: of its file if it is GGUF, else of weights, shape and tokenizer.

    Raises:
        UsageError: there is no such base.
    """
    if base.startswith(gguf.PREFIX):
        return file_digest(gguf.find_file(base, key))
    return files.digest(base_folder(base, key))


def base_folder(base: str, key: str) -> Path:
    """The checkpoint folder of a base, which may be an adapter itself; raises as `join_once` does."""
    return join_once(files.resolve(base, key=key), key)


def join_once(folder: Path, key: str) -> Path:
    """The folder itself, or the join of the adapter in it (imports torch and transformers when it is made).

    Raises:
        UsageError: the adapter is damaged, its base is missing or has changed, or the probe differs.
    """
    if not is_own_adapter(folder):
        return folder
    record = files.read_json(folder, RECORD, key=key)
    base = find_base(folder, record, record.get("base_digest"), "base", key)
    sha = hashlib.sha256(str(record["base_digest"]).encode())
    for name in (files.ADAPTER, RECORD, WEIGHTS, OWN, PROBE, "tokenizer.json"):
        path = folder / name
        require(key, folder, path.is_file() or name == OWN, f"the folder lacks {name}")
        if path.is_file():
            sha.update(name.encode() + file_sha256(path))
    digest = sha.hexdigest()[:16]
    return make_once("joined", digest, str(folder), lambda new: join(folder, base_folder(base, key), new, record, key))


def join(folder: Path, base: Path, target: Path, record: Mapping[str, Any], key: str) -> None:
    """Write the join of an adapter and its base, in float32, and compare it with the adapter's probe.

    Raises:
        UsageError: the adapter does not fit the base, or the probe differs.
    """
    from safetensors.torch import load_file, save_file

    from latent_tts.checkpoint import loading
    from latent_tts.checkpoint.vocabulary import MEAN, fit_rows

    settings = read_settings(folder, key)
    old, new = files.load_tokenizer(base, key=key), files.load_tokenizer(folder, key=key)
    tensors = fit_rows(loading.load_tensors(base, ""), old, new, MEAN, base, key)
    config = files.read_config(base)
    tensors = add_adapter({name: value.float() for name, value in tensors.items()}, load_file(folder / WEIGHTS),
                          settings | {"transposed": config.get("model_type") == TRANSPOSED}, folder, key)  # fmt: skip
    if (folder / OWN).is_file():
        tensors |= {name: value.float() for name, value in load_file(folder / OWN).items()}
    rows = next(value.shape[0] for name, value in tensors.items() if name.endswith(files.EMBEDDINGS))
    config |= {**(record.get("config") or {}), "vocab_size": int(rows), "dtype": "float32"}
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shutil.copyfile(folder / "tokenizer.json", target / "tokenizer.json")
    files.copy_beside_tokenizer(base, target)
    save_file({name: value.contiguous() for name, value in tensors.items()}, target / files.WEIGHTS,
              metadata={"format": "pt"})  # fmt: skip
    lm = loading.load_causal_lm(target, device="cpu", dtype="float32", key=key)
    wanted = load_file(folder / PROBE)
    require(
        key,
        folder,
        wanted.keys() == {"prompts_PL", "tokens_A", "latents_PTD", "logprobs_PA"},
        f"{PROBE} is none that this version writes: train the adapter again",
    )
    found = probe(lm, wanted["prompts_PL"], int(wanted["latents_PTD"].shape[1]), wanted["tokens_A"])
    for name in ("latents_PTD", "logprobs_PA"):
        require(
            key, folder, wanted[name].shape == found[name].shape, f"its probe has {name} of {list(wanted[name].shape)}"
        )
        distance = float((wanted[name] - found[name]).abs().max() / wanted[name].abs().max().clamp(min=1))
        require(
            key,
            folder,
            distance <= TOLERANCE,
            "joined with its base it computes something else than the trained model did: "
            f"{name} of its probe differ by {distance:.2g} of their largest value, more than {TOLERANCE:g}",
        )


def find_unsupported(settings: Mapping[str, Any]) -> str | None:
    """The first of PEFT's settings that a product does not cover, as `NAME=VALUE`; None if there is none."""
    differing = (name for name, value in PLAIN.items() if (settings.get(name, value) or None) != (value or None))
    name = next(differing, None)
    return None if name is None else f"{name}={settings[name]}"


def read_settings(folder: Path, key: str) -> dict[str, Any]:
    """The settings of an adapter that is nothing but a product that is added to weights.

    Raises:
        UsageError: PEFT's settings say more.
    """
    settings = files.read_json(folder, files.ADAPTER, key=key)
    unsupported = find_unsupported(settings)
    require(key, folder, unsupported is None, f"{files.ADAPTER} has {unsupported}, which is not supported")
    rank, scale = settings.get("r"), settings.get("lora_alpha")
    require(
        key,
        folder,
        is_whole(rank) and rank > 0 and is_number(scale),
        f"{files.ADAPTER} has r={rank} and lora_alpha={scale}, must be a positive integer and a finite number",
    )
    return settings


def lasting_name(checkpoint: str) -> str:
    """The name of a checkpoint that an adapter's record keeps: paths of this machine in full."""
    kind = gguf.PREFIX if checkpoint.startswith(gguf.PREFIX) else ""
    local = Path(checkpoint.removeprefix(kind)).expanduser()
    return f"{kind}{local.resolve()}" if local.exists() else checkpoint


def record_of_base(base: str, folder: Path) -> dict[str, str]:
    """What the record of an adapter in a folder says of where its base is: its name, and its path from the folder."""
    local = Path(base.removeprefix(gguf.PREFIX))
    return {"base": base} | ({"base_path": os.path.relpath(local, folder.resolve())} if local.exists() else {})


def find_base(folder: Path, record: Mapping[str, Any], wanted: object, kind: str, key: str) -> str:
    """The base of an adapter, where it was or where it is now: both may have been moved.

    It may be at the recorded path from the adapter, beside the adapter under its old name, or the model of the run.

    Args:
        folder: the adapter's.
        record: see `record_of_base`.
        wanted: the base's digest.
        kind: what errors call the base.
        key: the config key that errors name.

    Raises:
        UsageError: it is in none of these places, or another one is there.
    """
    base = record.get("base")
    if not isinstance(base, str):
        raise bad_value(key, folder, f"its record names no {kind}")
    prefix = gguf.PREFIX if base.startswith(gguf.PREFIX) else ""
    beside = os.path.join("..", os.path.basename(base.removeprefix(prefix)))
    moved = [os.path.normpath(folder.resolve() / str(path)) for path in (record.get("base_path") or beside, beside)]
    why = ""
    for name in (base, str(files.digested.get(str(wanted), base)), *(f"{prefix}{path}" for path in moved)):
        try:
            found = base_digest(name, key)
            problem = f"but that has the digest {found}, not {wanted}"
        except UsageError as error:
            found, problem = "", f"which cannot be read: {str(error).splitlines()[0].partition(': ')[2]}"
        if found == wanted:
            return name
        why = why or problem
    places = " or ".join(dict.fromkeys(moved))
    allowed = f"an adapter of the {kind} {base}, {why}; put the one with the digest {wanted} at {places}"
    raise bad_value(key, folder, allowed + (", or pass it as model.checkpoint" if kind == "reasoner" else ""))


def add_adapter(
    tensors: dict[str, Tensor], adapter: Mapping[str, Tensor], settings: Mapping[str, Any], source: object, key: str
) -> dict[str, Tensor]:
    """The tensors of a base with alpha / rank times B A added to its weights, and the rows of the adapter in place.

    Args:
        tensors: of the base; a weight that something is added to becomes float32.
        adapter: the factors and rows, by PEFT's names.
        settings: PEFT's config; `transposed` says whether `TRANSPOSED_LAYERS` keep their weights transposed.
        source: where the adapter is, for errors.
        key: the config key that errors name.

    Raises:
        UsageError: a tensor of the adapter fits no weight.
    """
    tied, left = "lm_head.weight" not in tensors, set(adapter)
    rows = settings.get("trainable_token_indices") or {}
    for name, value in adapter.items():
        module = name.removeprefix(PREFIX)
        if module.endswith(ROWS):
            module = module.removesuffix(ROWS)
            weight, places = tensors.get(f"{module}.weight"), rows.get(module.rpartition(".")[2]) or []
            if (
                weight is not None
                and value.shape == (len(places), weight.shape[1])
                and all(0 <= place < len(weight) for place in places)
            ):
                weight[places] = value.float()
                left.discard(name)
            elif module == "lm_head" and tied:  # the embedding has them
                left.discard(name)
        elif module.endswith(FACTORS[0]):
            module, other = module.removesuffix(FACTORS[0]), name.replace(*FACTORS)
            weight_name = f"{module}.weight"
            if weight_name in tensors and other in adapter:
                delta = float(settings["lora_alpha"]) / len(value) * (adapter[other].float() @ value.float())
                delta = delta.T if settings.get("transposed") and module.endswith(TRANSPOSED_LAYERS) else delta
                if delta.shape == tensors[weight_name].shape:
                    tensors[weight_name] = tensors[weight_name] + delta
                    left -= {name, other}
    if left:
        shape = list(adapter[min(left)].shape)
        raise bad_value(key, source, f"its tensor {min(left)} fits no weight of the base; its shape is {shape}")
    return tensors


def probe(lm: Any, prompts_PL: Tensor, latents: int, tokens_A: Tensor) -> dict[str, Tensor]:
    """What a causal LM computes from prompts by its own forward pass in float32, with latents fed back unchanged.

    Args:
        lm: the model, in evaluation mode.
        prompts_PL: token ids of P prompts of the same length.
        latents: T; 1 or more.
        tokens_A: ids whose log-probabilities are compared.

    Returns:
        The prompts, the ids, the latents (P, T, D), and the log-probabilities (P, A) of the ids after the last one.
    """
    import torch

    embed = lm.get_input_embeddings()
    with torch.inference_mode():
        inputs_PLD, latents_PTD = embed(prompts_PL), []
        for _ in range(latents):
            hidden_PLD = lm.base_model(inputs_embeds=inputs_PLD, use_cache=False).last_hidden_state
            latents_PTD.append(hidden_PLD[:, -1])
            inputs_PLD = torch.cat([inputs_PLD, hidden_PLD[:, -1:]], dim=1)
        logits_PV = lm(inputs_embeds=inputs_PLD, use_cache=False).logits[:, -1].float()
        logprobs_PA = logits_PV.log_softmax(-1)[:, tokens_A]
    found = {"latents_PTD": torch.stack(latents_PTD, 1).float(), "logprobs_PA": logprobs_PA}
    asked = {"prompts_PL": prompts_PL, "tokens_A": tokens_A}
    return asked | {name: value.clone().contiguous() for name, value in found.items()}


def write_adapter(
    folder: Path, base: str, tokenizer: Path, weights: Mapping[str, Tensor], settings: Mapping[str, Any],
    own: Mapping[str, Tensor], found: Mapping[str, Tensor], config: Mapping[str, Any], key: str,
) -> None:  # fmt: skip
    """Write an adapter as a checkpoint folder, whole or not at all.

    Args:
        folder: to write.
        base: checkpoint that it belongs to.
        tokenizer: the `tokenizer.json`.
        weights: of PEFT, in bfloat16.
        settings: PEFT's config.
        own: tensors that the family adds.
        found: the probe.
        config: entries of the join's `config.json` that the base's lacks.
        key: the config key that errors name.

    Raises:
        RunError: the folder cannot be written.
    """
    from safetensors.torch import save_file

    settings = {**settings, "base_model_name_or_path": base}
    record = record_of_base(base, folder) | {"base_digest": base_digest(base, key), "config": dict(config)}
    try:
        with files.whole_folder(folder) as partial:
            (partial / files.ADAPTER).write_text(json.dumps(settings, indent=2) + "\n")
            save_file(dict(weights), partial / WEIGHTS, metadata={"format": "pt"})
            if own:
                save_file(dict(own), partial / OWN, metadata={"format": "pt"})
            save_file(dict(found), partial / PROBE)
            shutil.copyfile(tokenizer, partial / "tokenizer.json")
            (partial / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    except OSError as error:
        raise RunError(f"{folder} cannot be written: {error}") from error
