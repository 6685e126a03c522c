"""A new backbone with random weights and a word-level tokenizer, from which `train-reasoner` starts without `init`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import logging

from latent_tts.checkpoint.files import LATENT_TOKENS
from latent_tts.errors import check_fields, require

END_OF_TEXT, UNKNOWN = "<|endoftext|>", "<|unknown|>"
SIGNS = ("<<", ">>", "###", "\n", "+", "-", "*", "/", "=", ",")
LARGEST_NUMBER = 200
PERIODS = (2.0, 3.0, 4.0, 5.0, 7.0, 10.0, 16.0, 25.0, 50.0, 100.0, 200.0, 400.0)


@dataclass(frozen=True)
class BackboneConfig:
    """The size of a GPT-2 that is trained from scratch.

    Attributes:
        layers, width, heads, positions: as in the GPT-2 config.
        dropout: dropout rate in training, at the embedding and both residual branches, in [0, 1).
        number_scale: scale of the features that are added to the random initial embedding of a number, 0 or more.
    """

    layers: int
    width: int
    heads: int
    positions: int
    dropout: float
    number_scale: float

    def __post_init__(self) -> None:
        sizes = dict.fromkeys(("layers", "width", "heads", "positions"), "a positive integer")
        check_fields("backbone", self, **sizes, dropout="a number in [0, 1)", number_scale="a finite number, 0 or more")
        require("backbone.heads", self.heads, self.width % self.heads == 0, f"must divide backbone.width={self.width}")

    def create(self, tokenizer: Tokenizer, folder: Path, seed: int) -> None:
        """Write an initial checkpoint: config, tokenizer and random weights (float32)."""
        eos = tokenizer.token_to_id(END_OF_TEXT)
        torch.manual_seed(seed)
        config = GPT2Config(
            vocab_size=tokenizer.get_vocab_size(),
            n_positions=self.positions,
            n_embd=self.width,
            n_layer=self.layers,
            n_head=self.heads,
            # fused, equal to GPT-2's own gelu_new
            activation_function="gelu_pytorch_tanh",
            resid_pdrop=self.dropout,
            embd_pdrop=self.dropout,
            attn_pdrop=0.0,
            bos_token_id=eos,
            eos_token_id=eos,
            pad_token_id=eos,
        )
        lm = GPT2LMHeadModel(config)
        embeddings = lm.transformer.wte.weight.data
        for token, index in tokenizer.get_vocab().items():
            if token.isdigit():
                embeddings[index] += self.number_scale * number_features(int(token), self.width)
        logging.disable_progress_bar()
        lm.save_pretrained(folder)
        tokenizer.save(str(folder / "tokenizer.json"))


def number_features(number: int, width: int) -> torch.Tensor:
    """Sines and cosines of a number, mixed by a fixed random matrix to `width` features of unit variance.

    Networks that learn addition discover such waves (Nanda et al. 2023, arXiv 2301.05217); starting with them saves
    most of that search.
    """
    angles = 2 * math.pi * number / torch.tensor(PERIODS)
    waves = torch.cat([angles.cos(), angles.sin()])
    mix = torch.randn(len(waves), width, generator=torch.Generator().manual_seed(0)) / math.sqrt(len(PERIODS))
    return waves @ mix


def word_level_tokenizer(words: list[str]) -> Tokenizer:
    """A tokenizer with one token per word, sign and integer up to 200; larger numbers are spelt digit by digit.

    Decoding joins tokens without spaces, so that digits become numbers again. This is right for answers and equations;
    sentences lose their spaces, but they are never decoded.

    Args:
        words: the words and signs of the task.
    """
    numbers = [str(i) for i in range(LARGEST_NUMBER + 1)]
    vocabulary = list(dict.fromkeys([END_OF_TEXT, UNKNOWN, *numbers, *SIGNS, *words]))
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=UNKNOWN))
    pieces = Regex(r"<<|>>|###|\n|\b(?:200|1\d\d|[1-9]?\d)\b|\d|[^\W\d]+|[^\s\w]|_")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pieces, behavior="removed", invert=True)
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([END_OF_TEXT])
    tokenizer.add_tokens(list(LATENT_TOKENS))
    return tokenizer
