"""The LM head: which token comes next, how probable it is, and how far ahead of the second.

Logits are many (rows x vocabulary) and each is looked at once. So the head's product is done in pieces of the
vocabulary whose logits stay in a core's cache; there is never a tensor of all of them. Only a sampler that chooses
tokens itself sees whole rows of logits, some rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from latent_tts.random.kernel_check import is_usable
from latent_tts.types import Reasoner

# tokens, eighths that logits reach, how many more with each further 4096 tokens, whether there is a bias
KERNEL_CASES = [(4096, 4, 0, False), (9001, 40, 0, True), (13_000, 4, 5, False), (5000, 2, 0, True), (2, 3, 0, False)]
BLOCK = 64  # the highest logit is looked for in blocks: maxima are vectorized, places of maxima are not
VALUES_AT_ONCE = {"cpu": 1 << 20, "cuda": 1 << 28}  # logits of a piece
SORTED_AT_ONCE = {"cpu": 1 << 20, "cuda": 1 << 25}  # of whole rows; a sampler may need 50 bytes for each


@dataclass(frozen=True)
class Choice:
    """The next token of each of R rows.

    Attributes:
        token_R: its id.
        logprob_R: its log-probability, float32.
        margin_R: gap between the two highest logits, float32.
    """

    token_R: Tensor
    logprob_R: Tensor
    margin_R: Tensor


def head_of(reasoner: Reasoner) -> nn.Module:
    """What makes logits of a model's final hidden states."""
    if reasoner.computation.logits == "model":
        return ModelLogits(reasoner.lm)
    return cast(nn.Module, reasoner.lm.get_output_embeddings())


class ModelLogits(nn.Module):
    """The logits that a causal LM itself makes of final hidden states: whatever it does to those of its LM head.

    Its own forward pass runs on a body that gives back what it gets.
    """

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__()
        shell = copy(lm)
        shell._modules = {**lm._modules, lm.base_model_prefix: _GivesBack()}
        self._shell = [shell]  # in a list, since it is no module of this one

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits (R, V) or (Q, S, V) of hidden states (R, D) or (Q, S, D)."""
        if hidden.dim() == 2:
            return self(hidden[:, None])[:, 0]
        return self._shell[0](inputs_embeds=hidden, use_cache=False).logits


@dataclass
class _Output(MoeModelOutputWithPast):
    """What bodies of transformers give to the models around them."""

    cross_attentions: None = None


class _GivesBack(nn.Module):
    def forward(self, *args: object, inputs_embeds: Tensor, **kwargs: object) -> _Output:
        """The embeddings, as final hidden states."""
        return _Output(last_hidden_state=inputs_embeds)


def choose(head: nn.Module, hidden_RD: Tensor, token: Callable[[Tensor, slice], Tensor] | None = None) -> Choice:
    """Choose a token in every row.

    Args:
        head: the LM head.
        hidden_RD: final hidden states; what is computed of logits is float32 whatever their precision. In half
            precision the two highest logits are computed anew in float32, and so ranked.
        token: the ids of some rows, from their logits (float32) and which rows they are; None takes the highest
            logit, the lowest id where several are as high.
    """
    if token is None and type(head) is nn.Linear:
        return _highest_by_kernel(head, hidden_RD) if has_kernel(hidden_RD) else _highest(head, hidden_RD)
    return _chosen(head(hidden_RD), token)


def _highest(head: nn.Linear, hidden_RD: Tensor) -> Choice:
    """The tokens of the highest logits, piece by piece of the vocabulary."""
    rows, vocabulary = hidden_RD.shape[0], head.out_features
    whole = vocabulary // BLOCK * BLOCK
    at_once = max(1, VALUES_AT_ONCE[hidden_RD.device.type] // rows // BLOCK) * BLOCK
    starts = [*range(0, whole, at_once), *([whole] if whole < vocabulary else [])]
    # all pieces share their memory: new pages for each would cost as much as the product
    product_PR = hidden_RD.new_empty(min(at_once, vocabulary), rows)
    wide_PR = product_PR if product_PR.dtype == torch.float32 else torch.empty_like(product_PR, dtype=torch.float32)
    found = []
    for start, end in pairwise([*starts, vocabulary]):
        # in this order the product needs no rearranged copy of the weights, and places lie side by side for maxima
        logits_PR = torch.mm(head.weight[start:end], hidden_RD.t(), out=product_PR[: end - start])
        if wide_PR is not product_PR:
            logits_PR = wide_PR[: end - start].copy_(logits_PR)
        if head.bias is not None:
            logits_PR += head.bias[start:end].float()[:, None]
        highest_2R, place_2R = _highest_two(logits_PR)
        lowest = torch.finfo(torch.float32).min  # without it -inf - -inf where no token of a piece is possible
        found.append((highest_2R, start + place_2R, logits_PR.sub_(highest_2R[0].clamp(min=lowest)).exp_().sum(0)))
    return _choice(head, hidden_RD, found)


def _highest_by_kernel(head: nn.Linear, hidden_RD: Tensor) -> Choice:
    """The same on a GPU: one kernel looks at the logits of a piece once."""
    from latent_tts.engine.head_kernel import look

    found, at_once = [], max(BLOCK, VALUES_AT_ONCE["cuda"] // hidden_RD.shape[0])
    for start in range(0, head.out_features, at_once):
        piece = slice(start, start + at_once)
        weight_PD, bias_P = head.weight[piece], None if head.bias is None else head.bias[piece]
        logits_RP = torch.mm(hidden_RD, weight_PD.t(), out=_room(hidden_RD, len(hidden_RD), len(weight_PD)))
        highest_2R, place_2R, total_R = look(logits_RP, bias_P)
        found.append((highest_2R, start + place_2R, total_R))
    return _choice(head, hidden_RD, found)


def _room(like: Tensor, rows: int, tokens: int) -> Tensor:
    """Memory for logits (R, P) whose rows begin where a GPU loads and stores many values at once."""
    return like.new_empty(rows, -(-tokens // BLOCK) * BLOCK)[:, :tokens]


def _choice(head: nn.Linear, hidden_RD: Tensor, found: list[tuple[Tensor, Tensor, Tensor]]) -> Choice:
    """The choice of the highest logit, settled in float32.

    Args:
        head: the LM head.
        hidden_RD: final hidden states.
        found: of each piece of the vocabulary the two highest logits (2, R), their tokens (2, R), and the sum of
            exp(logit - highest) (R).
    """
    highest, tokens, totals = zip(*found, strict=True)
    highest_2R, token_2R = _first_two(torch.cat(highest), torch.cat(tokens))
    pairs = zip(highest, totals, strict=True)
    total_R = torch.stack([total_R * (own_2R[0] - highest_2R[0]).exp() for own_2R, total_R in pairs]).sum(0)
    logits_2R = highest_2R
    if hidden_RD.dtype.itemsize < 4:
        token_2R, logits_2R = _settled(head, hidden_RD, token_2R)
        # a logarithm above 0 would come of a logit that its own sum holds rounded
        settled_R, rounded_R = ((each - highest_2R[0]).exp().sum(0) for each in (logits_2R, highest_2R))
        total_R = (total_R - rounded_R).clamp(min=0) + settled_R
    logprob_R = (logits_2R[0] - highest_2R[0] - total_R.log()).clamp(max=0)
    return Choice(token_2R[0], logprob_R, logits_2R[0] - logits_2R[1])


def has_kernel(hidden_RD: Tensor) -> bool:
    """Whether Triton's kernel looks at the logits of hidden states like these."""
    has_one = hidden_RD.is_cuda and hidden_RD.dtype != torch.float64
    return has_one and is_usable("visit to logits", kernel_agrees, hidden_RD.device, hidden_RD.dtype)


def kernel_agrees(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel finds what the operators find, also among equal logits and beyond a whole number of blocks."""
    from latent_tts.engine.head_kernel import look

    generator, agree = torch.Generator().manual_seed(0), True
    for tokens, levels, rise, with_bias in KERNEL_CASES:
        drawn = torch.randint(-levels, levels, (5, tokens), generator=generator) + torch.arange(tokens) // 4096 * rise
        logits_RP = _room(torch.empty(0, device=device, dtype=dtype), *drawn.shape).copy_(drawn.float() / 8)
        bias_P = None
        if with_bias:
            bias_P = (torch.randint(-8, 8, (tokens,), generator=generator).float() / 8).to(device, dtype)
        wide_RP = logits_RP.float() if bias_P is None else logits_RP.float() + bias_P.float()
        highest_2R, place_2R = wide_RP.sort(dim=1, descending=True, stable=True)
        total_R = (wide_RP - highest_2R[:, :1]).exp().sum(1)
        found = look(logits_RP, bias_P)
        agree &= torch.equal(found[0], highest_2R[:, :2].t()) and torch.equal(found[1], place_2R[:, :2].t())
        agree &= torch.allclose(found[2], total_R, rtol=1e-4)
    return agree


def _settled(head: nn.Linear, hidden_RD: Tensor, token_2R: Tensor) -> tuple[Tensor, Tensor]:
    """The two tokens in the order of their logits in float32.

    Rounding to half precision keeps order but makes ties, of which the lowest token would win each time: enough for
    votes of a trained model to lose most of a point (docs/tuning.md).
    """
    token_2R = token_2R.sort(0).values
    logits_2R = (head.weight[token_2R].float() * hidden_RD.float()).sum(-1)
    if head.bias is not None:
        logits_2R += head.bias[token_2R].float()
    logits_2R, token_2R = _first_two(logits_2R, token_2R)
    return token_2R, logits_2R


def _first_two(logits_XR: Tensor, token_XR: Tensor) -> tuple[Tensor, Tensor]:
    """The two highest logits of each column, and their tokens; of equal ones those of the first places."""
    logits_XR, order_XR = logits_XR.sort(dim=0, descending=True, stable=True)
    return logits_XR[:2], token_XR.gather(0, order_XR[:2])


def _highest_two(logits_PR: Tensor) -> tuple[Tensor, Tensor]:
    """The two highest of each column and their places, the first of equal highest; P is below BLOCK or a multiple."""
    logits_BKR = logits_PR.unflatten(0, (-1, min(BLOCK, logits_PR.shape[0])))
    _, inside, rows = logits_BKR.shape
    maxima_BR, row_R = logits_BKR.amax(1), torch.arange(rows, device=logits_PR.device)
    block_R = maxima_BR.argmax(0)
    near_RK = logits_BKR[block_R, :, row_R]
    place_R = near_RK.argmax(1)
    highest_R = near_RK.gather(1, place_R[:, None])[:, 0]
    near_RK.scatter_(1, place_R[:, None], float("-inf"))
    maxima_BR.scatter_(0, block_R[None], near_RK.amax(1)[None])
    second_block_R = maxima_BR.argmax(0)
    far_RK = torch.where((second_block_R == block_R)[:, None], near_RK, logits_BKR[second_block_R, :, row_R])
    second_place_R = far_RK.argmax(1)
    second_R = far_RK.gather(1, second_place_R[:, None])[:, 0]
    places_2R = torch.stack([block_R * inside + place_R, second_block_R * inside + second_place_R])
    return torch.stack([highest_R, second_R]), places_2R


def _chosen(logits_RV: Tensor, token: Callable[[Tensor, slice], Tensor] | None) -> Choice:
    """The tokens that `token` chooses, some rows at a time."""
    parts = []
    at_once = max(1, SORTED_AT_ONCE[logits_RV.device.type] // logits_RV.shape[1])
    for start in range(0, logits_RV.shape[0], at_once):
        rows = slice(start, min(start + at_once, logits_RV.shape[0]))
        logits_CV = logits_RV[rows].float()
        token_C = logits_CV.argmax(1) if token is None else token(logits_CV, rows)
        highest_C2 = logits_CV.topk(2).values
        logprob_C = logits_CV.gather(1, token_C[:, None])[:, 0] - logits_CV.logsumexp(1)
        parts.append((token_C, logprob_C, highest_C2[:, 0] - highest_C2[:, 1]))
    return Choice(*(torch.cat(part) for part in zip(*parts, strict=True)))
