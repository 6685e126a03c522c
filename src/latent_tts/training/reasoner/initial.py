"""The initial checkpoint of a training run, made from a new backbone or another checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from latent_tts.checkpoint import files, loading
from latent_tts.training.reasoner.vocabulary import UNKNOWN, word_level_tokenizer

if TYPE_CHECKING:
    from latent_tts.training.reasoner.curriculum import Recipe


def load_trainable_lm(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The causal LM of a checkpoint in training mode, with plain attention."""
    logging.set_verbosity_error()  # transformers would warn about tensors that the family adds
    logging.disable_progress_bar()
    config = AutoConfig.from_pretrained(folder, attn_implementation="eager")
    return AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=dtype).train()


def embedding_table(lm: PreTrainedModel) -> Tensor:
    """The token embeddings (V, D), without gradients."""
    layer = lm.get_input_embeddings()
    assert isinstance(layer, nn.Embedding)
    return layer.weight.detach()


def lm_head(lm: PreTrainedModel) -> nn.Module:
    """The layer that makes logits of final hidden states."""
    layer = lm.get_output_embeddings()
    assert layer is not None
    return layer


def write_initial_checkpoint(make: Callable[[Path], None], folder: Path, recipe: Recipe, seed: int) -> None:
    """Write the checkpoint folder that training starts from, completely or not at all; replaces an older one.

    Args:
        make: writes a checkpoint of the family or of a plain causal LM; missing tensors of the family are added.
        folder: the checkpoint folder to write.
        recipe: recipe of the family.
        seed: seed of new weights.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    make(partial)
    add_words(partial, recipe.words, seed)
    recipe.add_own_tensors(partial, seed)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def copy_checkpoint(source: Path, folder: Path) -> None:
    """Copy the weights (shards become one file), config and tokenizer of a checkpoint.

    Raises:
        UsageError: a file is missing or truncated.
    """
    files.load_tokenizer(source, key="init")
    files.weight_files(source, key="init")
    for path in (source / "tokenizer.json", *source.glob("tokenizer_config.json")):
        shutil.copyfile(path, folder / path.name)
    config = files.read_config(source)
    files.check_sizes(config, source, key="init")
    config.pop("latent_tts", None)  # the new training may use other latents
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(loading.load_tensors(source, ""), folder / files.WEIGHTS, metadata={"format": "pt"})


def add_words(folder: Path, words: tuple[str, ...], seed: int) -> None:
    """Add words with random embeddings to a word-level vocabulary; other tokenizers are not changed."""
    old = files.load_tokenizer(folder)
    vocabulary = old.get_vocab(with_added_tokens=False)
    if old.token_to_id(UNKNOWN) is None or all(word in vocabulary for word in words):
        return
    new = word_level_tokenizer([*sorted(vocabulary, key=vocabulary.__getitem__), *words])
    lm = load_trainable_lm(folder)
    torch.manual_seed(seed)
    kept = [(index, old.token_to_id(token)) for token, index in sorted(new.get_vocab().items(), key=lambda x: x[1])]
    for layer in (lm.get_input_embeddings(), lm.get_output_embeddings()):
        assert isinstance(layer, nn.Embedding | nn.Linear)
        rows = torch.randn(new.get_vocab_size(), layer.weight.shape[1]) * lm.config.initializer_range
        for index, old_index in kept:
            if old_index is not None:
                rows[index] = layer.weight.data[old_index]
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
