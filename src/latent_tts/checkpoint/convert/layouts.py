"""Converts the layouts of training codes into that of `ltts run`: the names of transformers, and those of a family.

COCONUT's training code saves a wrapper, with the causal LM under `base_causallm.`. CODI's has it under
`codi.base_model.model.`, with LoRA factors beside the weights, and the projector under `prj.`. SIM-CoT adds to either a
decoder that inference does not use.

Source: facebookresearch/coconut `coconut.py`, `run.py`; zhenyi4/codi `src/model.py`, `test.py`; InternLM/SIM-CoT.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Tokenizer

from latent_tts.checkpoint import joining
from latent_tts.errors import UsageError, require

if TYPE_CHECKING:
    from torch import Tensor

# in the order in which the training codes assign ids; CODI's first one is its padding token, never fed
TOKEN_ORDER = {
    "COCONUT": ("<|start-latent|>", "<|end-latent|>", "<|latent|>"),
    "CODI": ("<|latent|>", "<|start-latent|>", "<|end-latent|>"),
}
HEAD = "lm_head.weight"
EMBEDDINGS = ("transformer.wte.weight", "model.embed_tokens.weight")
EMBEDDING_COPY = "embedding.weight"  # in files of COCONUT's training code
PROJECTOR = {f"{old}.{part}": f"projector.{new}.{part}" for old, new in (("1", "1"), ("3", "3"), ("ln", "4"))
             for part in ("weight", "bias")}  # fmt: skip
WRAPPERS = re.compile(r"(^|\.)(module|_orig_mod|_fsdp_wrapped_module)\.")  # of data-parallel and compiled modules
BUFFERS = re.compile(r"\.attn\.(masked_)?bias$|\.rotary_emb\.inv_freq$")  # transformers computes them


def coconut_backbone(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The backbone in a state dict of COCONUT's, or SIM-CoT's, training code, and what inference does not use."""
    tensors, rest = _below("base_causallm.", state)
    if EMBEDDING_COPY in rest:
        tensors[EMBEDDING_COPY] = rest.pop(EMBEDDING_COPY)
    return tensors, rest


def codi_backbone(
    state: Mapping[str, Tensor], alpha: float, kind: str = joining.TRANSPOSED
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The same of CODI's, or SIM-CoT's, training code: with LoRA merged, and with the projector.

    Args:
        state: tensors by the names of the training code.
        alpha: LoRA's scale, which is not in the file; a pair of factors adds alpha / rank times its product.
        kind: `model_type` of the backbone.

    Raises:
        UsageError: the projector is incomplete, or a LoRA factor fits no weight.
    """
    tensors, rest = _below("codi.", state)
    factors = {name: value for name, value in tensors.items() if ".lora_" in name or ".modules_to_save." in name}
    tensors = {name.removeprefix(joining.PREFIX).replace(".base_layer.", "."): value
               for name, value in tensors.items() if name not in factors}  # fmt: skip
    factors = {name.replace(".default.", "."): value for name, value in factors.items()}
    settings = {"lora_alpha": alpha, "transposed": kind == joining.TRANSPOSED}
    tensors = joining.add_adapter(tensors, factors, settings, "codi.*", "src")
    projector, rest = _below("prj.", rest)
    require(
        "src",
        "prj.*",
        set(projector) == set(PROJECTOR),
        f"the projector has the tensors {sorted(projector)}; expected {sorted(PROJECTOR)}",
    )
    tensors |= {PROJECTOR[name]: value for name, value in projector.items()}
    return tensors, rest


def _below(prefix: str, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split tensors into those below a prefix (by names without it, without buffers) and the others."""
    found = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    others = {name: value for name, value in state.items() if not name.startswith(prefix)}
    return {name: value for name, value in found.items() if not BUFFERS.search(name)}, others


def deduplicate_embeddings(backbone: Mapping[str, Tensor], *, tied: bool) -> dict[str, Tensor]:
    """The backbone's tensors with one copy of each matrix, as transformers expects.

    Args:
        backbone: from a training layout, which may have a tied matrix under any of its names.
        tied: whether the config ties the LM head to the input embedding.

    Raises:
        UsageError: no copy is there, or copies of one matrix differ.
    """
    tensors = dict(backbone)
    require("src", HEAD, tied or HEAD in tensors, "missing, and the config does not tie it to the input embedding")
    place = next((name for name in EMBEDDINGS if name in tensors), EMBEDDINGS[0])
    names = (place, EMBEDDING_COPY, HEAD) if tied else (place, EMBEDDING_COPY)
    copies = {name: tensors.pop(name) for name in names if name in tensors}
    require("src", place, bool(copies), "missing: the file contains no input embedding")
    first, *others = copies
    for name in others:
        require(
            "src",
            name,
            copies[first].equal(copies[name]),
            f"differs from {first}, although the config ties them; check tie_word_embeddings",
        )
    if any(name.startswith("model.") for name in tensors):
        place = EMBEDDINGS[1]
    return {**tensors, place: copies[first]}


def check_config(config: Mapping[str, Any], tensors: Mapping[str, Tensor], *, exact: bool) -> None:
    """Check that there is a config and, if it is to be `exact`, that it has the layers and the width of the tensors.

    Raises:
        UsageError: it is missing, or one of them differs.
    """
    layers = len({found[1] for name in tensors if (found := re.search(r"\.(?:h|layers)\.(\d+)\.", name))})
    widths = (tensors[name].shape[1] for name in (*EMBEDDINGS, EMBEDDING_COPY, HEAD) if name in tensors)
    found = f"{layers} layers of width {next(widths, 'unknown')}"
    if not config:
        kind = "GPT-2" if any(name.startswith("transformer.h.") for name in tensors) else "Llama-like model"
        raise UsageError(
            f"config.json is missing or empty; it must be that of the base model, a {kind} with {found}\n"
            "give it as config=FOLDER/config.json"
        )
    depth, width = (
        config.get("n_layer", config.get("num_hidden_layers")),
        config.get("n_embd", config.get("hidden_size")),
    )
    described = f"{depth} layers of width {width}"
    name = config.get("_name_or_path") or config.get("model_type")
    require("config", name, not exact or described == found, f"describes {described}; the weights have {found}")


def name_latent_tokens(tokenizer: Tokenizer, family: str, *, rows: int, vocabulary: int | None) -> None:
    """Add a family's three latent tokens to the backbone's tokenizer, in the order of its training code.

    Args:
        tokenizer: the backbone's, changed in place unless it has the tokens.
        family: COCONUT or CODI.
        rows: number of rows of the embedding.
        vocabulary: the backbone's own `vocab_size`, CODI's first new id; None or `rows`: the size of the tokenizer.

    Raises:
        UsageError: the tokens would not get the ids that they had in training.
    """
    order = TOKEN_ORDER[family]
    known = [tokenizer.token_to_id(token) for token in order]
    if all(token_id is not None and token_id < rows for token_id in known):
        return
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    first = vocabulary if family == "CODI" and vocabulary not in (None, rows) else size
    assert first is not None
    if any(token_id is not None for token_id in known) or size != first or first + len(order) > rows:
        raise UsageError(
            f"tokenizer: it has {size} tokens and gives {', '.join(order)} the ids {known}; "
            f"the embedding has {rows} rows, and in training these tokens had the ids from {first} on\n"
            "give the folder of the base model's tokenizer as tokenizer=FOLDER"
        )
    tokenizer.add_tokens([AddedToken(token, normalized=True, special=False) for token in order])
