"""Convert a checkpoint into a folder that `ltts run` reads."""

from __future__ import annotations

import json
import logging
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latent_tts.checkpoint import files, joining, reward_adapter
from latent_tts.checkpoint.convert import layouts, peft
from latent_tts.checkpoint.model_cache import SOURCE
from latent_tts.errors import bad_value, require

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor

log = logging.getLogger(__name__)
COPIED = ("generation_config.json", "special_tokens_map.json", *files.BESIDE_TOKENIZER)


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
    scores = reward_adapter.is_reward_adapter(src)
    if scores or joining.is_own_adapter(src):
        record = src / ("config.json" if scores else joining.RECORD)
        for key, value in {"tokenizer": tokenizer, "config": config, "base": base, "latents": latents}.items():
            require(key, value, value is None, f"must be null: {record} gives it")
        if scores:
            reward_adapter.join(src, dst, "src")
        else:
            ignored = shutil.ignore_patterns(SOURCE)
            shutil.copytree(joining.join_once(src, "src"), dst, dirs_exist_ok=True, ignore=ignored)
        return
    whole = src.is_dir() and any((src / name).is_file() for name in (files.ADAPTER, peft.PCCOT_ARGUMENTS))
    beside, pickles = (src, []) if whole else find_weights(src)
    folders = [tokenizer, beside] if tokenizer is not None else [beside]
    require(
        "tokenizer" if tokenizer else "src",
        folders[0],
        (folders[0] / "tokenizer.json").is_file(),
        "lacks tokenizer.json\ngive the folder of the base model's tokenizer as tokenizer=FOLDER",
    )
    words = files.load_tokenizer(folders[0])
    renamed: Mapping[str, str] = {}
    if whole:
        tensors, settings, words, renamed = convert_folder(src, base, words)
    else:
        from latent_tts.checkpoint import loading

        settings = find_config(config, folders)
        files.check_settings(settings, beside, key="src")
        state = loading.read_pickles(pickles) if pickles else loading.load_tensors(beside, "")
        state = {layouts.WRAPPERS.sub(r"\1", name): tensor for name, tensor in state.items()}
        family = files.training_layout(state)
        require("src", src, family is not None or bool(pickles), "is already in the layout that `ltts run` reads")
        tensors, settings = convert_state(state, settings, words, family, lora_alpha)
    if latents is not None:
        settings["latent_tts"] = {**settings.get("latent_tts", {}), "latents": latents}
    write_folder(dst, tensors, settings, words)
    for name in COPIED:
        found = next((folder / name for folder in folders if (folder / name).is_file()), None)
        if found is not None:
            text = found.read_text()
            for old, new in renamed.items():
                text = text.replace(old, new)
            (dst / name).write_text(text)


def find_weights(src: Path) -> tuple[Path, list[Path]]:
    """Find the folder of the weights, and its pickles; no pickles for safetensors.

    Raises:
        UsageError: there are no weights, several pickles, or only some shards.
    """
    if src.is_file():
        shard = files.PICKLE_SHARD.fullmatch(src.name)
        count = int(shard[2]) if shard else 1
        require("src", src, count == 1, f"is one of {count} shards; name their folder: src={src.parent}")
        require("src", src, src.suffix != ".safetensors", f"name the folder of safetensors: src={src.parent}")
        return src.parent, [src]
    require("src", src, src.is_dir(), "no such file or folder")
    if any((src / name).is_file() for name in (files.WEIGHTS, files.INDEX)):
        return src, []
    found = sorted({path for pattern in files.PICKLES for path in src.glob(pattern) if path.is_file()})
    usual = [path for path in found if path.name == files.PICKLES[0]]
    shards = {path: int(shard[2]) for path in found if (shard := files.PICKLE_SHARD.fullmatch(path.name))}
    if shards and not usual:
        names, count = ", ".join(path.name for path in shards), max(shards.values())
        require("src", src, len(shards) == count, f"has {len(shards)} of {count} shards ({names})")
        return src, list(shards)
    names = f" ({', '.join(path.name for path in found[:4])})" if found else ""
    chosen = usual or found
    require("src", src, len(chosen) == 1, f"contains no safetensors and {len(found)} pickles{names}; name one file")
    return src, chosen


def find_config(given: str | None, folders: list[Path]) -> dict[str, Any]:
    """Find the backbone's config: the given file, or the first that is not empty in the folders; else an empty one.

    Raises:
        UsageError: the given file does not exist.
    """
    if given is not None:
        path = Path(given).expanduser()
        require("config", given, path.is_file(), "no such file; it must be a config.json")
        return files.read_config(path.parent, path.name)
    paths = (folder / "config.json" for folder in folders)
    found = next((path for path in paths if path.is_file() and not files.is_empty_json(path)), None)
    return {} if found is None else files.read_config(found.parent)


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
    layouts.check_config(settings, backbone, exact=family is not None)
    if family is None:
        return state, settings
    from transformers import AutoConfig

    try:
        tied = AutoConfig.for_model(**settings).tie_word_embeddings
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise bad_value(
            "config",
            settings.get("model_type"),
            f"transformers has no such model: {' '.join(str(error).split())[:160]}",
        ) from error
    tensors = layouts.deduplicate_embeddings(backbone, tied=tied)
    rows = next(tensors[name].shape[0] for name in layouts.EMBEDDINGS if name in tensors)
    layouts.name_latent_tokens(tokenizer, family, rows=rows, vocabulary=settings.get("vocab_size"))
    left_out = Counter(name.partition(".")[0] for name in rest)
    if left_out:
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

    recorded, renamed = {}, {}
    is_pccot = (src / peft.PCCOT_ARGUMENTS).is_file()
    if is_pccot:  # check what is cheap before reading weights
        recorded, tokenizer, renamed = peft.read_pccot(src, tokenizer)
    if (src / files.ADAPTER).is_file():
        tensors, settings = peft.merge(src, base, tokenizer.get_vocab_size(with_added_tokens=True))
        tensors = layouts.deduplicate_embeddings(tensors, tied=settings["tie_word_embeddings"])
        log.info("merged a LoRA adapter of PEFT into its base model")
    else:
        tensors, settings = loading.load_tensors(src, ""), files.read_config(src)
        settings["model_type"] = str(settings.get("model_type")).removeprefix("pccot-")
    wanted = is_pccot and files.read_json(src, "config.json", key="src").get("use_projection")
    require(
        "src",
        src,
        not wanted or any(name.startswith("prj.") for name in tensors),
        "config.json has use_projection=true, but there are no weights prj.*",
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
    save_file(tensors, dst / files.WEIGHTS, metadata={"format": "pt"})
    (dst / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    tokenizer.save(str(dst / "tokenizer.json"))
