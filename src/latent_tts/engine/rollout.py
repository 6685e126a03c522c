"""The engine: Q prompts in, N rollouts of each out. It knows tokens and vectors, no text.

One rollout is: the prompt; T latents, each made from the model's last hidden state and fed back as the next input; the
end-of-thinking tokens; an answer, whose tokens the sampler chooses. A question's prompt is run once for its N rollouts
unless the sampler masks it; the last prompt token belongs to each rollout if the sampler masks thoughts, because its
pass makes h_1. The LM head runs only where a token is chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from latent_tts.engine import backbone
from latent_tts.engine.attention import AttentionState
from latent_tts.engine.head import choose
from latent_tts.engine.sites import MaskedSites
from latent_tts.engine.sweeps import Sweeps
from latent_tts.random.draw import Draw
from latent_tts.sampler import Sampler
from latent_tts.schedule import Schedule
from latent_tts.schedule.sequential import Sequential
from latent_tts.types import Forward, Reasoner

SEQUENTIAL = Sequential()
PROMPT_TOKENS_AT_ONCE = {"cpu": 1 << 11, "cuda": 1 << 20}  # padding counts: see docs/tuning.md
PROMPT_PADDING = {"cpu": 1 << 7, "cuda": 1 << 14}  # tokens of it that cost as much as a pass of its own
COMPACT_BELOW = 0.75  # a batch is packed anew once it would shrink to this share of its rows


@dataclass(frozen=True)
class Plan:
    """What a rollout of a model consists of.

    Attributes:
        latents: T, or the most of them where rows stop by a token.
        thinking_end_ids: tokens forced after the last latent.
        eos_id: the token that ends an answer; None: no token does, all have `max_answer_tokens`.
        max_answer_tokens: most tokens of an answer, the final eos not counted.
        stop_id: a row stops thinking where this is the most probable next token; None for a fixed T.
        latent_id: the token that stands for a latent, where a schedule begins with it.
        schedule: the order in which latents are made.
        forced_ids: what every answer begins with, fewer than `max_answer_tokens`; they take no passes of their own.
    """

    latents: int
    thinking_end_ids: list[int]
    eos_id: int | None
    max_answer_tokens: int
    stop_id: int | None = None
    latent_id: int | None = None
    schedule: Schedule = SEQUENTIAL
    forced_ids: list[int] = field(default_factory=list)


@dataclass
class Rollouts:
    """R finished rollouts, question-major.

    Attributes:
        latents_RTD: the vectors fed back, float32 on the CPU; zeros from a row's own number of steps on.
        steps_R: how many latents each row has.
        answer_ids: per row, the ids after the end of thinking, a final eos dropped; all empty if none was decoded.
        answer_logprob_R: summed log-probability of the answer's tokens, its eos included and forced ones left out: the
            model's own, at temperature 1 and over the whole vocabulary, however the tokens were chosen.
        answer_margin_R: smallest gap between the two highest logits of an answer position.
        stopped_R: whether the row ended by eos (otherwise by the token limit).
    """

    latents_RTD: Tensor
    steps_R: Tensor
    answer_ids: list[list[int]]
    answer_logprob_R: Tensor
    answer_margin_R: Tensor
    stopped_R: Tensor


class Engine:
    """Runs rollouts of one loaded model."""

    def __init__(self, reasoner: Reasoner, plan: Plan) -> None:
        self.reasoner, self.plan = reasoner, plan
        self.lm = reasoner.lm
        backbone.prepare(self.lm)
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
        draw.donor_RTD = donor_RTD
        with MaskedSites(self.lm, sampler) as sites:
            return Thinking.start(self, prompts, draw, sites).think().answer()

    @torch.inference_mode()
    def think(
        self, prompts: list[list[int]], draw: Draw, sampler: Sampler, *, donor_RTD: Tensor | None = None
    ) -> Rollouts:
        """The same rollouts as `roll` draws, without their answers; h_T is made, but not run."""
        draw.donor_RTD = donor_RTD
        with MaskedSites(self.lm, sampler) as sites:
            thinking = Thinking.start(self, prompts, draw, sites).think()
        rows = len(thinking.steps_R)
        nothing_R = torch.full((rows,), float("nan"))
        return Rollouts(
            latents_RTD=thinking.latents_RTD.float().cpu(),
            steps_R=thinking.steps_R.cpu(),
            answer_ids=[[] for _ in range(rows)],
            answer_logprob_R=nothing_R,
            answer_margin_R=nothing_R,
            stopped_R=torch.zeros(rows, dtype=torch.bool),
        )


class Thinking(Sweeps):
    """R rollouts in the making: `start` runs the prompts, `think` makes the latents, `answer` decodes.

    Searches and labels `fork` it between two latents. Everything happens under `torch.inference_mode` and inside the
    `MaskedSites` of the sampler.

    Attributes:
        state: keys and values.
        draw: random numbers of the rows.
        latents_RTD: the latents so far, zeros elsewhere.
        step: how many latents have been made (by the rows that still think).
        thinking_R: rows that have not stopped by the token; None for a fixed T.
        steps_R: latents of each row.
    """

    def __init__(
        self,
        engine: Engine,
        sites: MaskedSites,
        state: AttentionState,
        draw: Draw,
        latents_RTD: Tensor,
        steps_R: Tensor,
        step: int,
        thinking_R: Tensor | None,
        own_last: bool,
    ) -> None:
        self.engine, self.plan, self.lm, self.sites = engine, engine.plan, engine.lm, sites
        self.embed: Callable[[Tensor], Tensor] = self.lm.get_input_embeddings()
        self.state, self.draw, self.latents_RTD, self.steps_R = state, draw, latents_RTD, steps_R
        self.step, self.thinking_R, self._own_last = step, thinking_R, own_last
        # what is not run yet: the last latent; after parallel sweeps also those before it that may have changed
        self._pending_R1D: Tensor | None = latents_RTD[:, step - 1, None] if step else None
        self._unsettled = range(0)  # what comes before the last of the pending ones: thoughts that make these latents
        self._hidden_RD: Tensor | None = None
        draw.history_RTD = latents_RTD

    @classmethod
    def start(cls, engine: Engine, prompts: list[list[int]], draw: Draw, sites: MaskedSites) -> Thinking:
        """Run Q prompts for R = Q*N rows.

        Args:
            engine: the model.
            prompts: Q lists of token ids, none empty.
            draw: random numbers of the R rows, question-major.
            sites: the sampler's hooks.
        """
        plan, device, phases = engine.plan, engine.device, sites.sampler.random_phases
        rows = draw.rollouts_R.shape[0]
        rollouts = rows // len(prompts)
        own_prompt = "prompt" in phases
        # The last prompt token's pass makes h_1: it is the rollout's own if that pass is random.
        own_last = plan.latents > 0 and (own_prompt or "thoughts" in phases)
        copies = rollouts if own_prompt else 1
        shared = [prompt[:-1] if own_last else prompt for prompt in prompts for _ in range(copies)]
        ids_QL, lengths = backbone.padded(shared, device)
        capacity = plan.latents + own_last + len(plan.thinking_end_ids) + plan.max_answer_tokens
        state = AttentionState(lengths, rollouts // copies, capacity)
        thinking_R = None
        if plan.stop_id is not None:
            thinking_R = torch.ones(rows, dtype=torch.bool, device=device)
            state.valid_RS = torch.ones(rows, capacity, dtype=torch.bool, device=device)
        latents_RTD = torch.zeros(rows, plan.latents, engine.width, dtype=engine.lm.dtype, device=device)
        steps_R = torch.full((rows,), 0 if thinking_R is not None else plan.latents, device=device)
        self = cls(engine, sites, state, draw, latents_RTD, steps_R, 0, thinking_R, own_last)
        last_QD = self._prefill(ids_QL, lengths)
        if own_last:
            ids = torch.tensor([prompt[-1] for prompt in prompts], device=device)
            self._pending_R1D = self.embed(ids.repeat_interleave(rollouts))[:, None]
        else:
            self._hidden_RD = last_QD.repeat_interleave(state.rollouts, 0)
        state.reads_prefix = True
        return self

    def fork(self, rows: Tensor, draw: Draw, step: int | None = None) -> Thinking:
        """Rollouts of their own that share the first latents with some of these; these stay as they are.

        Args:
            rows: which rows, those of a question side by side; a row may come several times. Cheapest if every
                question has equally many: otherwise each row gets a copy of its prefix.
            draw: random numbers of the new rows.
            step: how many latents, at least 1, are shared (of use for rows that have as many); None for all.
        """
        step = self.step if step is None else step
        owners = rows // self.state.rollouts
        questions, counts = owners.unique_consecutive(return_counts=True)
        if bool((counts != counts[0]).any()):
            questions = owners
        state = self.state.fork(questions, rows, step - 1 + self._own_last)
        latents_RTD = torch.zeros_like(self.latents_RTD[:1]).repeat(rows.shape[0], 1, 1)
        latents_RTD[:, :step] = self.latents_RTD[rows, :step]
        thinking_R, steps_R = self.thinking_R, self.steps_R[rows]
        if thinking_R is not None:
            thinking_R, steps_R = steps_R >= step, steps_R.clamp(max=step)
        if self.draw.donor_RTD is not None:
            draw.donor_RTD = self.draw.donor_RTD[rows]
        return Thinking(self.engine, self.sites, state, draw, latents_RTD, steps_R, step, thinking_R, self._own_last)

    def think(self) -> Thinking:
        """Make all latents that are still missing."""
        self.plan.schedule.think(self)
        return self

    @property
    def unfinished(self) -> bool:
        """Whether a row still lacks latents."""
        return self.step < self.plan.latents and (self.thinking_R is None or bool(self.thinking_R.any()))

    def advance(self) -> Tensor:
        """Make one more latent (R, D) of every row that still thinks (zeros elsewhere)."""
        step = self.step
        if self._pending_R1D is not None:
            self._hidden_RD = self._feed(self._pending_R1D, Forward("thoughts", step, 1), self.thinking_R)
        assert self._hidden_RD is not None
        latent_RD = self._latent(self._hidden_RD, step)
        if self.thinking_R is not None:
            head = self.lm.get_output_embeddings()
            assert head is not None
            self.thinking_R = self.thinking_R & (choose(head, self._hidden_RD).token_R != self.plan.stop_id)
            self.steps_R = self.steps_R + self.thinking_R
            latent_RD = latent_RD * self.thinking_R[:, None]
        self.latents_RTD[:, step] = latent_RD
        self._pending_R1D = self.latents_RTD[:, step, None]
        self.step += 1
        return self.latents_RTD[:, step]

    def _prefill(self, ids_QL: Tensor, lengths: Tensor) -> Tensor:
        """Run padded prompts; returns the hidden state (rows, D) of each one's last token."""
        if ids_QL.shape[1] == 0:  # prompts of one token that belongs to the rollouts: every layer's prefix is empty
            return self._empty_prefix(ids_QL.shape[0])
        last = []
        for piece, longest in _pieces(lengths.tolist(), lengths.device.type):
            embeddings, ends = self.embed(ids_QL[piece, :longest]), (lengths[piece] - 1).clamp(min=0)
            positions = torch.arange(longest, device=ends.device).expand(len(ends), -1)
            self.sites.about_to_run(self.draw.rows(piece), Forward("prompt", 0, longest))
            hidden = backbone.run(self.lm.base_model, embeddings, positions, self.state)
            last.append(hidden[torch.arange(len(ends), device=ends.device), ends])
        return torch.cat(last)

    def _empty_prefix(self, rows: int) -> Tensor:
        config = self.lm.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        weight = next(self.lm.parameters())
        for _ in range(config.num_hidden_layers):
            self.state.prefix.append(
                [(weight.new_empty(rows, heads, 0, width), weight.new_empty(rows, heads, 0, width))]
            )
        return weight.new_empty(rows, config.hidden_size)

    def _feed(self, embeddings_RSD: Tensor, forward: Forward, first_valid_R: Tensor | None = None) -> Tensor:
        """Append tokens to every suffix; returns the last one's hidden state (R, D).

        In rows that `first_valid_R` excludes the first of the tokens leaves no trace. Without any tokens, as where an
        answer follows right after the prompt, that is the prompt's last one.
        """
        if forward.tokens == 0:
            assert self._hidden_RD is not None
            return self._hidden_RD
        if first_valid_R is not None and self.state.valid_RS is not None:
            self.state.valid_RS[:, self.state.used] = first_valid_R
        thoughts = [Forward("thoughts", step, 1) for step in self._unsettled]
        self._unsettled = range(0)
        return self._run(embeddings_RSD, [*thoughts, replace(forward, tokens=forward.tokens - len(thoughts))])[:, -1]

    def answer(self) -> Rollouts:
        """Decode the answers; rows that finish leave the batch. Afterwards `fork` works, and nothing else."""
        plan, device, sampler = self.plan, self.engine.device, self.sites.sampler
        head = self.lm.get_output_embeddings()
        assert head is not None
        rows = self.latents_RTD.shape[0]
        kept = self.state, self.draw
        self.state = replace(self.state, suffix=list(self.state.suffix))
        forced = len(plan.forced_ids)
        end = torch.tensor([*plan.thinking_end_ids, *plan.forced_ids], dtype=torch.long, device=device)
        embeddings_RSD, first_valid_R = self.embed(end).expand(rows, -1, -1), None
        if self._pending_R1D is not None:
            embeddings_RSD = torch.cat([self._pending_R1D, embeddings_RSD], dim=1)
            first_valid_R = self.thinking_R
        ids_RA = torch.full((rows, plan.max_answer_tokens), -1, device=device)
        ids_RA[:, :forced] = end[len(plan.thinking_end_ids) :]
        lengths_R = torch.full((rows,), forced, device=device)
        logprob_R = torch.zeros(rows, device=device)
        margin_R = torch.full((rows,), float("inf"), device=device)
        stopped_R = torch.zeros(rows, dtype=torch.bool, device=device)
        here = torch.arange(rows, device=device)  # the original number of each row in the batch
        alive = torch.ones(rows, dtype=torch.bool, device=device)
        for position in range(forced, plan.max_answer_tokens + (plan.eos_id is not None)):
            forward = Forward("answer", plan.latents + position, embeddings_RSD.shape[1])
            hidden_RD = self._feed(embeddings_RSD, forward, first_valid_R)
            first_valid_R = None
            step = plan.latents + position
            choice = choose(head, hidden_RD, partial(self._token, step) if sampler.chooses_tokens else None)
            token = choice.token_R
            ended = torch.zeros_like(alive) if plan.eos_id is None else token == plan.eos_id
            over = position == plan.max_answer_tokens  # only an eos may still come
            counts, stopping, alive = alive & ended if over else alive, alive & ended, alive & ~ended
            # selecting rows by a mask would make the CPU wait for a GPU each time
            if not over:
                ids_RA[here, position] = torch.where(alive, token, ids_RA[here, position])
                lengths_R[here] += alive
            logprob_R[here] += torch.where(counts, choice.logprob_R, 0.0)
            margin_R[here] = torch.where(counts, torch.minimum(margin_R[here], choice.margin_R), margin_R[here])
            stopped_R[here] |= stopping
            left_Q = alive.view(-1, self.state.rollouts).sum(1).tolist()
            if over or not any(left_Q):
                break
            token, here, alive = self._leave(token, here, alive, left_Q)
            embeddings_RSD = self.embed(token)[:, None]
        self.state, self.draw = kept
        return Rollouts(
            latents_RTD=self.latents_RTD.float().cpu(),
            steps_R=self.steps_R.cpu(),
            answer_ids=[ids[:length] for ids, length in zip(ids_RA.tolist(), lengths_R.tolist(), strict=True)],
            answer_logprob_R=logprob_R.cpu(),
            answer_margin_R=margin_R.cpu(),
            stopped_R=stopped_R.cpu(),
        )

    def _token(self, step: int, logits_CV: Tensor, rows: slice) -> Tensor:
        """The sampler's choice in some of the rows."""
        return self.sites.sampler.token(logits_CV, self.draw.rows(rows), step)

    def _leave(self, token: Tensor, here: Tensor, alive: Tensor, left_Q: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Drop finished rows once enough have finished; the rest stays a questions x rollouts grid."""
        going, most = [question for question, left in enumerate(left_Q) if left], max(left_Q)
        if len(going) * most > COMPACT_BELOW * alive.shape[0]:
            return token, here, alive
        questions = torch.tensor(going, device=alive.device)
        alive_QN = alive.view(-1, self.state.rollouts)[questions]
        # within a question the rows still alive first; finished ones fill up the shorter questions
        order = alive_QN.int().argsort(dim=1, descending=True, stable=True)[:, :most]
        rows = (questions[:, None] * self.state.rollouts + order).flatten()
        self.state = self.state.fork(questions, rows)
        self.draw = self.draw.rows(rows)
        return token[rows], here[rows], alive[rows]


def _pieces(lengths: list[int], device: str) -> Iterator[tuple[slice, int]]:
    """Prompts side by side that run together, and the longest of each piece; best sorted by length."""
    start, total, longest = 0, 0, max(lengths[0], 1)
    for row, length in enumerate(lengths):
        size = (row - start + 1) * max(longest, length)
        if row > start and (size > PROMPT_TOKENS_AT_ONCE[device] or size - total - length > PROMPT_PADDING[device]):
            yield slice(start, row), longest
            start, total, longest = row, 0, 1
        total, longest = total + length, max(longest, length)
    yield slice(start, len(lengths)), longest
