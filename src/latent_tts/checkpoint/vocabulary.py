"""Vocabularies that grow or shrink, and the rows of embedding and LM head that follow them (imports torch)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor

from latent_tts.checkpoint import files
from latent_tts.errors import require

MEAN = "mean"  # the initial value of new rows, unless it is the row of a token
HEADS = ("lm_head.weight", "embed_out.weight", "lm_head.bias")


def with_tokens(tokenizer: Tokenizer, tokens: Sequence[str]) -> Tokenizer:
    """A copy of a tokenizer that has these special tokens too."""
    grown = Tokenizer.from_str(tokenizer.to_str())
    lacking = [token for token in tokens if tokenizer.token_to_id(token) is None]
    grown.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in lacking])
    return grown


def cut_to(tokenizer: Tokenizer, texts: Iterable[str], key: str) -> Tokenizer:
    """A copy of a tokenizer with only the tokens that some texts need; these are split as before.

    It keeps their tokens, the tokens that these are merged from, byte tokens and added tokens. Other texts are split
    into smaller tokens.

    Args:
        tokenizer: byte-level BPE.
        texts: whose tokens are kept.
        key: the config key that errors name.

    Raises:
        UsageError: it is a tokenizer of another kind.
    """
    content = json.loads(tokenizer.to_str())
    model = content["model"]
    require(
        key,
        "used",
        model.get("type") == "BPE" and '"ByteLevel"' in json.dumps(content["pre_tokenizer"]),
        f"needs a byte-level BPE tokenizer, and this one is {model.get('type')}",
    )
    vocabulary: dict[str, int] = model["vocab"]
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    parts: dict[str, set[str]] = {}
    for one, other in merges:
        parts.setdefault(one + other, set()).update((one, other))
    kept = set(ByteLevel.alphabet()) & set(vocabulary)  # some tokenizers lack bytes that are in no text
    kept |= {token["content"] for token in content["added_tokens"]}
    left = [token for text in texts for token in set(tokenizer.encode(text, add_special_tokens=False).tokens) - kept]
    while left:
        token = left.pop()
        if token not in kept:
            kept.add(token)
            left += parts.get(token, ())
    order = sorted((token for token in vocabulary if token in kept), key=vocabulary.__getitem__)
    beyond = [token for token in content["added_tokens"] if token["content"] not in vocabulary]
    ids = {token: place for place, token in enumerate([*order, *(token["content"] for token in beyond)])}
    model["vocab"] = {token: ids[token] for token in order}
    model["merges"] = [list(pair) for pair in merges if "".join(pair) in ids and ids.keys() >= set(pair)]
    old_ids = {**vocabulary, **{token["content"]: token["id"] for token in content["added_tokens"]}}
    new_ids = {old: ids[token] for token, old in old_ids.items() if token in ids}
    for token in content["added_tokens"]:
        token["id"] = ids[token["content"]]
    for special in ((content.get("post_processor") or {}).get("special_tokens") or {}).values():
        special["ids"] = [new_ids[old] for old in special["ids"]]
    return Tokenizer.from_str(json.dumps(content))


def fit_rows(
    tensors: Mapping[str, Tensor], old: Tokenizer, new: Tokenizer, begin: str, folder: Path, key: str
) -> dict[str, Tensor]:
    """The tensors of a causal LM, with a row of embedding and LM head for each token of another tokenizer.

    Args:
        tensors: of the model.
        old: its tokenizer.
        new: the other one: more tokens, or fewer.
        begin: initial value of the rows of new tokens: `mean`, the mean of all rows, or a token, whose row is copied;
            their biases, where the LM head has some, are the mean.
        folder: of the model, for errors.
        key: the config key that errors name.

    Raises:
        UsageError: the model has no embedding that can be fitted, or fewer rows than its tokenizer has tokens.
    """
    names = [name for name in tensors if name.endswith((*files.EMBEDDINGS, *HEADS))]
    require(
        key,
        folder,
        any(name.endswith(files.EMBEDDINGS) for name in names),
        f"has no embedding ({', '.join(files.EMBEDDINGS)}) to fit to new tokens",
    )
    rows = int(tensors[names[0]].shape[0])
    ids = old.get_vocab(with_added_tokens=True)
    last = max(ids, key=ids.__getitem__)
    why = f"its tokenizer gives {last!r} the id {ids[last]}, and the embedding has {rows} rows"
    require(key, folder, ids[last] < rows, f"has no room for new tokens: {why}")
    size = max(new.get_vocab(with_added_tokens=True).values()) + 1
    wanted = [ids.get(str(new.id_to_token(row))) for row in range(size)]
    if all(
        new.token_to_id(token) == place for token, place in ids.items()
    ):  # nothing is cut: rows without a token stay
        wanted += range(size, rows)
    fitted = dict(tensors)
    for name in names:
        table = tensors[name]
        # an adapter has the rows of new tokens, and no biases
        is_mean = begin == MEAN or table.dim() == 1
        start = table.float().mean(0).to(table.dtype) if is_mean else table[ids[begin]]
        result = table[[0 if place is None else place for place in wanted]].clone()
        result[[row for row, place in enumerate(wanted) if place is None]] = start
        fitted[name] = result
    return fitted
