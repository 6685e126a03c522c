"""Shared-prefix attention: a question's prompt is kept once, each of its N rollouts adds a short suffix.

transformers passes keyword arguments of a model call on to the attention function, so that the state of a call travels
with it and nothing is patched. A forward pass either fills the prefix (ordinary causal attention over right-padded
prompts) or appends to the suffixes: scores against the prefix and against the row's own suffix are put side by side
before one softmax, which is exact.

Source: the split follows bifurcated attention (Athiwaratkun et al. 2024, arXiv 2403.08845) and Hydragen (Juravsky et
al. 2024, arXiv 2402.05099).
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel

from latent_tts.engine.state import KeyValueState, Piece
from latent_tts.random.kernel_check import is_usable

NAME = "latent_tts_shared_prefix"
KERNEL_WIDTHS = range(16, 257)  # of heads
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KERNEL_TOLERANCE = 8  # roundings of half precision; values are of the order of 1
KERNEL_TOLERANCE_32 = 1e-5
# questions, siblings, key heads, query heads of each, tokens, slots used, prefix tokens, whether slots hold nothing
KERNEL_CASES = [
    (2, 3, 2, 1, 1, 4, 20, False),
    (3, 40, 1, 2, 1, 0, 70, True),
    (6, 1, 2, 4, 3, 2, 5, True),
    (32, 20, 4, 1, 1, 1, 35, False),  # enough for large tiles
]


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    shared_prefix_state: KeyValueState,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """The attention function registered with transformers.

    Args:
        module: the attention layer; its `layer_idx` names the layer.
        query: (rows, heads, S, K).
        key: (rows, key heads, S, K); fewer heads than `query` in grouped-query attention.
        value: the same.
        attention_mask: unused, transformers gives None to a function without a registered mask.
        scaling: factor of the scores, 1/sqrt(K) if None.
        shared_prefix_state: where keys and values are kept.
        **kwargs: what other attention functions read.

    Returns:
        The attended values (rows, S, heads, K), and None for the weights.
    """
    state, layer = shared_prefix_state, int(module.layer_idx)  # type: ignore[arg-type]
    if state.fills_prefix:
        state.write_prefix(layer, key, value)
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        return out.transpose(1, 2), None

    keys, values = state.write_suffix(layer, key, value)
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    if has_kernel(query) and value.shape == key.shape:
        return _attend_by_kernel(state, query, layer, (keys, values), scale), None
    return _attend_by_operators(state, query, layer, (keys, values), scale), None


def _attend_by_operators(state: KeyValueState, query: Tensor, layer: int, suffix: Piece, scale: float) -> Tensor:
    """Attended values (R, S, heads, K)."""
    keys, values = suffix
    # query heads that share a key head become more query tokens of that head
    own = (query.unflatten(1, (keys.shape[1], -1)) * scale).flatten(2, 3)
    parts = [
        _attend_piece(state, questions, rows, query.shape[2], own[rows], prefix, (keys[rows], values[rows]))
        for questions, rows, prefix in state.pieces(layer)
    ]
    attended = torch.cat(parts) if len(parts) > 1 else parts[0]
    return attended.reshape(query.shape).transpose(1, 2)


def _attend_piece(
    state: KeyValueState, questions: slice, rows: slice, tokens: int, own: Tensor, prefix: Piece, suffix: Piece
) -> Tensor:
    """Attended values (r, H, G*S, K) of scaled queries of q questions, by their prefixes and the suffixes so far."""
    (prefix_keys, prefix_values), (keys, values) = prefix, suffix
    count, _, length, _ = prefix_keys.shape
    siblings = own.unflatten(0, (count, state.rollouts)).transpose(1, 2)
    stacked = siblings.flatten(2, 3)

    # both parts are laid out (q, H, N*G*S, ...): the longer one, against the prefix, needs no transposing
    before = stacked @ prefix_keys.transpose(-1, -2)
    padding = torch.arange(length, device=own.device) >= state.lengths_Q[questions, None]
    before.masked_fill_(padding[:, None, None, :], float("-inf"))
    # (r, H, G*S, used + S); in this order bfloat16 products on a CPU take half the time
    after = (state.dense(keys) @ own.transpose(-1, -2)).transpose(-1, -2)
    if state.later_SC is not None:
        after = after.masked_fill(state.later_SC.repeat(own.shape[2] // tokens, 1), float("-inf"))
    if state.valid_RC is not None:
        after = after.masked_fill(~state.valid_RC[rows, None, None, : keys.shape[2]], float("-inf"))
    after = after.unflatten(0, (count, state.rollouts)).transpose(1, 2)
    # softmax computes half precision in float32 and rounds the result
    weights = torch.cat([before, after.reshape(*stacked.shape[:3], -1)], dim=-1).softmax(-1)
    before, after = weights.split([length, keys.shape[2]], dim=-1)

    after = after.unflatten(2, (state.rollouts, -1)).transpose(1, 2).flatten(0, 1)  # (r, H, G*S, used + S)
    out = (before @ prefix_values).view(siblings.shape).transpose(1, 2)
    return out.reshape(own.shape) + after @ state.dense(values)


def _attend_by_kernel(state: KeyValueState, query: Tensor, layer: int, suffix: Piece, scale: float) -> Tensor:
    """The same by Triton's kernel."""
    from latent_tts.engine.attention_kernel import attend_piece

    out, used_1 = query.new_empty(*query.transpose(1, 2).shape), state.slots_S[:1]
    for questions, rows, prefix in state.pieces(layer):
        valid_RC = None if state.valid_RC is None else state.valid_RC[rows]
        own = suffix[0][rows], suffix[1][rows]
        attend_piece(query[rows], prefix, own, state.lengths_Q[questions], used_1, valid_RC, scale, out[rows])
    return out


def has_kernel(like: Tensor) -> bool:
    """Whether Triton's kernel attends with heads like these (..., K)."""
    has_one = like.is_cuda and like.dtype in KERNEL_DTYPES
    return has_one and is_usable("attention", kernel_agrees, like.device, like.dtype, like.shape[-1])


def kernel_agrees(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether the kernel gives what the operators give, for ragged prompts, grouped heads and unused slots."""
    if width not in KERNEL_WIDTHS:
        raise ValueError(f"heads of width {width}, not {KERNEL_WIDTHS[0]} to {KERNEL_WIDTHS[-1]}")
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    def keys_and_values(*shape: int) -> Piece:
        return numbers(*shape), numbers(*shape)

    agree = True
    for questions, siblings, heads, groups, tokens, used, length, with_valid in KERNEL_CASES:
        rows, capacity = questions * siblings, used + tokens + 2
        state = KeyValueState(cast(Any, None), siblings, capacity)  # of one layer, whose passes no backbone runs
        lengths = [max(0, length - 3 * (place % 3)) for place in range(questions)]
        state.lengths_Q, state.used = torch.tensor(lengths, device=device), used
        state.reserve(tokens)
        prefix = keys_and_values(questions, heads, length, width)
        suffix = keys_and_values(rows, heads, state.window, width)
        if with_valid:
            state.valid_RC = torch.rand(rows, capacity, generator=generator).to(device) < 0.6
            state.valid_RC[:, 0] = True
        query, scale = numbers(rows, heads * groups, tokens, width), width**-0.5
        state.prefix = [[prefix]]
        found = _attend_by_kernel(state, query, 0, suffix, scale)
        state.prefix = [[(prefix[0].double(), prefix[1].double())]]
        wide = suffix[0].double(), suffix[1].double()
        difference = (found - _attend_by_operators(state, query.double(), 0, wide, scale)).abs().max()
        limit = KERNEL_TOLERANCE_32 if dtype == torch.float32 else KERNEL_TOLERANCE * torch.finfo(dtype).eps
        agree &= bool(difference < limit)
    return agree


def use_shared_prefix_attention(lm: PreTrainedModel) -> None:
    """Make a model's layers call `attend`."""
    AttentionInterface.register(NAME, attend)
    lm.set_attn_implementation(NAME)


def use_own_attention(lm: PreTrainedModel, kind: str | None = None) -> None:
    """Make a model's layers call an attention of transformers.

    Args:
        lm: the model.
        kind: `sdpa` or `eager`; None for the first one that the model has.

    Raises:
        ValueError: the model does not have `kind`.
    """
    if kind is not None:
        lm.set_attn_implementation(kind)
        return
    try:
        lm.set_attn_implementation("sdpa")
    except ValueError:  # as where it cannot cap scores
        lm.set_attn_implementation("eager")
