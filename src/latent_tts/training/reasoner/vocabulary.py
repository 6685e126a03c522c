"""A word-level tokenizer for a reasoner trained from scratch on a procedural task."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from latent_tts.checkpoint.files import LATENT_TOKENS

END_OF_TEXT, UNKNOWN = "<|endoftext|>", "<|unknown|>"
SIGNS = ("<<", ">>", "###", "\n", "+", "-", "*", "/", "=", ",")
LARGEST_NUMBER = 200


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
