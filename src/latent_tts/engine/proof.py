"""The proof that the engine computes a loaded model as the model computes itself.

Whether the engine's attention and LM head are those of a model is not looked up but tried: two prompts of different
lengths, two rollouts each, two latents and two answer tokens go through the engine, and the same vectors through the
model's own forward pass, without a cache. What a short sequence cannot show (windows, chunks) is read from the masks
that transformers makes for the longest sequence of the run. Where the two differ, the engine runs the model through
transformers' attention and cache, or takes its logits from the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from latent_tts.checkpoint.files import EXPERTS
from latent_tts.engine.attention import use_own_attention
from latent_tts.engine.backbone import prepare_backbone
from latent_tts.engine.head import choose, head_of
from latent_tts.engine.prompts import pad_prompts
from latent_tts.engine.state import open_state
from latent_tts.errors import LatentTTSError, RunError, UsageError
from latent_tts.types import Computation, Reasoner, RewardModel

PROMPTS = [[3, 1, 2], [5, 4, 2, 0, 1]]  # token ids modulo the vocabulary
ROLLOUTS, FED_VECTORS = 2, 4  # of each prompt; fed to a row
SWAPPED_ROLLOUTS = [1, 0, 3, 2]  # the rollouts of each question, swapped
LATENTS, LOG_PROBABILITIES = 2e-4, 1e-3  # of the largest value; absolute. In float32 and wider
HALF = 2.0  # times the distance between the model's own two kinds of attention, in half precision
HALF_REFUSED = 4.0  # times that where a difference would mean that the model cannot be run at all
HALF_ROUNDINGS = 4.0  # and never less than so many roundings of the largest value
OBSERVED = "latent_tts_observed"
FAILURES = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError)


@torch.inference_mode()
def prove_reasoner(reasoner: Reasoner, longest: int) -> Computation:
    """How the engine has to compute a reasoner.

    Args:
        reasoner: as loaded (and quantised).
        longest: tokens of the longest sequence that it will run.

    Raises:
        UsageError: none of the engine's ways agrees with the model.
        RunError: the model's own values are not finite.
    """
    lm = reasoner.lm
    head = lm.get_output_embeddings()
    if head is None:
        raise UsageError(f"{type(lm).__name__} has no LM head")
    found, walk, wanted = _settle(lm, reasoner.next_latent, head, longest)
    problem = _logits_problem(found, reasoner, wanted.hidden_RPD, wanted)
    capped = getattr(lm.config.get_text_config(), "final_logit_softcapping", None)
    if problem is None and capped is not None:
        problem = f"logits are capped at {capped}"
    if problem is not None:
        why = f"the model does more to logits than its LM head ({problem})"
        found = replace(found, logits="model", reason=f"{found.reason}; {why}" if found.reason else why)
    if lm.dtype.itemsize < 4:
        wanted.logits_limit *= HALF_REFUSED
    problem = _logits_problem(found, reasoner, walk.hidden_RPD, wanted)
    if problem is not None:
        name = type(lm).__name__
        raise UsageError(f"{name}: the engine does not compute this model as it computes itself: {problem}")
    return found


@torch.inference_mode()
def prove_reward_model(model: RewardModel, longest: int) -> Computation:
    """How the engine has to compute a LatentRM's backbone, which has no LM head. See `prove_reasoner`."""
    found, _, _ = _settle(model.backbone, lambda hidden: hidden, None, longest)
    return found


@dataclass
class _Walk:
    """What R rows were fed after their prompts, and the hidden states that this gave.

    Attributes:
        fed_RSD: two latents, a token, and a token that the model chose.
        hidden_RPD: final hidden states of the last prompt token and of what was fed; then those of the last token
            again, fed once more after a rewind and a fork that swaps the rows.
    """

    fed_RSD: Tensor
    hidden_RPD: Tensor


@dataclass
class _Reference:
    """What the model's own forward pass makes of the same vectors, and how far another way may be off.

    Attributes:
        hidden_RPD: as in `_Walk`.
        logits_RAV: where tokens are chosen; None for a model without an LM head.
        hidden_limit: of hidden states, in units of the largest value.
        logits_limit: of log-probabilities.
        typical: compare the typical difference, not the largest.
    """

    hidden_RPD: Tensor
    logits_RAV: Tensor | None
    hidden_limit: float
    logits_limit: float
    typical: bool


def _settle(
    lm: PreTrainedModel, make_latent: Callable[[Tensor], Tensor], head: nn.Module | None, longest: int
) -> tuple[Computation, _Walk, _Reference]:
    """How a model's attention is computed right, and the walk that proves it."""
    if getattr(lm, "_is_stateful", False):
        raise UsageError(f"{type(lm).__name__} keeps a running state, which cannot be rewound or forked")
    reason, problem = find_attention_problem(lm, longest), ""
    ways = (Computation("shared-prefix"), Computation("transformers"))
    for way in ways if reason is None else ways[1:]:
        try:
            prepare_backbone(lm, way)
            walk = _walk(lm, way, make_latent, head)
        except torch.OutOfMemoryError:
            raise
        except (LatentTTSError, *FAILURES) as error:
            problem = f"it {_failure(error)}"
        else:
            wanted = _reference(lm, walk, with_logits=head is not None)
            distance = _distance(walk.hidden_RPD, wanted.hidden_RPD, typical=wanted.typical)
            if distance <= wanted.hidden_limit:
                prepare_backbone(lm, way)
                return replace(way, reason=reason or ""), walk, wanted
            problem = f"hidden states are off by {distance:.1g} of their largest value"
        reason = reason or f"shared-prefix attention: {problem}"
    raise UsageError(
        f"{type(lm).__name__} cannot be run latent by latent: with transformers' own attention and cache {problem}"
    )


def _failure(error: Exception) -> str:
    """What an exception says, in part of a sentence."""
    return f"fails with {type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"


def _walk(
    lm: PreTrainedModel, computation: Computation, make_latent: Callable[[Tensor], Tensor], head: nn.Module | None
) -> _Walk:
    """Two latents and two tokens in a state; the second rollout of each question feeds smaller latents."""
    embed, tokens = lm.get_input_embeddings(), _known_tokens(lm)
    ids_QL, lengths_Q = pad_prompts([[token % tokens for token in prompt] for prompt in PROMPTS], lm.device)
    state = open_state(cast(PreTrainedModel, lm.base_model), computation, ROLLOUTS, FED_VECTORS)
    questions = torch.arange(len(PROMPTS), device=lm.device)
    hidden_RD = state.prefill(embed(ids_QL), lengths_Q)[questions, lengths_Q - 1].repeat_interleave(ROLLOUTS, 0)
    scale_R1 = torch.tensor([1.0, 0.75], device=lm.device, dtype=lm.dtype).repeat(len(PROMPTS))[:, None]
    hidden, fed = [hidden_RD[:, None]], [(make_latent(hidden_RD) * scale_R1)[:, None]]
    hidden.append(state.append(fed[-1]))
    last = embed(torch.full((len(scale_R1), 1), 1 % tokens, device=lm.device))
    fed += [make_latent(hidden[-1][:, 0])[:, None], last]
    hidden.append(state.append(torch.cat(fed[-2:], 1)))
    token_R = torch.zeros(len(scale_R1), dtype=torch.long, device=lm.device)
    if head is not None:
        token_R = choose(head, hidden[-1][:, -1]).token_R.clamp(max=tokens - 1)
    fed.append(embed(token_R)[:, None])
    hidden.append(state.append(fed[-1]))
    state.rewind(FED_VECTORS - 1)
    rows = torch.tensor(SWAPPED_ROLLOUTS, device=lm.device)
    hidden.append(state.fork(rows).append(fed[-1][rows])[rows])
    return _Walk(torch.cat(fed, 1), torch.cat(hidden, 1))


def _reference(lm: PreTrainedModel, walk: _Walk, *, with_logits: bool) -> _Reference:
    """Run the vectors of a walk through the model itself.

    Raises:
        UsageError: it fails.
        RunError: its values are not finite.
    """
    half = lm.dtype.itemsize < 4
    passes = []
    for kind in ("eager", "sdpa") if half else (None,):
        try:
            use_own_attention(lm, kind)
        except ValueError:  # the model has only one of the two
            continue
        try:
            passes.append(_whole_sequences(lm, walk, with_logits=with_logits))
        except FAILURES as error:
            raise UsageError(f"{type(lm).__name__}: its own forward pass {_failure(error)}") from error
    (hidden_RPD, logits_RAV), (other_RPD, other_RAV) = passes[0], passes[-1]
    if not hidden_RPD.isfinite().all():
        dtype = str(lm.dtype).removeprefix("torch.")
        weights = (name for name, value in lm.named_parameters() if not value.isfinite().all())
        why = f": its {name} is not" if (name := next(weights, None)) else ""
        raise RunError(f"the model's own forward pass gives values that are not finite in {dtype}{why}")
    experts = any(getattr(lm.config.get_text_config(), name, None) for name in EXPERTS)
    wanted = _Reference(hidden_RPD, logits_RAV, LATENTS, LOG_PROBABILITIES, typical=half and experts)
    if half:
        rounding = HALF_ROUNDINGS * torch.finfo(lm.dtype).eps
        wanted.hidden_limit = max(HALF * _distance(hidden_RPD, other_RPD, typical=wanted.typical), rounding)
        if logits_RAV is not None and other_RAV is not None:
            apart = _typical_or_largest(logits_RAV.log_softmax(-1) - other_RAV.log_softmax(-1), typical=wanted.typical)
            wanted.logits_limit = max(HALF * apart, rounding * max(1.0, float(logits_RAV.abs().max())))
    return wanted


def _whole_sequences(lm: PreTrainedModel, walk: _Walk, *, with_logits: bool) -> tuple[Tensor, Tensor | None]:
    embed, tokens, seen = lm.get_input_embeddings(), _known_tokens(lm), []
    hook = lm.base_model.register_forward_hook(lambda _module, _args, out: seen.append(out.last_hidden_state))
    hidden, logits = [], []
    try:
        for question, prompt in enumerate(PROMPTS):
            ids = torch.tensor([[token % tokens for token in prompt]] * ROLLOUTS, device=lm.device)
            fed_NSD = walk.fed_RSD[question * ROLLOUTS : (question + 1) * ROLLOUTS]
            vectors_NSD = torch.cat([embed(ids), fed_NSD], 1)
            if with_logits:
                logits.append(lm(inputs_embeds=vectors_NSD, use_cache=False).logits[:, -2:].float())
            if len(seen) == question:  # some causal LMs call their body's parts
                lm.base_model(inputs_embeds=vectors_NSD, use_cache=False)
            hidden.append(seen[question][:, len(prompt) - 1 :])
    finally:
        hook.remove()
    hidden_RPD = torch.cat([torch.cat([part, part[:, -1:]], 1) for part in hidden])
    return hidden_RPD, torch.cat(logits) if with_logits else None


def _known_tokens(lm: PreTrainedModel) -> int:
    return cast(nn.Embedding, lm.get_input_embeddings()).weight.shape[0]


def _logits_problem(computation: Computation, reasoner: Reasoner, hidden_RPD: Tensor, wanted: _Reference) -> str | None:
    """What is wrong with the tokens that the engine chooses from hidden states, if anything."""
    assert wanted.logits_RAV is not None
    try:
        head = head_of(Reasoner(reasoner.lm, reasoner.next_latent, computation=computation))
        # the tokens of the engine's passes over the last two of the fed vectors
        choices = [choose(head, hidden_RPD[:, place]) for place in (FED_VECTORS - 1, FED_VECTORS)]
    except torch.OutOfMemoryError:
        raise
    except FAILURES as error:
        return f"{type(error).__name__}: {error}"
    logprobs_RAV = wanted.logits_RAV.log_softmax(-1)
    token_RA = torch.stack([choice.token_R for choice in choices], 1)
    own_RA = logprobs_RAV.gather(2, token_RA[..., None])[..., 0]
    apart_RA = torch.stack([choice.logprob_R for choice in choices], 1) - own_RA
    behind_RA = logprobs_RAV.amax(2) - own_RA
    worst = _typical_or_largest(torch.stack([apart_RA, behind_RA]), typical=wanted.typical)
    return None if worst <= wanted.logits_limit else f"log-probabilities are off by {worst:.1g}"


def _distance(ours: Tensor, theirs: Tensor, *, typical: bool) -> float:
    """Of hidden states, in units of the largest value."""
    return _typical_or_largest(ours.double() - theirs.double(), typical=typical) / float(
        theirs.abs().max().clamp(min=1e-30)
    )


def _typical_or_largest(differences: Tensor, *, typical: bool) -> float:
    """The largest difference, infinite if one is not finite; the median if `typical`.

    Mixtures of experts in half precision take the median: where two experts are nearly equal, rounding decides which
    one a token goes to, and single values differ by any amount.
    """
    size = differences.double().abs().nan_to_num(nan=float("inf"))
    return float(size.median() if typical else size.max())


@dataclass
class _Observed:
    """What a model asks of its attention function.

    Attributes:
        longest: tokens of the longest sequence.
        layers: those that called the function.
        softcap: what they cap scores at; None where they do not.
        causal: whether each mask that the model made is causal in the longest sequence.
    """

    longest: int
    layers: set[int] = field(default_factory=set)
    softcap: float | None = None
    causal: list[bool] = field(default_factory=list)

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **arguments: Any
    ) -> tuple[Tensor, None]:
        """Stand in for an attention function."""
        self.layers.add(int(cast(Any, module).layer_idx))
        self.softcap = self.softcap if arguments.get("softcap") is None else arguments["softcap"]
        return value.repeat_interleave(query.shape[1] // value.shape[1], 1).transpose(1, 2), None

    def mask(self, *, mask_function: Callable, use_vmap: bool = False, **arguments: Any) -> None:
        """Count what the first and the last token of the longest sequence attend to."""
        last, shown = self.longest - 1, {"batch_size": 1, "q_length": 1, "allow_is_causal_skip": False}
        for query, visible in ((0, 1), (last, self.longest)):
            mask = sdpa_mask(
                **cast(Any, shown), kv_length=self.longest, q_offset=query, mask_function=mask_function,
                use_vmap=use_vmap, device=arguments.get("device", "cpu"),
            )  # fmt: skip
            assert mask is not None
            self.causal.append(int(mask.sum()) == visible)


def find_attention_problem(lm: PreTrainedModel, longest: int) -> str | None:
    """Why shared-prefix attention cannot be right, as far as can be seen without computing; None if nothing is seen."""
    layers = int(lm.config.get_text_config(decoder=True).num_hidden_layers)
    observed = _Observed(max(longest, max(map(len, PROMPTS)) + FED_VECTORS))
    AttentionInterface.register(OBSERVED, observed.attend)
    AttentionMaskInterface.register(OBSERVED, observed.mask)
    body, embed = lm.base_model, lm.get_input_embeddings()
    try:
        lm.set_attn_implementation(OBSERVED)
        ids = torch.zeros(1, 2, dtype=torch.long, device=lm.device)
        # with a cache: without one, transformers looks for several sequences in one row
        body(inputs_embeds=embed(ids), past_key_values=DynamicCache(), use_cache=True)
    except torch.OutOfMemoryError:
        raise
    except FAILURES as error:
        return f"shared-prefix attention: it {_failure(error)}"
    finally:
        use_own_attention(lm)
    if len(observed.layers) < layers:
        return f"the attention of {type(body).__name__} cannot be replaced"
    if observed.softcap is not None:
        return f"attention scores are capped at {observed.softcap}"
    if layers and not (observed.causal and all(observed.causal)):
        return f"not all tokens of a sequence of {observed.longest} tokens see all tokens before them"
    return None
