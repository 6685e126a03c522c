"""The engine: Q prompts in, N rollouts of each out. It knows tokens and vectors, no text.

One rollout is: the prompt; T latents, each made from the model's last hidden state and fed back as the next input; the
end-of-thinking tokens; an answer, whose tokens the sampler chooses. A question's prompt is run once for its N rollouts
unless the sampler masks it; the last prompt token belongs to each rollout if the sampler masks thoughts, because its
pass makes h_1. The LM head runs only where a token is chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from latent_tts.engine.backbone import prepare_backbone
from latent_tts.engine.draft import DraftHead
from latent_tts.engine.early_exit import AnswerMovement
from latent_tts.engine.head import Choice, choose, head_of
from latent_tts.engine.prompts import pad_prompts, split_prompts
from latent_tts.engine.sites import SiteHooks
from latent_tts.engine.state import State, open_state
from latent_tts.random.draw import Draw
from latent_tts.sampler import Sampler
from latent_tts.sampler.greedy import Greedy
from latent_tts.schedule import GUESSES_OF_ROLLOUTS, Counts, Schedule, Sweep
from latent_tts.schedule.sequential import Sequential
from latent_tts.types import Forward, Reasoner

SEQUENTIAL = Sequential()
COMPACT_BELOW = 0.75  # a batch is packed anew once it would shrink to this share of its rows


@dataclass(frozen=True)
class RolloutPlan:
    """What a rollout of a model consists of.

    Attributes:
        latents: T, or the most of them where rows stop by a token.
        thinking_end_ids: tokens forced after the last latent.
        eos_id: the token that ends an answer; None: no token does, all have `max_answer_tokens`.
        max_answer_tokens: most tokens of an answer, the final eos not counted.
        stop_id: a row stops thinking where this is the most probable next token; None for a fixed T.
        latent_id: the token that stands for a latent, where a schedule begins with it.
        schedule: the order in which latents are made.
        forced_ids: what every answer begins with, fewer than `max_answer_tokens`; they run in the pass of the
            end-of-thinking tokens.
        other_eos_ids: further tokens that end an answer.
        exit: see `Schedule.exit`; None where no row stops by it.
        exit_ids: tokens between the last latent and the one whose distribution that is about.
    """

    latents: int
    thinking_end_ids: list[int]
    eos_id: int | None
    max_answer_tokens: int
    stop_id: int | None = None
    latent_id: int | None = None
    schedule: Schedule = SEQUENTIAL
    forced_ids: list[int] = field(default_factory=list)
    other_eos_ids: Sequence[int] = ()
    exit: float | None = None
    exit_ids: Sequence[int] = ()

    @property
    def ragged(self) -> bool:
        """Whether rollouts may have unequally many latents."""
        return self.stop_id is not None or self.exit is not None

    @property
    def eos_ids(self) -> list[int]:
        """All tokens that end an answer."""
        return [] if self.eos_id is None else [self.eos_id, *self.other_eos_ids]

    def owns_last(self, sampler: Sampler) -> bool:
        """Whether the last prompt token belongs to each row, since its pass makes h_1 and is random."""
        return self.latents > 0 and bool(sampler.random_phases & {"prompt", "thoughts"})

    def capacity(self, sampler: Sampler) -> int:
        """Most slots of a row."""
        return self.latents + self.owns_last(sampler) + len(self.thinking_end_ids) + self.max_answer_tokens


@dataclass
class Rollouts:
    """R finished rollouts, question-major.

    Attributes:
        latents_RTD: the vectors fed back, where they were made and as they were; zeros from a row's own number of steps
            on. Everything else is on the CPU.
        steps_R: how many latents each row has.
        answer_ids: per row, the ids after the end of thinking, a final eos dropped; all empty if none was decoded.
        answer_logprob_R: summed log-probability of the answer's tokens, its eos included and forced ones left out: the
            model's own, at temperature 1 and over the whole vocabulary, however the tokens were chosen; NaN if no
            answer was decoded.
        answer_margin_R: smallest gap between the two highest logits of an answer position; NaN if none was decoded.
        stopped_R: whether the row ended by eos (otherwise by the token limit).
        sweeps_R, commits_R, conflicts_R: what the schedule counted, see `schedule.Counts`.
        timeline: the sweeps that counted so; empty where latents are made one after another.
    """

    latents_RTD: Tensor
    steps_R: Tensor
    answer_ids: list[list[int]]
    answer_logprob_R: Tensor
    answer_margin_R: Tensor
    stopped_R: Tensor
    sweeps_R: Tensor
    commits_R: Tensor
    conflicts_R: Tensor
    timeline: list[Sweep] = field(default_factory=list)


class Engine:
    """Runs rollouts of one loaded model.

    Attributes:
        reasoner: the model.
        plan: what a rollout consists of.
        draft: predicts latents, for a schedule whose guesses it makes.
    """

    def __init__(self, reasoner: Reasoner, plan: RolloutPlan, draft: DraftHead | None = None) -> None:
        self.reasoner, self.plan, self.draft = reasoner, plan, draft
        self.lm = reasoner.lm
        prepare_backbone(self.lm, reasoner.computation)
        self.head = head_of(reasoner)
        self.width = int(self.lm.config.get_text_config().hidden_size)
        self.blocks = int(self.lm.config.get_text_config().num_hidden_layers)
        ending = [*plan.thinking_end_ids, *plan.forced_ids]  # what is fed after the last latent
        self.ending_ids = torch.tensor(ending, dtype=torch.long, device=self.device)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.lm.device

    @torch.inference_mode()
    def roll(
        self,
        prompts: list[list[int]],
        draw: Draw,
        sampler: Sampler,
        *,
        donor_RTD: Tensor | None = None,
        answers: bool = True,
    ) -> Rollouts:
        """Draw N rollouts of each of Q prompts.

        Args:
            prompts: Q lists of token ids, none empty.
            draw: the random numbers of R = Q*N rows, question-major.
            sampler: what makes the rows differ.
            donor_RTD: another question's latents for each row, if the sampler needs them.
            answers: whether to decode answers; without them h_T is made, but not run.

        Returns:
            The R rollouts.
        """
        draw.donor_RTD = donor_RTD
        drafts_RTD = self._drafts(prompts, draw, sampler)
        with SiteHooks(self.lm, sampler) as hooks:
            rollouts = RolloutState.start(self, prompts, draw, hooks, keep_states=self.draft is not None)
            rollouts.drafts_RTD = drafts_RTD
            rollouts.make_latents()
            return rollouts.decode_answers() if answers else rollouts.finish()

    def _drafts(self, prompts: list[list[int]], draw: Draw, sampler: Sampler) -> Tensor | None:
        """What the schedule's guesses are made of, where that is other rollouts of the questions: their latents."""
        guess = self.plan.schedule.guess
        if guess not in GUESSES_OF_ROLLOUTS:
            return None
        rollouts = draw.rollouts_R.shape[0] // len(prompts)
        first = torch.arange(0, draw.rollouts_R.shape[0], rollouts, device=draw.rollouts_R.device)
        own = draw.rows(first)
        if draw.donor_RTD is not None:
            own.donor_RTD = draw.donor_RTD[first]
        source = Greedy() if guess == "greedy" else sampler
        sequential = copy(self)
        sequential.plan = replace(self.plan, schedule=SEQUENTIAL)
        with SiteHooks(self.lm, source) as hooks:
            made_QTD = RolloutState.start(sequential, prompts, own, hooks).make_latents().latents_RTD
        return made_QTD.repeat_interleave(rollouts, 0)


class Answers:
    """The answers of R rows in the making.

    Attributes:
        ids_RA, lengths_R, logprob_R, margin_R, stopped_R: see `Rollouts`.
    """

    def __init__(self, plan: RolloutPlan, rows: int, device: torch.device) -> None:
        self._eos_ids = torch.tensor(plan.eos_ids, dtype=torch.long, device=device)
        self._forced_ids = torch.tensor(plan.forced_ids, dtype=torch.long, device=device)
        self.ids_RA = torch.empty(rows, plan.max_answer_tokens, dtype=torch.long, device=device)
        self.lengths_R = torch.empty(rows, dtype=torch.long, device=device)
        self.logprob_R, self.margin_R = torch.empty(2, rows, device=device)
        self.stopped_R = torch.empty(rows, dtype=torch.bool, device=device)
        self.restart()

    def restart(self) -> None:
        """Forget all but the forced beginning."""
        forced = self._forced_ids.shape[0]
        self.ids_RA.fill_(-1)
        self.ids_RA[:, :forced] = self._forced_ids
        self.lengths_R.fill_(forced)
        self.logprob_R.zero_()
        self.margin_R.fill_(float("inf"))
        self.stopped_R.fill_(False)

    def take(self, choice: Choice, here: Tensor, alive: Tensor, position: int | Tensor, *, over: bool) -> Tensor:
        """Take the next tokens of some rows.

        Args:
            choice: of each of these rows.
            here: which rows they are.
            alive: which of them still go on.
            position: of the token in the answer (int64, 1, as a tensor).
            over: whether only an eos may still come.

        Returns:
            Which of them go on.
        """
        # selecting rows by a mask would make the CPU wait for a GPU each time
        ended = (choice.token_R[:, None] == self._eos_ids).any(1)
        counts, stopping, alive = alive & ended if over else alive, alive & ended, alive & ~ended
        if not over:
            self.ids_RA[here, position] = torch.where(alive, choice.token_R, self.ids_RA[here, position])
            self.lengths_R[here] += alive
        self.logprob_R[here] += choice.logprob_R.masked_fill(~counts, 0.0)
        margin_R = self.margin_R[here]
        self.margin_R[here] = torch.where(counts, torch.minimum(margin_R, choice.margin_R), margin_R)
        self.stopped_R[here] |= stopping
        return alive


class RolloutState:
    """R rollouts in the making: `start` runs the prompts, then latents are made and answers decoded.

    It is what a schedule drives (`schedule.LatentSequence`); searches and labels `fork` it between two latents. Use it
    under `torch.inference_mode` and inside the `SiteHooks` of the sampler.

    A latent is made by the pass over what stands before it, the last prompt token for h_1. Where a schedule runs
    several such passes side by side, they meet the masks that they would meet one by one, since masks and noise belong
    to a rollout's step.

    Attributes:
        engine: the model and the plan.
        draw: random numbers of the rows.
        latents_RTD: the latents so far, zeros elsewhere.
        total: T.
        first_is_free: whether the prompt's pass made the first latent; otherwise rows have a last prompt token each.
        step: how many latents have been made (by the rows that still think).
        thinking_R: rows that have not stopped by the token; None for a fixed T.
        steps_R: latents of each row.
        counts: what the schedule has counted so far.
        drafts_RTD: latents that guesses are made of, where the schedule's are.
    """

    def __init__(self, engine: Engine, hooks: SiteHooks, state: State, draw: Draw) -> None:
        """Take the rows of a draw, none with a latent; `state` is to hold their prompts."""
        self.engine, self.draw, plan = engine, draw, engine.plan
        rows, device = draw.rollouts_R.shape[0], engine.device
        self.latents_RTD = torch.zeros(rows, plan.latents, engine.width, dtype=engine.lm.dtype, device=device)
        self.steps_R = torch.full((rows,), 0 if plan.ragged else plan.latents, device=device)
        self.thinking_R = torch.ones(rows, dtype=torch.bool, device=device) if plan.ragged else None
        self.total, self.step, self.first_is_free = plan.latents, 0, not plan.owns_last(hooks.sampler)
        nothing_R = torch.zeros_like(self.steps_R)
        self.counts = Counts(nothing_R, nothing_R.clone(), nothing_R.clone())
        self.drafts_RTD: Tensor | None = None
        self._plan, self._hooks, self._state = plan, hooks, state
        self._embed: Callable[[Tensor], Tensor] = engine.lm.get_input_embeddings()
        self._movement = AnswerMovement(engine.head)
        self._prompt_states: tuple[Tensor, Tensor] | None = None
        # what is not run yet: the last latent; after parallel sweeps also those before it that may have changed
        self._pending_RSD: Tensor | None = None
        self._pending_steps = range(0)  # the latents that all but the last of the pending ones would make
        self._hidden_RD: Tensor | None = None  # of what was run last
        draw.history_RTD = self.latents_RTD

    @classmethod
    def start(
        cls, engine: Engine, prompts: list[list[int]], draw: Draw, hooks: SiteHooks, *, keep_states: bool = False
    ) -> RolloutState:
        """Run Q prompts for R = Q*N rows.

        Args:
            engine: the model.
            prompts: Q lists of token ids, none empty.
            draw: random numbers of the R rows, question-major.
            hooks: the sampler's.
            keep_states: whether `prompt_states` are kept.
        """
        sampler = hooks.sampler
        siblings = 1 if "prompt" in sampler.random_phases else draw.rollouts_R.shape[0] // len(prompts)
        state = open_state(
            cast(PreTrainedModel, engine.lm.base_model),
            engine.reasoner.computation,
            siblings,
            engine.plan.capacity(sampler),
            before_part=hooks.select_part,
        )
        self = cls(engine, hooks, state, draw)
        draw.steps = engine.plan.latents
        self._run_prompts(prompts, keep_states=keep_states)
        return self

    def _run_prompts(self, prompts: list[list[int]], *, keep_states: bool = False) -> None:
        """Run the prompts, all but the last token of each where that is each row's own."""
        rows = self.latents_RTD.shape[0]
        copies = rows // self._state.rollouts // len(prompts)
        shared = [prompt if self.first_is_free else prompt[:-1] for prompt in prompts for _ in range(copies)]
        if not self.first_is_free:  # first, since a copy to a GPU waits for what runs there
            ids = torch.tensor([prompt[-1] for prompt in prompts], device=self.engine.device)
            self._pending_RSD = self._embed(ids.repeat_interleave(rows // len(prompts)))[:, None]
        last_PD = self._prefill(shared, keep_states=keep_states)
        if self.first_is_free:
            self._hidden_RD = last_PD.repeat_interleave(self._state.rollouts, 0)

    def fork(self, rows: Tensor, draw: Draw, step: int | None = None) -> RolloutState:
        """Rollouts of their own that share the first latents with some of these; these stay as they are.

        Args:
            rows: which rows, those of a question side by side; a row may come several times.
            draw: random numbers of the new rows.
            step: how many latents, at least 1, are shared (of use for rows that have as many); None for all.
        """
        step = self.step if step is None else step
        state = self._state.fork(rows)
        state.rewind(step - self.first_is_free)
        if self.draw.donor_RTD is not None:
            draw.donor_RTD = self.draw.donor_RTD[rows]
        forked = RolloutState(self.engine, self._hooks, state, draw)
        forked.step, forked.latents_RTD[:, :step] = step, self.latents_RTD[rows, :step]
        forked._pending_RSD = forked.latents_RTD[:, step - 1, None]
        if self.thinking_R is not None:
            forked.thinking_R, forked.steps_R = self.steps_R[rows] >= step, self.steps_R[rows].clamp(max=step)
        return forked

    def prompt_states(self) -> tuple[Tensor, Tensor]:
        """Final hidden states (R, L, D) of each row's prompt, and how many count: not its last, which makes h_1."""
        assert self._prompt_states is not None, "they were not kept"
        hidden_QLD, lengths_Q = self._prompt_states
        copies = len(self.steps_R) // len(lengths_Q)
        return hidden_QLD.repeat_interleave(copies, 0), lengths_Q.repeat_interleave(copies)

    # --- latents, as a schedule asks for them

    @property
    def unfinished(self) -> bool:
        """Whether a row still lacks latents."""
        return self.step < self._plan.latents and (self.thinking_R is None or bool(self.thinking_R.any()))

    def make_latents(self) -> RolloutState:
        """Make all latents that are still missing; returns itself."""
        self._plan.schedule.run(self)
        return self

    def advance(self) -> Tensor:
        """Make one more latent (R, D) of every row that still thinks (zeros elsewhere)."""
        step, settled_R = self.step, None
        if self._pending_RSD is not None and step > 0 and self._plan.exit is not None:
            settled_R = self._run_and_look(self._pending_RSD, self._plan.exit)
        elif self._pending_RSD is not None:
            self._hidden_RD = self._run_pending(self._pending_RSD, Forward("thoughts", step, 1), self.thinking_R)
        assert self._hidden_RD is not None
        latent_RD = self._latent_after(self._hidden_RD, step)
        if self.thinking_R is not None:
            if self._plan.stop_id is not None:
                stopping_R = choose(self.engine.head, self._hidden_RD).token_R == self._plan.stop_id
                self.thinking_R = self.thinking_R & ~stopping_R
            if settled_R is not None:
                self.thinking_R = self.thinking_R & ~settled_R
            self.steps_R = self.steps_R + self.thinking_R
            latent_RD = latent_RD * self.thinking_R[:, None]
        self.latents_RTD[:, step] = latent_RD
        self._pending_RSD = self.latents_RTD[:, step, None]
        self.step += 1
        return self.latents_RTD[:, step]

    def _run_and_look(self, latent_RSD: Tensor, threshold: float) -> Tensor | None:
        """Run a latent, and in the same pass, to be forgotten, what would follow it if it were the last one.

        Returns:
            Which rows' answers it has moved by no more than `threshold`; None after the first latent.
        """
        ids = torch.tensor(list(self._plan.exit_ids), dtype=torch.long, device=self.engine.device)
        following_RSD = self._embed(ids).expand(latent_RSD.shape[0], -1, -1)
        used = self._state.used
        answered = self._plan.latents + len(ids) - len(self._plan.thinking_end_ids)
        forwards = [Forward("thoughts", self.step, 1), Forward("answer", answered, len(ids))]
        hidden_RSD = self._run(torch.cat([latent_RSD, following_RSD], 1), forwards, self.thinking_R)
        self._state.rewind(used + 1)
        self._hidden_RD = hidden_RSD[:, 0]
        moved_R = self._movement.since_last(hidden_RSD[:, -1])
        return None if moved_R is None else moved_R <= threshold

    def guess(self, start: int, stop: int, what: str) -> None:
        """Put a guess in the place of latents start..stop-1. See `LatentSequence.guess`."""
        if what == "token":
            latent_id = torch.tensor(self._plan.latent_id, device=self.latents_RTD.device)
            self.latents_RTD[:, start:stop] = self._embed(latent_id)
        elif what == "zero":
            self.latents_RTD[:, start:stop] = 0
        else:
            if what == "draft" and self.drafts_RTD is None:
                self.drafts_RTD = self._predict_latents()
            assert self.drafts_RTD is not None
            own_noise = what != "sibling" and not self._hooks.sampler.needs_spread
            for step in range(start, stop):
                noisy = own_noise and (what, step) != ("draft", 0)  # h_1 was made with its noise
                draft_RD = self.drafts_RTD[:, step]
                self.latents_RTD[:, step] = self._hooks.sampler.latent(draft_RD, self.draw, step) if noisy else draft_RD

    def _predict_latents(self) -> Tensor:
        """h_1, with its noise, and what the draft head predicts of the others (R, T, D)."""
        assert self.engine.draft is not None
        first_R1D, _ = self.compute(0, 1)
        if not self.first_is_free:
            self.counts.sweeps_R += 1
            start_R = torch.zeros_like(self.counts.sweeps_R)
            self.counts.timeline.append(Sweep(start_R, start_R + 1, start_R))
        predicted = self.engine.draft(first_R1D[:, 0], *self.prompt_states())
        return torch.cat([first_R1D, predicted.to(first_R1D.dtype)], 1)

    def compute(self, first: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """Make latents first..stop-1 from those before them as they are now. See `LatentSequence.compute`."""
        steps = range(first or int(self.first_is_free), stop)  # the prompt's pass may have made h_1
        hidden = [] if steps.start == first else [cast(Tensor, self._hidden_RD)[:, None]]
        if steps:
            inputs = [self.latents_RTD[:, max(steps.start - 1, 0) : stop - 1]]
            if steps.start == 0:
                inputs.insert(0, cast(Tensor, self._pending_RSD))
            self._state.rewind(steps.start - self.first_is_free)
            hidden.append(self._run(torch.cat(inputs, 1), [Forward("thoughts", step, 1) for step in steps]))
        hidden_RSD = torch.cat(hidden, 1)
        made = [self._latent_after(hidden_RSD[:, step - first], step) for step in range(first, stop)]
        stops_RS = None
        if self._plan.stop_id is not None:
            token_R = choose(self.engine.head, hidden_RSD.flatten(0, 1)).token_R
            stops_RS = token_R.view(len(hidden_RSD), -1) == self._plan.stop_id
        return torch.stack(made, 1), stops_RS

    def commit(self, first: int) -> None:
        """All latents are made. See `LatentSequence.commit`."""
        self.step = self._plan.latents
        self._state.rewind(first - self.first_is_free)
        self._pending_RSD = self.latents_RTD[:, first - 1 :]
        self._pending_steps = range(first, self._plan.latents)

    def commit_until(self, steps_R: Tensor) -> None:
        """Rows have as many latents as `steps_R` says. See `LatentSequence.commit_until`."""
        if self._plan.stop_id is None:
            return self.commit(self.total)
        self.steps_R = steps_R
        # as one after another, where a last pass finds the stop of the longest rows
        self.step = min(int(steps_R.max()) + 1, self._plan.latents)
        self.thinking_R = steps_R >= self.step
        self.latents_RTD *= (torch.arange(self.total, device=steps_R.device) < steps_R[:, None])[..., None]
        self._state.rewind(self.step - self.first_is_free)
        self._state.blank(steps_R + (not self.first_is_free))
        self._pending_RSD = self.latents_RTD[:, self.step - 1, None]

    # --- answers

    def decode_answers(self) -> Rollouts:
        """Decode the answers; rows that finish leave the batch. Afterwards `fork` works, and nothing else."""
        plan, forced = self._plan, len(self._plan.forced_ids)
        kept = self._state, self._state.used, self.draw
        answers = Answers(plan, self.latents_RTD.shape[0], self.engine.device)
        here = torch.arange(self.latents_RTD.shape[0], device=self.engine.device)  # each row's number before some left
        alive = torch.ones_like(here, dtype=torch.bool)
        embeddings_RSD, keep_first_R = self._before_answers()
        for position in range(forced, plan.max_answer_tokens + (plan.eos_id is not None)):
            choice = self._choose(embeddings_RSD, plan.latents + position, keep_first_R)
            keep_first_R = None
            over = position == plan.max_answer_tokens
            alive = answers.take(choice, here, alive, position, over=over)
            left_Q = alive.view(-1, self._state.rollouts).sum(1).tolist()
            if over or not any(left_Q):
                break
            token, here, alive = self._drop_finished(choice.token_R, here, alive, left_Q)
            embeddings_RSD = self._embed(token)[:, None]
        self._state, used, self.draw = kept
        self._state.rewind(used)
        return self.finish(answers)

    def finish(self, answers: Answers | None = None) -> Rollouts:
        """The rollouts as they are, maybe without answers."""
        steps_R = self.steps_R.cpu()
        ids, logprob_R, stopped_R = [[] for _ in steps_R], torch.full(steps_R.shape, float("nan")), steps_R < 0
        margin_R = logprob_R
        if answers is not None:
            ids = [ids[:n] for ids, n in zip(answers.ids_RA.tolist(), answers.lengths_R.tolist(), strict=True)]
            logprob_R, margin_R, stopped_R = answers.logprob_R.cpu(), answers.margin_R.cpu(), answers.stopped_R.cpu()
        counts = self.counts
        if self._plan.schedule.stepwise:
            counts = Counts((steps_R - int(self.first_is_free)).clamp(min=0), steps_R, torch.zeros_like(steps_R))
        return Rollouts(
            self.latents_RTD, steps_R, ids, logprob_R, margin_R, stopped_R,
            counts.sweeps_R.cpu(), counts.commits_R.cpu(), counts.conflicts_R.cpu(), counts.timeline,
        )  # fmt: skip

    def _before_answers(self) -> tuple[Tensor, Tensor | None]:
        """What is run before the first answer token (R, S, D), and in which rows the first of it counts."""
        embeddings_RSD = self._embed(self.engine.ending_ids).expand(self.latents_RTD.shape[0], -1, -1)
        if self._pending_RSD is None:
            return embeddings_RSD, None
        return torch.cat([self._pending_RSD, embeddings_RSD], dim=1), self.thinking_R

    def _choose(self, embeddings_RSD: Tensor, step: int, keep_first_R: Tensor | None = None) -> Choice:
        """Run what stands before an answer token and choose it."""
        hidden_RD = self._run_pending(embeddings_RSD, Forward("answer", step, embeddings_RSD.shape[1]), keep_first_R)
        return self._token_after(hidden_RD, self.draw, step)

    def _token_after(self, hidden_RD: Tensor, draw: Draw, step: int) -> Choice:
        """The token that model and sampler choose after hidden states."""
        sampler = self._hooks.sampler
        if not sampler.chooses_tokens:
            return choose(self.engine.head, hidden_RD)
        return choose(
            self.engine.head, hidden_RD, lambda logits_CV, rows: sampler.token(logits_CV, draw.rows(rows), step)
        )

    def _drop_finished(
        self, token: Tensor, here: Tensor, alive: Tensor, left_Q: list[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Drop finished rows once enough have finished; the rest stays a questions x rollouts grid."""
        going, most = [question for question, left in enumerate(left_Q) if left], max(left_Q)
        if len(going) * most > COMPACT_BELOW * alive.shape[0]:
            return token, here, alive
        questions = torch.tensor(going, device=alive.device)
        alive_QN = alive.view(-1, self._state.rollouts)[questions]
        # within a question the rows still alive first; finished ones fill up the shorter questions
        order = alive_QN.int().argsort(dim=1, descending=True, stable=True)[:, :most]
        rows = (questions[:, None] * self._state.rollouts + order).flatten()
        self._state = self._state.fork(rows)
        self.draw = self.draw.rows(rows)
        return token[rows], here[rows], alive[rows]

    # --- passes

    def _prefill(self, prompts: list[list[int]], *, keep_states: bool) -> Tensor:
        """Run the prompts; returns the hidden state (prompts, D) of each one's last token."""
        ids_QL, lengths_Q = pad_prompts(prompts, self.engine.device)
        if keep_states:
            kept_QLD = self.latents_RTD.new_zeros(*ids_QL.shape, self.engine.width)
            self._prompt_states = kept_QLD, lengths_Q - int(self.first_is_free)
        last = []
        for piece, longest in split_prompts(list(map(len, prompts)), lengths_Q.device.type):
            hidden_QLD, last_QD = self._run_piece(ids_QL[piece, :longest], lengths_Q[piece], self.draw.rows(piece))
            if self._prompt_states is not None:
                self._prompt_states[0][piece, :longest] = hidden_QLD
            last.append(last_QD)
        return torch.cat(last)

    def _run_piece(self, ids_QL: Tensor, lengths_Q: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        """Run prompts side by side; returns hidden states (q, L, D), and that of each one's last token (q, D)."""
        self._hooks.set_pass(draw, Forward("prompt", 0, ids_QL.shape[1]))
        hidden_QLD = self._state.prefill(self._embed(ids_QL), lengths_Q)
        ends = (lengths_Q - 1).clamp(min=0)
        return hidden_QLD, hidden_QLD[torch.arange(len(ends), device=ends.device), ends]

    def _run_pending(self, embeddings_RSD: Tensor, forward: Forward, keep_first_R: Tensor | None = None) -> Tensor:
        """Append what is pending to every row, and what follows it; returns the last token's hidden state (R, D).

        In rows that `keep_first_R` excludes the first of the tokens leaves no trace. Without any tokens, as where an
        answer follows right after the prompt, that is the prompt's last one.
        """
        if forward.tokens == 0:
            assert self._hidden_RD is not None
            return self._hidden_RD
        thoughts = [Forward("thoughts", step, 1) for step in self._pending_steps]
        self._pending_steps = range(0)
        forwards = [*thoughts, replace(forward, tokens=forward.tokens - len(thoughts))]
        return self._run(embeddings_RSD, forwards, keep_first_R)[:, -1]

    def _run(self, embeddings_RSD: Tensor, forwards: list[Forward], keep_first_R: Tensor | None = None) -> Tensor:
        """Append tokens to every row, those of several forward passes side by side; returns hidden states (R, S, D)."""
        self._hooks.set_pass(self.draw, *forwards)
        return self._state.append(embeddings_RSD, keep_first_R)

    def _latent_after(self, hidden_RD: Tensor, step: int) -> Tensor:
        """The latent that model and sampler make of the hidden states before it."""
        reasoner, sampler = self.engine.reasoner, self._hooks.sampler
        if sampler.needs_spread and reasoner.latent_spread is not None:
            self.draw.spread_RD = reasoner.latent_spread(hidden_RD)
        return sampler.latent(reasoner.next_latent(hidden_RD), self.draw, step)
