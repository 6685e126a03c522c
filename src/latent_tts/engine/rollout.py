"""The engine: Q prompts in, N rollouts of each out. It knows tokens and vectors, no text.

One rollout is: the prompt; T latents, each the model's last hidden state fed back as the next input; the
end-of-thinking tokens; an answer decoded greedily. A question's prompt is run once for its N rollouts unless the
sampler masks it; the last prompt token belongs to each rollout if the sampler masks thoughts, because its pass makes
h_1. The LM head runs only where an answer token is chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from latent_tts.engine.attention import AttentionState, use_shared_prefix_attention
from latent_tts.engine.sites import MaskedSites
from latent_tts.rng import Draw
from latent_tts.types import Forward, Reasoner, Sampler

COMPACT_BELOW = 0.75  # a batch is packed anew once it would shrink to this share of its rows


@dataclass(frozen=True)
class Plan:
    """What a rollout of a model consists of.

    Attributes:
        latents: T.
        thinking_end_ids: tokens forced after the last latent.
        eos_id: the token that ends an answer.
        max_answer_tokens: most tokens of an answer, the final eos not counted.
    """

    latents: int
    thinking_end_ids: list[int]
    eos_id: int
    max_answer_tokens: int


@dataclass
class Rollouts:
    """R finished rollouts, question-major.

    Attributes:
        latents_RTD: the vectors fed back, float32 on the CPU.
        answer_ids: per row, the ids after the end of thinking, a final eos dropped; all empty if none was decoded.
        answer_logprob_R: summed log-probability of the answer's tokens, its eos included.
        answer_margin_R: smallest gap between the two highest logits of an answer position.
        stopped_R: whether the row ended by eos (otherwise by the token limit).
    """

    latents_RTD: Tensor
    answer_ids: list[list[int]]
    answer_logprob_R: Tensor
    answer_margin_R: Tensor
    stopped_R: Tensor


class Engine:
    """Runs rollouts of one loaded model."""

    def __init__(self, reasoner: Reasoner, plan: Plan) -> None:
        self.reasoner, self.plan = reasoner, plan
        self.lm = reasoner.lm
        use_shared_prefix_attention(self.lm)
        self.width = int(self.lm.config.get_text_config().hidden_size)
        self.blocks = int(self.lm.config.get_text_config().num_hidden_layers)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.lm.device

    @torch.inference_mode()
    def roll(
        self, prompts: list[list[int]], draw: Draw, sampler: Sampler, *, donor_RTD: Tensor | None = None
    ) -> Rollouts:
        """Draw N rollouts of each of Q prompts.

        Args:
            prompts: Q lists of token ids, none empty.
            draw: the random numbers of R = Q*N rows, question-major.
            sampler: what makes the rows differ.
            donor_RTD: another question's latents for each row, if the sampler needs them.

        Returns:
            The R rollouts.
        """
        rows = draw.rollouts_R.shape[0]
        draw.donor_RTD = donor_RTD
        with MaskedSites(self.lm, sampler) as sites:
            run = _Run(self, prompts, draw, sampler, sites, rows // len(prompts))
            latents_RTD, ids_R1 = run.think()
            return run.answer(latents_RTD, ids_R1)

    @torch.inference_mode()
    def think(
        self, prompts: list[list[int]], draw: Draw, sampler: Sampler, *, donor_RTD: Tensor | None = None
    ) -> Rollouts:
        """The same rollouts as `roll` draws, without their answers; h_T is made, but not run."""
        rows = draw.rollouts_R.shape[0]
        draw.donor_RTD = donor_RTD
        with MaskedSites(self.lm, sampler) as sites:
            latents_RTD, _ = _Run(self, prompts, draw, sampler, sites, rows // len(prompts)).think()
        nothing_R = torch.full((rows,), float("nan"))
        return Rollouts(
            latents_RTD.float().cpu(), [[] for _ in range(rows)], nothing_R, nothing_R, torch.zeros(rows).bool()
        )


class _Run:
    """The state of one call of `Engine.roll`."""

    def __init__(
        self, engine: Engine, prompts: list[list[int]], draw: Draw, sampler: Sampler, sites: MaskedSites, rollouts: int
    ) -> None:
        self.engine, self.plan, self.lm = engine, engine.plan, engine.lm
        self.draw, self.sampler, self.sites = draw, sampler, sites
        self.embed: Callable[[Tensor], Tensor] = self.lm.get_input_embeddings()
        device = engine.device
        own_prompt = "prompt" in sampler.random_phases
        # The last prompt token's pass makes h_1: it is the rollout's own if that pass is random.
        own_last = self.plan.latents > 0 and (own_prompt or "thoughts" in sampler.random_phases)
        copies = rollouts if own_prompt else 1
        shared = [prompt[:-1] if own_last else prompt for prompt in prompts for _ in range(copies)]
        lengths = torch.tensor([len(ids) for ids in shared], device=device)
        suffix = self.plan.latents + own_last + len(self.plan.thinking_end_ids) + self.plan.max_answer_tokens
        self.state = AttentionState(lengths, rollouts // copies, suffix)
        last = self._prefill(shared, lengths)
        if own_last:
            ids = torch.tensor([prompt[-1] for prompt in prompts], device=device)
            self.hidden_RD = None
            self.pending_R1D = self.embed(ids.repeat_interleave(rollouts))[:, None]
        else:
            self.hidden_RD = last.repeat_interleave(self.state.rollouts, 0)
            self.pending_R1D = None
        self.state.reads_prefix = True

    def _prefill(self, prompts: list[list[int]], lengths: Tensor) -> Tensor:
        """Run the prompts, padded on the right; returns the hidden state (rows, D) of each one's last token."""
        longest = int(lengths.max())
        if longest == 0:  # prompts of one token that belongs to the rollouts: every layer's prefix is empty
            return self._empty_prefix(len(prompts))
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(prompt, dtype=torch.long)
        positions = torch.arange(longest, device=lengths.device)[None].expand(len(prompts), -1)
        self.sites.about_to_run(self.draw, Forward("prompt", 0, longest))
        hidden = self._backbone(self.embed(ids.to(lengths.device)), positions)
        return hidden[torch.arange(len(prompts), device=lengths.device), (lengths - 1).clamp(min=0)]

    def _empty_prefix(self, rows: int) -> Tensor:
        config = self.lm.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        weight = next(self.lm.parameters())
        for _ in range(config.num_hidden_layers):
            self.state.prefix.append((weight.new_empty(rows, heads, 0, width), weight.new_empty(rows, heads, 0, width)))
        return weight.new_empty(rows, config.hidden_size)

    def _backbone(self, embeddings: Tensor, positions: Tensor) -> Tensor:
        return self.lm.base_model(
            inputs_embeds=embeddings, position_ids=positions, use_cache=False, state=self.state
        ).last_hidden_state

    def _step(self, embeddings_RSD: Tensor, forward: Forward) -> Tensor:
        """Append tokens to every suffix; returns the last one's hidden state (R, D)."""
        self.sites.about_to_run(self.draw, forward)
        hidden = self._backbone(embeddings_RSD, self.state.positions(forward.tokens))
        self.state.used += forward.tokens
        return hidden[:, -1]

    def think(self) -> tuple[Tensor, Tensor]:
        """The T latents (R, T, D) of every row, and the embeddings (R, S, D) that are fed next."""
        plan = self.plan
        rows, width = self.draw.rollouts_R.shape[0], self.engine.width
        latents_RTD = torch.empty(rows, plan.latents, width, dtype=self.lm.dtype, device=self.engine.device)
        self.draw.history_RTD = latents_RTD
        pending = self.pending_R1D
        for step in range(plan.latents):
            if pending is not None:
                self.hidden_RD = self._step(pending, Forward("thoughts", step, 1))
            assert self.hidden_RD is not None
            latents_RTD[:, step] = self.sampler.latent(
                self.engine.reasoner.next_latent(self.hidden_RD), self.draw, step
            )
            pending = latents_RTD[:, step, None]
        end = torch.tensor(plan.thinking_end_ids, dtype=torch.long, device=self.engine.device)
        end_RSD = self.embed(end).expand(rows, -1, -1)
        return latents_RTD, end_RSD if pending is None else torch.cat([pending, end_RSD], dim=1)

    def answer(self, latents_RTD: Tensor, embeddings_RSD: Tensor) -> Rollouts:
        """Decode the answers; rows that finish leave the batch."""
        plan, device, head = self.plan, self.engine.device, self.lm.get_output_embeddings()
        assert head is not None
        rows = latents_RTD.shape[0]
        ids_RA = torch.full((rows, plan.max_answer_tokens), -1, device=device)
        lengths_R = torch.zeros(rows, dtype=torch.long, device=device)
        logprob_R = torch.zeros(rows, device=device)
        margin_R = torch.full((rows,), float("inf"), device=device)
        stopped_R = torch.zeros(rows, dtype=torch.bool, device=device)
        here = torch.arange(rows, device=device)  # the original number of each row in the batch
        alive = torch.ones(rows, dtype=torch.bool, device=device)
        for position in range(plan.max_answer_tokens + 1):
            forward = Forward("answer", plan.latents + position, embeddings_RSD.shape[1])
            logits = head(self._step(embeddings_RSD, forward)).float()
            token = self.sampler.token(logits, self.draw, plan.latents + position)
            top = logits.topk(2, dim=-1).values
            chosen = logits.gather(-1, token[:, None])[:, 0] - logits.logsumexp(-1)
            ended = token == plan.eos_id
            if position == plan.max_answer_tokens:  # only an eos may still come
                counts = alive & ended
            else:
                counts = alive
                going = alive & ~ended
                ids_RA[here[going], position] = token[going]
                lengths_R[here[going]] += 1
            logprob_R[here[counts]] += chosen[counts]
            margin_R[here[counts]] = torch.minimum(margin_R[here[counts]], (top[:, 0] - top[:, 1])[counts])
            stopped_R[here[alive & ended]] = True
            alive = alive & ~ended
            if not alive.any() or position == plan.max_answer_tokens:
                break
            token, here, alive = self._leave(token, here, alive)
            embeddings_RSD = self.embed(token)[:, None]
        answers = [ids[:length] for ids, length in zip(ids_RA.tolist(), lengths_R.tolist(), strict=True)]
        return Rollouts(latents_RTD.float().cpu(), answers, logprob_R.cpu(), margin_R.cpu(), stopped_R.cpu())

    def _leave(self, token: Tensor, here: Tensor, alive: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Drop finished rows once enough have finished; the rest stays a questions x rollouts grid."""
        alive_QN = alive.view(-1, self.state.rollouts)
        left_Q = alive_QN.sum(1)
        questions = left_Q.nonzero()[:, 0]
        most = int(left_Q.max())
        if questions.shape[0] * most > COMPACT_BELOW * alive.shape[0]:
            return token, here, alive
        # within a question the rows still alive first; finished ones fill up the shorter questions
        order = alive_QN[questions].int().argsort(dim=1, descending=True, stable=True)[:, :most]
        rows = (questions[:, None] * self.state.rollouts + order).flatten()
        self.state.select(questions, rows)
        self.draw = self.draw.rows(rows)
        return token[rows], here[rows], alive[rows]
