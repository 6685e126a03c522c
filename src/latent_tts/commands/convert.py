"""`ltts convert SRC DST`: rewrite a checkpoint of a training code, or a pickle, as a folder that `ltts run` reads."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from latent_tts.checkpoint import files as checkpoint
from latent_tts.checkpoint.convert import layouts, peft_adapter
from latent_tts.config import build as config
from latent_tts.errors import UsageError, bad_value

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor

log = logging.getLogger(__name__)
COPIED = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json")


def main(cfg: DictConfig) -> None:
    """Convert and print the new folder.

    Raises:
        UsageError: there are no weights, a config or tokenizer is wanting, or the new folder is in use.
    """
    src, dst = Path(cfg.src).expanduser(), Path(cfg.dst).expanduser()
    config.require("lora_alpha", cfg.lora_alpha, cfg.lora_alpha > 0, "a positive number")
    config.require("latents", cfg.latents, cfg.latents is None or cfg.latents >= 0, "0 or more, or null")
    whole = src.is_dir() and (peft_adapter.is_adapter(src) or peft_adapter.is_pccot(src))
    source = src if whole else find_weights(src)
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise bad_value("dst", dst, "a new or empty folder")
    beside = source if source.is_dir() else source.parent
    folders = [Path(cfg.tokenizer).expanduser(), beside] if cfg.tokenizer else [beside]
    if not (folders[0] / "tokenizer.json").is_file():
        key, value = ("tokenizer", folders[0]) if cfg.tokenizer else ("src", src)
        raise bad_value(
            key,
            value,
            f"{folders[0]} lacks tokenizer.json\nname the folder of the tokenizer of the model that was fine-tuned, "
            "as in tokenizer=FOLDER",
        )
    tokenizer = checkpoint.load_tokenizer(folders[0])
    renamed: Mapping[str, str] = {}
    if whole:
        tensors, settings, tokenizer, renamed = convert_folder(src, cfg.base, tokenizer)
    else:
        from latent_tts.checkpoint import loading  # with torch: only for what has passed the checks above

        settings = find_config(cfg.config, folders)
        state = loading.load_tensors(source, "") if source.is_dir() else loading.read_pickle(source)
        state = layouts.unwrap(state)
        family = checkpoint.training_layout(state)
        if family is None and source.is_dir():
            raise bad_value("src", src, "has the tensors that `ltts run` reads already")
        tensors, settings = convert(state, settings, tokenizer, family, cfg.lora_alpha)
    if cfg.latents is not None:
        settings["latent_tts"] = {**settings.get("latent_tts", {}), "latents": cfg.latents}
    write(dst, tensors, settings, tokenizer)
    for name in COPIED:
        found = [folder / name for folder in folders if (folder / name).is_file()]
        if found:
            text = found[0].read_text()
            for old, new in renamed.items():
                text = text.replace(old, new)
            (dst / name).write_text(text)
    print(dst)


def find_weights(src: Path) -> Path:
    """A pickle, or the folder of safetensors."""
    if src.is_file():
        return src
    if not src.is_dir():
        raise bad_value("src", src, "no such file or folder")
    if any((src / name).is_file() for name in (checkpoint.WEIGHTS, checkpoint.INDEX)):
        return src
    found = sorted({path for pattern in checkpoint.PICKLES for path in src.glob(pattern) if path.is_file()})
    usual = [path for path in found if path.name == checkpoint.PICKLES[0]] or found
    if len(usual) != 1:
        names = f" ({', '.join(path.name for path in found[:4])})" if found else ""
        raise UsageError(f"src={src}: neither safetensors nor one pickle but {len(found)}{names}; name one file")
    return usual[0]


def find_config(given: str | None, folders: list[Path]) -> dict[str, Any]:
    """The backbone's config: the given file's, or the first one in the folders that is not empty; else empty."""
    if given is not None:
        path = Path(given).expanduser()
        if not path.is_file():
            raise bad_value("config", given, "no such file; wanted is a config.json")
        return checkpoint.read_config(path.parent, path.name)
    for folder in folders:
        path = folder / "config.json"
        if path.is_file() and not checkpoint.is_empty_json(path):
            return checkpoint.read_config(folder)
    return {}


def convert(
    state: dict[str, Tensor], settings: dict[str, Any], tokenizer: Tokenizer, family: str | None, lora_alpha: float
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and config of a checkpoint that `ltts run` reads; the tokenizer gets the latent tokens it lacks.

    Args:
        state: by the training code's names, or by transformers'.
        settings: the backbone's config; empty if there is none.
        tokenizer: the backbone's.
        family: the training layout, None for transformers' own.
        lora_alpha: LoRA's scale.

    Raises:
        UsageError: the tensors, the config and the tokenizer do not fit together.
    """
    backbone = layouts.Backbone(state, {})
    if family == "CODI":
        backbone = layouts.codi_backbone(state, lora_alpha)
    elif family == "COCONUT":
        backbone = layouts.coconut_backbone(state)
    if not settings:
        raise UsageError(
            f"config.json is missing or empty; wanted is that of {layouts.describe(backbone.tensors)}\n"
            "give it as config=FOLDER/config.json"
        )
    if family is None:
        return state, settings
    from transformers import AutoConfig

    tied = AutoConfig.for_model(**settings).tie_word_embeddings
    tensors = layouts.settle_embeddings(backbone, tied=tied)
    layouts.check_config(settings, tensors)
    rows = next(tensors[name].shape[0] for name in layouts.EMBEDDINGS if name in tensors)
    layouts.name_latent_tokens(tokenizer, family, rows=rows, vocabulary=settings.get("vocab_size"))
    if backbone.left_out:
        parts = ", ".join(f"{name}.* ({count})" for name, count in sorted(backbone.left_out.items()))
        log.info("left out, since inference does not use them: %s", parts)
    log.info("a %s checkpoint of %d tensors: model=%s", family, len(tensors), family.lower())
    return tensors, settings | {"vocab_size": rows}


def convert_folder(
    src: Path, base: str | None, tokenizer: Tokenizer
) -> tuple[dict[str, Tensor], dict[str, Any], Tokenizer, Mapping[str, str]]:
    """Tensors, config and tokenizer of a LoRA adapter merged into its model, or of PCCoT; which tokens have new names.

    Args:
        src: a folder of PEFT or of PCCoT's training code, with its own tokenizer and config.
        base: folder or hub id of the model that was adapted; None for the one that the adapter names.
        tokenizer: the folder's.

    Raises:
        UsageError: the adapter cannot be merged, or PCCoT's files do not say what they should.
    """
    from latent_tts.checkpoint import loading

    renamed: Mapping[str, str] = {}
    said, arguments = {}, None
    if peft_adapter.is_pccot(src):  # what is cheap to check comes before any weight is read
        arguments = checkpoint.read_json(src, peft_adapter.PCCOT_ARGUMENTS, key="src")
        said = {"latent_tts": peft_adapter.pccot_settings(src, arguments)}
        tokenizer, renamed = peft_adapter.rename_latent_tokens(src, arguments, tokenizer)
    if peft_adapter.is_adapter(src):
        tensors, settings = peft_adapter.merge(src, base, tokenizer.get_vocab_size(with_added_tokens=True))
        tensors = layouts.settle_embeddings(layouts.Backbone(tensors, {}), tied=settings["tie_word_embeddings"])
    else:
        tensors, settings = loading.load_tensors(src, ""), checkpoint.read_config(src)
        settings["model_type"] = str(settings.get("model_type")).removeprefix("pccot-")
    if arguments is None:
        log.info("an adapter of PEFT, merged")
    else:
        peft_adapter.check_projection(src, tensors)
        log.info(
            "a PCCoT checkpoint: model=pccot model.latents=%d model.sweeps=%d \"model.answer_prompt='%s'\"",
            *said["latent_tts"].values(),
            arguments.get("answer_prompt", ""),
        )
    return tensors, settings | said, tokenizer, renamed


def write(dst: Path, tensors: dict[str, Tensor], settings: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Write the new folder."""
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
