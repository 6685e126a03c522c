"""The slow, obviously correct reference: one row at a time, no cache, the whole sequence is run for every new vector.

Since a sequence is run repeatedly, every position keeps the dropout masks of the forward pass in which the engine would
have processed it. Its own hooks apply them where the models have dropout (GPT-2) or at the end of their branches
(Llama, Qwen).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import tiny
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from latent_tts.engine.rollout import RolloutPlan
from latent_tts.random.draw import Draw
from latent_tts.sampler import Sampler
from latent_tts.types import Forward, Reasoner, Site


@dataclass
class Row:
    """A rollout: its latents (T, D), its answer and figures of the answer, as in `Rollouts`."""

    latents_TD: Tensor
    answer_ids: list[int]
    logprob: float
    margin: float
    stopped: bool


class Oracle:
    """Runs single rollouts on a copy of a reasoner's model, with the attention of transformers."""

    def __init__(self, reasoner: Reasoner, plan: RolloutPlan, *, masked: bool = True) -> None:
        self.lm, self.next_latent, self.plan = tiny.plain_copy(reasoner.lm), reasoner.next_latent, plan
        self.latent_spread = reasoner.latent_spread
        self.embed = self.lm.get_input_embeddings()
        self.places = _places(self.lm) if masked else {}
        self.factors: dict[tuple[Site, int], list[Tensor]] = {}
        for place, module in self.places.items():
            if module is not None:
                module.register_forward_hook(lambda _module, _args, out, place=place: self._masked(place, out))

    def _masked(self, place: tuple[Site, int], out: Tensor | tuple) -> Tensor | tuple:
        if isinstance(out, tuple):
            return (out[0] * self._factors(place), *out[1:])
        return out * self._factors(place)

    def _factors(self, place: tuple[Site, int]) -> Tensor:
        return torch.cat(self.factors[place]).to(self.lm.dtype)

    @torch.inference_mode()
    def roll(
        self,
        prompt: list[int],
        sampler: Sampler,
        *,
        question_id: str,
        rollout: int,
        seed: int = 0,
        donor_TD: Tensor | None = None,
        branches: Sequence[tuple[int, Draw]] = (),
    ) -> Row:
        """One rollout of one prompt.

        `branches` are (number of latents, draw): after that many latents, the draw replaces the random numbers.
        """
        steps, begun = self.plan.latents, len(self.plan.forced_ids)
        end_SD = self.embed(torch.tensor(self.plan.thinking_end_ids + self.plan.forced_ids, dtype=torch.long))
        prompt_LD = self.embed(torch.tensor(prompt))
        draw = Draw.of(seed, [question_id], torch.tensor([[rollout]]), prompt_LD.shape[1])
        draw = next((other for at, other in branches if at == 0), draw)
        draw.history_RTD = torch.zeros(1, steps, prompt_LD.shape[1], dtype=self.lm.dtype)
        draw.donor_RTD = None if donor_TD is None else donor_TD[None]

        self.fed_SD = prompt_LD[:0]
        self.factors = {place: [] for place in self.places}
        if steps == 0:
            self._feed(prompt_LD, Forward("prompt", 0, len(prompt)), sampler, draw)
            self._feed(end_SD, Forward("answer", begun, len(end_SD)), sampler, draw)
        else:
            self._feed(prompt_LD[:-1], Forward("prompt", 0, len(prompt) - 1), sampler, draw)
            self._feed(prompt_LD[-1:], Forward("thoughts", 0, 1), sampler, draw)
        for step in range(steps):
            hidden_D, logits_V = self._run()
            if int(logits_V.argmax()) == self.plan.stop_id:
                # in the engine this pass has a place for the last latent of rows at their limit
                no_latent = torch.zeros_like(prompt_LD[:1])
                forward = Forward("answer", steps + begun, 1 + len(end_SD))
                self._feed(torch.cat([no_latent, end_SD]), forward, sampler, draw, leave_out=1)
                return self._answer(draw.history_RTD[0, :step], sampler, draw)
            if self.latent_spread is not None:
                draw.spread_RD = self.latent_spread(hidden_D[None])
            latent_D = sampler.latent(self.next_latent(hidden_D[None]), draw, step)[0]
            draw.history_RTD[0, step] = latent_D
            for at, other in branches:
                if step + 1 == at:
                    other.history_RTD, other.donor_RTD = draw.history_RTD, draw.donor_RTD
                    draw = other
            if step + 1 < steps:
                self._feed(latent_D[None], Forward("thoughts", step + 1, 1), sampler, draw)
            else:
                last_SD = torch.cat([latent_D[None], end_SD])
                self._feed(last_SD, Forward("answer", steps + begun, len(last_SD)), sampler, draw)
        return self._answer(draw.history_RTD[0], sampler, draw)

    def _feed(self, vectors_SD: Tensor, forward: Forward, sampler: Sampler, draw: Draw, *, leave_out: int = 0) -> None:
        """Append vectors, except the first `leave_out`, to the sequence, with the masks of their forward pass."""
        if forward.tokens == 0:
            return
        self.fed_SD = torch.cat([self.fed_SD, vectors_SD[leave_out:]])
        for (site, layer), factors in self.factors.items():
            new = sampler.factors(site, layer, draw, forward)
            new_SD = torch.ones_like(vectors_SD) if new is None else new[0].expand_as(vectors_SD)
            factors.append(new_SD[leave_out:])

    def _run(self) -> tuple[Tensor, Tensor]:
        """Run the whole sequence; returns final hidden state (D) and logits (V) of the last position."""
        vectors_SD = self.fed_SD.clone()  # some models scale what they are given in place
        if self.places and self.places["embedding", 0] is None:
            vectors_SD = vectors_SD * self._factors(("embedding", 0))
        out = self.lm(inputs_embeds=vectors_SD[None], output_hidden_states=True, use_cache=False)
        return out.hidden_states[-1][0, -1], out.logits[0, -1]

    def _answer(self, latents_TD: Tensor, sampler: Sampler, draw: Draw) -> Row:
        plan = self.plan
        row = Row(latents_TD, list(plan.forced_ids), 0.0, float("inf"), False)
        for position in range(len(plan.forced_ids), plan.max_answer_tokens + (plan.eos_id is not None)):
            _, logits_V = self._run()
            token = int(sampler.token(logits_V[None], draw, plan.latents + position))
            row.stopped = token in plan.eos_ids
            if row.stopped or position < plan.max_answer_tokens:
                highest, second = logits_V.topk(2).values.tolist()
                row.logprob += float(logits_V.log_softmax(-1)[token])
                row.margin = min(row.margin, highest - second)
            if row.stopped or position == plan.max_answer_tokens:
                break
            row.answer_ids.append(token)
            forward = Forward("answer", plan.latents + position + 1, 1)
            self._feed(self.embed(torch.tensor([token])), forward, sampler, draw)
        return row


def _places(lm: PreTrainedModel) -> dict[tuple[Site, int], nn.Module | None]:
    """The modules whose outputs are masked; None if the model has no such module and its input is masked."""
    places: dict[tuple[Site, int], nn.Module | None] = {}
    if hasattr(lm, "transformer"):  # GPT-2
        places["embedding", 0] = lm.transformer.drop
        for layer, block in enumerate(lm.transformer.h):
            attention = getattr(block.attn, "attention", block.attn)  # GPT-Neo's
            places["attention", layer], places["ffn", layer] = attention.resid_dropout, block.mlp.dropout
        return places
    places["embedding", 0] = None
    if hasattr(lm, "gpt_neox"):
        for layer, block in enumerate(lm.gpt_neox.layers):
            places["attention", layer], places["ffn", layer] = block.attention.dense, block.mlp.dense_4h_to_h
        return places
    for layer, block in enumerate(lm.model.layers):
        # a mixture of experts ends in none of its layers
        places["attention", layer], places["ffn", layer] = (
            block.self_attn.o_proj,
            getattr(block.mlp, "down_proj", block.mlp) if hasattr(block, "mlp") else block.feed_forward,
        )
    return places


@torch.inference_mode()
def plain_scores(family, prompt, latents_TD, shift=0):
    """Step scores of one row, by the attention of transformers over the whole sequence."""
    model = tiny.reward_model(family)
    backbone = tiny.plain_copy(model.backbone)
    embeddings = torch.cat([backbone.get_input_embeddings()(torch.tensor(prompt)), latents_TD])[None]
    positions = shift + torch.arange(embeddings.shape[1])[None]
    hidden = backbone(inputs_embeds=embeddings, position_ids=positions, use_cache=False).last_hidden_state
    return model.classifier(hidden[0, len(prompt) :])


def pccot_rollout(lm, projection, prompt, latent_id, end_ids, latents, sweeps, answer, eos_id, *, known_first=False):
    """Latents and greedy ids as `PCCoTGPT2LMHeadModel.forward` computes them; every pass runs the whole sequence.

    With `known_first`, which that code does not have, the first sweep begins with h_1.
    """
    embed = lm.get_input_embeddings()
    prompt_LD, boundary = embed(torch.tensor(prompt)), len(prompt)

    def hidden(vectors_SD):
        return lm.base_model(inputs_embeds=vectors_SD[None]).last_hidden_state[0]

    begin_TD = embed(torch.tensor([latent_id] * latents))
    if known_first:
        begin_TD = torch.cat([projection(hidden(prompt_LD)[-1:]), begin_TD[1:]])
    first = hidden(torch.cat([prompt_LD, begin_TD]))
    inputs_TD = projection(first[boundary - 1 : boundary + latents - 1])
    for _ in range(sweeps):
        fed_TD = inputs_TD
        outputs = hidden(torch.cat([prompt_LD, fed_TD]))[boundary:]
        inputs_TD = torch.cat([fed_TD[:1], projection(outputs)[:-1]])
    ids = []
    while len(ids) < answer:
        logits = lm.lm_head(hidden(torch.cat([prompt_LD, fed_TD, embed(torch.tensor(end_ids + ids))]))[-1])
        token = int(logits.argmax())
        if token == eos_id:
            break
        ids.append(token)
    return fed_TD, ids
