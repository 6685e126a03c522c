"""The initial checkpoint of a training run, made from a new backbone or another checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from latent_tts.checkpoint import files, loading
from latent_tts.checkpoint.vocabulary import MEAN, cut_to, fit_rows, with_tokens
from latent_tts.errors import require
from latent_tts.training.reasoner.backbone import UNKNOWN, word_level_tokenizer
from latent_tts.training.reasoner.curriculum import Recipe


def load_trainable_lm(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The causal LM of a checkpoint in training mode, with plain attention."""
    logging.set_verbosity_error()  # transformers would warn about tensors that the family adds
    logging.disable_progress_bar()
    config = AutoConfig.from_pretrained(folder, attn_implementation="eager")
    lm = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=dtype).train()
    loading.name_body(lm)
    return lm


def write_initial_checkpoint(make: Callable[[Path], None], folder: Path, recipe: Recipe, seed: int) -> None:
    """Write the checkpoint folder that training starts from, completely or not at all; replaces an older one.

    Args:
        make: writes a checkpoint of the family or of a plain causal LM; missing tensors of the family are added.
        folder: the checkpoint folder to write.
        recipe: recipe of the family.
        seed: seed of new weights.
    """
    with files.whole_folder(folder) as partial:
        make(partial)
        add_words(partial, recipe.words, seed)
        recipe.add_own_tensors(partial, seed)


def copy_checkpoint(
    source: Path, folder: Path, tokens: Sequence[str] = (), begin: str = MEAN, texts: Sequence[str] | None = None
) -> None:
    """Copy the weights (shards become one file), config and tokenizer of a checkpoint, fitted to a vocabulary.

    Args:
        source: the checkpoint.
        folder: to write to.
        tokens: special tokens that the new tokenizer is to have.
        begin: what rows of tokens that are new begin from: `mean`, or a token.
        texts: the texts whose tokens are kept; None keeps all tokens.

    Raises:
        UsageError: a file is missing or truncated, or the model cannot be fitted.
    """
    old = files.load_tokenizer(source, key="init")
    require(
        "recipe.new_tokens",
        begin,
        begin == MEAN or (isinstance(begin, str) and old.token_to_id(begin) is not None),
        f"must be {MEAN}, or a token of the model that training starts from",
    )
    files.weight_files(source, key="init")
    files.copy_beside_tokenizer(source, folder)
    config = files.read_config(source)
    files.check_sizes(config, source, key="init")
    config.pop("latent_tts", None)  # the new training may use other latents
    tensors = loading.load_tensors(source, "")
    new = with_tokens(old if texts is None else cut_to(old, texts, "init_vocabulary"), tokens)
    if new.get_vocab() != old.get_vocab():
        tensors = fit_rows(tensors, old, new, begin, source, "init")
        rows = next(value.shape[0] for name, value in tensors.items() if name.endswith(files.EMBEDDINGS))
        config |= {"vocab_size": int(rows)} | moved_ids(config, old, new)
    new.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(tensors, folder / files.WEIGHTS, metadata={"format": "pt"})


def moved_ids(config: Mapping[str, Any], old: Tokenizer, new: Tokenizer) -> dict[str, Any]:
    """The ids of special tokens in a `config.json`, by another tokenizer."""
    moved: dict[str, Any] = {}
    for name, value in config.items():
        if name.endswith("_token_id") and value is not None:
            ids = [
                new.token_to_id(str(old.id_to_token(each))) for each in (value if isinstance(value, list) else [value])
            ]
            moved[name] = ids if isinstance(value, list) else ids[0]
    return moved


def add_words(folder: Path, words: tuple[str, ...], seed: int) -> None:
    """Add words with random embeddings to a word-level vocabulary; other tokenizers are not changed."""
    old = files.load_tokenizer(folder)
    vocabulary = old.get_vocab(with_added_tokens=False)
    if old.token_to_id(UNKNOWN) is None or all(word in vocabulary for word in words):
        return
    new = word_level_tokenizer([*sorted(vocabulary, key=vocabulary.__getitem__), *words])
    lm = load_trainable_lm(folder)
    torch.manual_seed(seed)
    kept = {index: old.token_to_id(token) for token, index in new.get_vocab().items() if token in old.get_vocab()}
    for layer in (lm.get_input_embeddings(), lm.get_output_embeddings()):
        assert isinstance(layer, nn.Embedding | nn.Linear)
        rows = torch.randn(new.get_vocab_size(), layer.weight.shape[1]) * lm.config.initializer_range
        rows[list(kept)] = layer.weight.data[list(kept.values())]
        layer.weight = nn.Parameter(rows)
        lm.tie_weights()
    lm.config.vocab_size = new.get_vocab_size()
    lm.save_pretrained(folder)
    new.save(str(folder / "tokenizer.json"))


def add_tensors(folder: Path, prefix: str, module: nn.Module, **config: object) -> None:
    """Add the parameters of a module to a checkpoint under a prefix, and keys to its config."""
    tensors = load_file(folder / files.WEIGHTS)
    tensors |= checkpoint_tensors(prefix, module)
    save_file(tensors, folder / files.WEIGHTS, metadata={"format": "pt"})
    if config:
        content = files.read_config(folder) | config
        (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n")


def checkpoint_tensors(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    """The parameters of a module by their names in a checkpoint, on the CPU."""
    return {prefix + name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}


def has_tensors(folder: Path, prefix: str) -> bool:
    """Whether a checkpoint has tensors under a prefix."""
    return any(name.startswith(prefix) for name in files.weight_shapes(folder))
