"""Convert a checkpoint into a folder that `ltts run` reads."""

from __future__ import annotations

import json
import logging
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latent_tts.checkpoint import files as checkpoint
from latent_tts.checkpoint import gguf, joining, reward_adapter
from latent_tts.checkpoint.convert import layouts, peft
from latent_tts.errors import UsageError, bad_value, require

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor

log = logging.getLogger(__name__)
COPIED = ("generation_config.json", "special_tokens_map.json", *checkpoint.BESIDE_TOKENIZER)


def convert_checkpoint(
    src: Path,
    dst: Path,
    *,
    tokenizer: Path | None = None,
    config: str | None = None,
    base: str | None = None,
    lora_alpha: float,
    latents: int | None = None,
) -> None:
    """Convert a checkpoint into a folder that `ltts run` reads.

    Args:
        src: a pickle, or a folder with a pickle, with safetensors of a training code, or with a LoRA adapter of PEFT,
            of `train-reasoner` or of `train-rm`, which is joined with its base.
        dst: the new folder.
        tokenizer: folder of the backbone's tokenizer; None: the folder of the weights.
        config: the backbone's `config.json`; None: look in the tokenizer's folder, then beside the weights.
        base: folder or hub id of the model that an adapter was trained on; None: the one that the adapter names.
        lora_alpha: scale of CODI's LoRA, above 0.
        latents: T of training, recorded in the new `config.json`; None: not recorded.

    Raises:
        UsageError: the weights, a config or the tokenizer is missing, or the new folder is in use.
    """
    require("dst", dst, not dst.exists() or (dst.is_dir() and not any(dst.iterdir())), "must be a new or empty folder")
    given = {"tokenizer": tokenizer, "config": config, "base": base, "latents": latents}
    if src.is_dir() and join_own_adapter(src, dst, given):
        return
    whole = src.is_dir() and (peft.is_adapter(src) or peft.is_pccot(src))
    beside, pickles = (src, {}) if whole else find_weights(src)
    folders = [tokenizer, beside] if tokenizer is not None else [beside]
    if not (folders[0] / "tokenizer.json").is_file():
        key, value = ("tokenizer", folders[0]) if tokenizer is not None else ("src", src)
        why = f"{folders[0]} lacks tokenizer.json\ngive the folder of the base model's tokenizer as tokenizer=FOLDER"
        raise bad_value(key, value, why)
    words = checkpoint.load_tokenizer(folders[0])
    renamed: Mapping[str, str] = {}
    if whole:
        tensors, settings, words, renamed = convert_folder(src, base, words)
    else:
        from latent_tts.checkpoint import loading

        settings = find_config(config, folders)
        checkpoint.check_settings(settings, beside, key="src")
        state = loading.read_pickles(pickles) if pickles else loading.load_tensors(beside, "")
        state = {layouts.WRAPPERS.sub(r"\1", name): tensor for name, tensor in state.items()}
        family = checkpoint.training_layout(state)
        require("src", src, family is not None or bool(pickles), "is already in the layout that `ltts run` reads")
        tensors, settings = convert_state(state, settings, words, family, lora_alpha)
    if latents is not None:
        settings["latent_tts"] = {**settings.get("latent_tts", {}), "latents": latents}
    write_folder(dst, tensors, settings, words)
    copy_texts(folders, dst, renamed)


def join_own_adapter(src: Path, dst: Path, given: Mapping[str, Any]) -> bool:
    """Join an adapter of `train-reasoner` or `train-rm` with its base; returns whether the folder holds one.

    Raises:
        UsageError: it does not fit its base, or a key says what its record says.
    """
    scores = reward_adapter.is_reward_adapter(src)
    if not scores and not joining.is_own_adapter(src):
        return False
    for key, value in given.items():
        record = src / ("config.json" if scores else joining.RECORD)
        require(key, value, value is None, f"must be null: {record} gives it")
    if scores:
        reward_adapter.join(src, dst, "src")
    else:
        ignored = shutil.ignore_patterns(gguf.SOURCE)
        shutil.copytree(joining.join_once(src, "src"), dst, dirs_exist_ok=True, ignore=ignored)
    return True


def copy_texts(folders: Sequence[Path], dst: Path, renamed: Mapping[str, str]) -> None:
    """Copy small files from the first folder that has them, with the new names of tokens."""
    for name in COPIED:
        found = [folder / name for folder in folders if (folder / name).is_file()]
        if found:
            text = found[0].read_text()
            for old, new in renamed.items():
                text = text.replace(old, new)
            (dst / name).write_text(text)


def find_weights(src: Path) -> tuple[Path, dict[Path, set[str]]]:
    """Find the folder of the weights, and its pickles with the tensors that each must have; no pickles for safetensors.

    Raises:
        UsageError: there are no weights, several pickles, or only some shards.
    """
    if src.is_file():
        shard = checkpoint.PICKLE_SHARD.fullmatch(src.name)
        if shard and int(shard[2]) > 1:
            raise bad_value("src", src, f"is one of {int(shard[2])} shards; name their folder: src={src.parent}")
        require("src", src, src.suffix != ".safetensors", f"name the folder of safetensors: src={src.parent}")
        return src.parent, {src: set()}
    require("src", src, src.is_dir(), "no such file or folder")
    if any((src / name).is_file() for name in (checkpoint.WEIGHTS, checkpoint.INDEX)):
        return src, {}
    if not (src / checkpoint.PICKLES[0]).is_file() and (shards := checkpoint.pickle_shards(src)):
        return src, shards
    found = sorted({path for pattern in checkpoint.PICKLES for path in src.glob(pattern) if path.is_file()})
    usual = [path for path in found if path.name == checkpoint.PICKLES[0]] or found
    if len(usual) != 1:
        names = f" ({', '.join(path.name for path in found[:4])})" if found else ""
        raise UsageError(f"src={src}: contains no safetensors and {len(found)} pickles{names}; name one file")
    return src, {usual[0]: set()}


def find_config(given: str | None, folders: list[Path]) -> dict[str, Any]:
    """Find the backbone's config: the given file, or the first that is not empty in the folders; else an empty one.

    Raises:
        UsageError: the given file does not exist.
    """
    if given is not None:
        path = Path(given).expanduser()
        require("config", given, path.is_file(), "no such file; it must be a config.json")
        return checkpoint.read_config(path.parent, path.name)
    for folder in folders:
        path = folder / "config.json"
        if path.is_file() and not checkpoint.is_empty_json(path):
            return checkpoint.read_config(folder)
    return {}


def convert_state(
    state: dict[str, Tensor], settings: dict[str, Any], tokenizer: Tokenizer, family: str | None, lora_alpha: float
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Convert tensors and config, and add missing latent tokens to the tokenizer.

    Args:
        state: tensors by the names of the training code or of transformers.
        settings: the backbone's config; empty if there is none.
        tokenizer: the backbone's, changed in place.
        family: the training layout; None for that of transformers.
        lora_alpha: LoRA's scale.

    Raises:
        UsageError: the tensors, the config and the tokenizer do not fit together.
    """
    backbone, rest = state, {}
    if family == "CODI":
        kind = settings.get("model_type", joining.TRANSPOSED)  # without settings the error below says what is missing
        backbone, rest = layouts.codi_backbone(state, lora_alpha, kind)
    elif family == "COCONUT":
        backbone, rest = layouts.coconut_backbone(state)
    if not settings:
        raise UsageError(
            f"config.json is missing or empty; it must be that of {layouts.describe(backbone)}\n"
            "give it as config=FOLDER/config.json"
        )
    if family is None:
        return state, settings
    from transformers import AutoConfig

    try:
        tied = AutoConfig.for_model(**settings).tie_word_embeddings
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise bad_value("config", settings.get("model_type"), f"transformers has no such model: {reason}") from error
    tensors = layouts.deduplicate_embeddings(backbone, tied=tied)
    layouts.check_config(settings, tensors)
    rows = next(tensors[name].shape[0] for name in layouts.EMBEDDINGS if name in tensors)
    layouts.name_latent_tokens(tokenizer, family, rows=rows, vocabulary=settings.get("vocab_size"))
    if rest:
        left_out = Counter(name.partition(".")[0] for name in rest)
        parts = ", ".join(f"{name}.* ({count})" for name, count in sorted(left_out.items()))
        log.info("left out, because inference does not use them: %s", parts)
    log.info("converted a %s checkpoint with %d tensors: run it with model=%s", family, len(tensors), family.lower())
    return tensors, settings | {"vocab_size": rows}


def convert_folder(
    src: Path, base: str | None, tokenizer: Tokenizer
) -> tuple[dict[str, Tensor], dict[str, Any], Tokenizer, Mapping[str, str]]:
    """Convert a folder of PEFT (a LoRA adapter is merged into its base model) or of PCCoT's training code.

    Args:
        src: the folder, with its own tokenizer and config.
        base: folder or hub id of the model that was adapted; None for the one that the adapter names.
        tokenizer: that of the folder.

    Returns:
        Tensors, config, tokenizer, and the renamed tokens (old to new names).

    Raises:
        UsageError: the adapter cannot be merged, or PCCoT's files lack a setting.
    """
    from latent_tts.checkpoint import loading

    renamed: Mapping[str, str] = {}
    recorded, arguments = {}, None
    if peft.is_pccot(src):  # check what is cheap before reading weights
        arguments = checkpoint.read_json(src, peft.PCCOT_ARGUMENTS, key="src")
        recorded = {"latent_tts": peft.pccot_settings(src, arguments)}
        tokenizer, renamed = peft.rename_latent_tokens(src, arguments, tokenizer)
    if peft.is_adapter(src):
        tensors, settings = peft.merge(src, base, tokenizer.get_vocab_size(with_added_tokens=True))
        tensors = layouts.deduplicate_embeddings(tensors, tied=settings["tie_word_embeddings"])
    else:
        tensors, settings = loading.load_tensors(src, ""), checkpoint.read_config(src)
        settings["model_type"] = str(settings.get("model_type")).removeprefix("pccot-")
    if arguments is None:
        log.info("merged a LoRA adapter of PEFT into its base model")
    else:
        peft.check_projection(src, tensors)
        log.info(
            "converted a PCCoT checkpoint: run it with "
            "model=pccot model.latents=%d model.sweeps=%d \"model.answer_prompt='%s'\"",
            *recorded["latent_tts"].values(),
            arguments.get("answer_prompt", ""),
        )
    return tensors, settings | recorded, tokenizer, renamed


def write_folder(dst: Path, tensors: dict[str, Tensor], settings: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Write weights, config and tokenizer into a new folder."""
    from safetensors.torch import save_file

    dst.mkdir(parents=True, exist_ok=True)
    written: set[int] = set()
    for name, tensor in tensors.items():  # tied weights share memory, which safetensors refuses
        storage = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if storage in written else tensor.contiguous()
        written.add(storage)
    save_file(tensors, dst / checkpoint.WEIGHTS, metadata={"format": "pt"})
    (dst / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    tokenizer.save(str(dst / "tokenizer.json"))
