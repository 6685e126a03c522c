"""Checkpoints that write a given text: a GPT-2 without layers, whose next token depends only on the last one."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel

EOS, MARKS = "<|endoftext|>", ["<|latent|>", "<|start-latent|>", "<|end-latent|>", "###"]


def make(folder: Path, family: str, *texts: str) -> Path:
    """A checkpoint of a family (`coconut`, `codi`, `colar`) that writes one of `texts`, all equally likely."""
    pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={sign: place for place, sign in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=True) for token in [EOS, *MARKS]])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in texts])
    size, eos = tokenizer.get_vocab_size(), tokenizer.token_to_id(EOS)
    config = GPT2Config(
        vocab_size=size, n_embd=size, n_layer=0, n_head=1, n_positions=512, bos_token_id=eos, eos_token_id=eos,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    start = tokenizer.token_to_id("###" if family == "colar" else "<|end-latent|>")
    with torch.no_grad():
        for weights in (model.transformer.wpe.weight, model.lm_head.weight):
            weights.zero_()
        model.transformer.wte.weight.copy_(torch.eye(size))
        for text in texts:
            model.lm_head.weight[tokenizer.token_to_id(text), start] = 2.0
            model.lm_head.weight[eos, tokenizer.token_to_id(text)] = 2.0
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOS}))
    path = folder / "model.safetensors"
    if family == "codi":
        save_file(load_file(path) | _projector(size), path, metadata={"format": "pt"})
    if family == "colar":
        save_file(load_file(path) | _latent_head(size), path, metadata={"format": "pt"})
        own = json.loads((folder / "config.json").read_text()) | {"latent_embedding_std": 1.0}
        (folder / "config.json").write_text(json.dumps(own))
    return folder


def _projector(size: int, inner: int = 8) -> dict[str, torch.Tensor]:
    shapes = {"1.weight": (inner, size), "1.bias": (inner,), "3.weight": (size, inner), "3.bias": (size,)}
    shapes |= {"4.weight": (size,), "4.bias": (size,)}
    return {f"projector.{name}": torch.ones(shape) for name, shape in shapes.items()}


def _latent_head(size: int, inner: int = 8) -> dict[str, torch.Tensor]:
    shapes = {"fc.0.weight": (inner, size), "fc.0.bias": (inner,), "fc.2.weight": (inner, inner), "fc.2.bias": (inner,)}
    shapes |= {"fc.3.weight": (inner,), "fc.3.bias": (inner,), "mean.weight": (size, inner), "mean.bias": (size,)}
    return {f"lt_head.{name}": torch.ones(shape) for name, shape in shapes.items()}
