"""Rollouts by CUDA graphs: the passes of a batch are recorded once and replayed for later batches of the same sizes.

A recording runs the same code as `RolloutState`, on tensors that stay where they are. What differs between batches
(random keys, prompts, donors) or between replays (the slot, the position in the answer) is read from the device. What
is the same in all batches of a bucket is recorded as a number.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias, cast
from weakref import proxy

import torch
from torch import Tensor
from transformers import PreTrainedModel

from latent_tts.engine.head import Choice
from latent_tts.engine.prompts import pad_prompts
from latent_tts.engine.recording import (
    MIN_LENGTH,
    PROMPT_TOKENS,
    Bucket,
    CudaRecorder,
    Prompts,
    Recordings,
    power_of_two,
)
from latent_tts.engine.rollout import Answers, Engine, RolloutPlan, Rollouts, RolloutState
from latent_tts.engine.sites import SiteHooks
from latent_tts.engine.state import FixedState
from latent_tts.random.draw import Draw
from latent_tts.sampler import Sampler
from latent_tts.types import Forward, Reasoner

MIN_ROWS = 256  # fewer rows take as long: a GPU then waits for weights
MIN_WANTED = 2  # how many batches have wanted a smaller grid before rows move to it, since its passes are recorded anew

Grid: TypeAlias = tuple[int, int]  # prefixes, and rows of each


@dataclass(frozen=True)
class Latents:
    """The passes that make latents first..stop-1."""

    first: int
    stop: int


@dataclass(frozen=True)
class FirstToken:
    """The pass that chooses the first answer token after a number of latents."""

    latents: int


@dataclass(frozen=True)
class NextToken:
    """The pass that chooses a later answer token.

    Attributes:
        over: whether only an eos may still come.
        position: of the token in the answer; None where the device knows it, since no random number depends on it.
        grid: of the rows that run.
    """

    over: bool
    position: int | None
    grid: Grid


@dataclass(frozen=True)
class Move:
    """The copy of the rows that go on to tensors for fewer rows."""

    source: Grid
    target: Grid


Passes: TypeAlias = Prompts | Latents | FirstToken | NextToken | Move


def smaller_grid(left_P: Sequence[int], grid: Grid) -> Grid | None:
    """The grid that rows move to; None where too few of them have finished.

    Its sizes are powers of two, so that few different ones are recorded, and it has at most half of the rows.

    Args:
        left_P: how many rows of each prefix go on, of one at least.
        grid: that they are in.
    """
    prefixes, rollouts = (power_of_two(number) for number in (sum(left > 0 for left in left_P), max(left_P)))
    prefixes, rollouts = min(prefixes, grid[0]), min(rollouts, grid[1])
    rollouts = min(power_of_two(-(-MIN_ROWS // prefixes), rollouts), grid[1])
    prefixes = min(power_of_two(-(-MIN_ROWS // rollouts), prefixes), grid[0])
    return (prefixes, rollouts) if 2 * prefixes * rollouts <= grid[0] * grid[1] else None


class AnswerRows:
    """What the answer tokens of some rows are made from, in tensors that stay where they are.

    Attributes:
        grid: P prefixes and N rows of each.
        state: keys and values.
        draw: random numbers of the rows.
        here_R: which of the batch's rows they are.
        token_R: chosen last.
        alive_R: which go on.
        left_P: how many go on with each prefix.
    """

    def __init__(self, grid: Grid, state: FixedState, draw: Draw) -> None:
        """Let all rows go on."""
        self.grid, self.state, self.draw = grid, state, draw
        self.here_R = torch.arange(grid[0] * grid[1], device=draw.rollouts_R.device)
        self.token_R = torch.zeros_like(self.here_R)
        self.alive_R = torch.ones_like(self.here_R, dtype=torch.bool)
        self.left_P = torch.full((grid[0],), grid[1], device=self.here_R.device)

    def smaller(self, grid: Grid) -> AnswerRows:
        """Tensors for some of the rows."""
        return AnswerRows(grid, self.state.for_rows(*grid), copied_draw(self.draw.rows(slice(grid[0] * grid[1]))))

    def take(self, other: AnswerRows) -> None:
        """Take over the rows of another grid that go on, and finished ones where there is room."""
        (prefixes, rollouts), (_, all_rollouts) = self.grid, other.grid
        alive_PN = other.alive_R.view(other.grid)
        prefix_P = alive_PN.sum(1).argsort(descending=True, stable=True)[:prefixes]
        inside_PN = alive_PN[prefix_P].int().argsort(dim=1, descending=True, stable=True)[:, :rollouts]
        rows_R = (prefix_P[:, None] * all_rollouts + inside_PN).flatten()
        for kept, part in zip(self.state.of_questions(), other.state.of_questions(), strict=True):
            kept.copy_(part.index_select(0, prefix_P))
        for kept, part in zip(self.of_rows(), other.of_rows(), strict=True):
            kept.copy_(part.index_select(0, rows_R))
        self.left_P.copy_(self.alive_R.view(self.grid).sum(1))

    def keep(self, token_R: Tensor, alive_R: Tensor) -> None:
        """Set what was chosen last, and which rows go on."""
        self.token_R.copy_(token_R)
        self.alive_R.copy_(alive_R)
        self.left_P.copy_(self.alive_R.view(self.grid).sum(1))

    def tensors(self) -> list[Tensor]:
        """All of them."""
        return [*self.state.of_questions(), *self.of_rows(), self.left_P]

    def of_rows(self) -> list[Tensor]:
        """Those with an entry per row."""
        own = [self.draw.keys_R2, self.draw.rollouts_R, self.here_R, self.token_R, self.alive_R]
        return [*self.state.of_rows(), *own]


def copied_draw(draw: Draw) -> Draw:
    """The same random numbers, from keys in memory of their own."""
    return Draw(draw.keys_R2.clone(), draw.rollouts_R.clone(), draw.width, draw.blocks)


class FixedRollouts(RolloutState, Bucket[Passes, Rollouts]):
    """R rollouts whose tensors stay where they are, for one batch after another."""

    def __init__(
        self, engine: Engine, hooks: SiteHooks, draw: Draw, questions: int, length: int, recorder: CudaRecorder
    ) -> None:
        """Make the tensors.

        Args:
            engine: the model and the plan.
            hooks: the sampler's.
            draw: random numbers of a batch, as an example.
            questions: Q.
            length: most tokens of a prefix.
            recorder: for these tensors alone.
        """
        rows, device, plan = draw.rollouts_R.shape[0], engine.device, engine.plan
        prefixes = rows if "prompt" in hooks.sampler.random_phases else questions
        backbone, grid = cast(PreTrainedModel, engine.lm.base_model), (prefixes, rows // prefixes)
        state = FixedState(backbone, grid[1], plan.capacity(hooks.sampler), questions=prefixes, length=length)
        own = copied_draw(draw)
        if draw.donor_RTD is not None:
            own.donor_RTD = draw.donor_RTD.clone()
        RolloutState.__init__(self, engine, hooks, state, own)
        Bucket.__init__(self, recorder, engine.lm.dtype)
        self._all = AnswerRows(grid, state, own)
        self._rows = {grid: self._all}
        self._answers = Answers(plan, rows, device)
        self._begin_RD = torch.zeros_like(self._embed(self._answers.lengths_R))
        self._thinking_R, self._steps_R = self.thinking_R, self.steps_R
        self._going = torch.ones(1, dtype=torch.long, device=device)
        self._position_1, self._at_1 = torch.zeros(2, 1, dtype=torch.long, device=device)
        # prompts as their recorded pass reads them
        self._ids_QL = torch.zeros(questions, length, dtype=torch.long, device=device)
        self._lengths_Q, self._last_Q = torch.zeros(2, questions, dtype=torch.long, device=device)
        self._records_prompts = prefixes * length <= PROMPT_TOKENS
        self.wanted: set[Grid] = set()
        self.wanted_before: Counter[Grid] = Counter()  # by the batches before

    def tensors(self) -> list[Tensor]:
        """See `Bucket`."""
        answers = self._answers
        pieces = [part for rows in self._rows.values() for part in rows.tensors()]
        found = [
            *pieces, self._all.draw.donor_RTD, self.latents_RTD, self._begin_RD, self._thinking_R, self._steps_R,
            self._going, self._position_1, self._at_1, answers.ids_RA, answers.lengths_R, answers.logprob_R,
            answers.margin_R, answers.stopped_R, self._ids_QL, self._lengths_Q, self._last_Q,
        ]  # fmt: skip
        return [tensor for tensor in found if tensor is not None]

    def load(self, prompts: list[list[int]], draw: Draw, hooks: SiteHooks) -> None:
        """Begin another batch of the same sizes."""
        self._hooks = hooks
        self.draw.keys_R2.copy_(draw.keys_R2)
        self.draw.rollouts_R.copy_(draw.rollouts_R)
        if self.draw.donor_RTD is not None:
            self.draw.donor_RTD.copy_(cast(Tensor, draw.donor_RTD))
        if self._records_prompts:
            shared = [prompt if self.first_is_free else prompt[:-1] for prompt in prompts]
            ids_QL, lengths_Q = pad_prompts(shared, torch.device("cpu"))
            self._ids_QL[:, : ids_QL.shape[1]] = ids_QL
            self._lengths_Q.copy_(lengths_Q)
            self._last_Q.copy_(torch.tensor([prompt[-1] for prompt in prompts]))
            return
        self._restart()
        self._run_prompts(prompts)
        self._begin_RD.copy_(cast(Tensor, self._hidden_RD if self._pending_RSD is None else self._pending_RSD[:, 0]))

    def walk(self, run: Callable[[Passes], None], *, answers: bool) -> Rollouts:
        """Run all passes of the batch, and learn one pass late whether rows are left; returns the rollouts."""
        plan, total, made = self._plan, self.total, 0
        if self._records_prompts:
            run(Prompts())
        stride = total if plan.stop_id is None else 1
        left = _LateReading(self._going)
        while made < total and (self._thinking_R is None or left.before_last() != [0]):
            run(Latents(made, min(made + stride, total)))
            made = min(made + stride, total)
            left.read()
        if answers:
            self._walk_answers(run, made)
        rollouts = self.finish(self._answers if answers else None)
        # in memory of their own
        values = {name: value.clone() for name, value in vars(rollouts).items() if isinstance(value, Tensor)}
        return replace(rollouts, **values)

    def _walk_answers(self, run: Callable[[Passes], None], made: int) -> None:
        plan, rows, random = self._plan, self._all, self._hooks.sampler.random_answers
        left = _LateReading(rows.left_P)
        self.wanted.clear()
        run(FirstToken(made))
        left.read()
        first, last = len(plan.forced_ids) + 1, plan.max_answer_tokens - (plan.eos_id is None)
        for position in range(first, last + 1):
            left_P = left.before_last()
            if left_P is not None and not any(left_P):
                break
            # a move pays from the second pass on; where each position has a recording of its own, there would be many
            grid = smaller_grid(left_P, rows.grid) if left_P and position < last and not random else None
            if grid is not None:
                self.wanted.add(grid)
                if self.wanted_before[grid] >= MIN_WANTED:
                    run(Move(rows.grid, grid))
                    rows = self._rows[grid]
                    left = _LateReading(rows.left_P)
                    left.read()
            own = position if random else None
            run(NextToken(position == plan.max_answer_tokens, own, rows.grid))
            left.read()

    def run(self, passes: Passes) -> None:
        """See `Bucket`."""
        match passes:
            case Prompts():
                self._run_recorded_prompts()
            case Latents():
                self._run_latents(passes.first, passes.stop)
            case FirstToken():
                self._run_first_token(passes.latents)
            case NextToken():
                self._run_next_token(passes)
            case Move():
                if passes.target not in self._rows:
                    self._rows[passes.target] = self._all.smaller(passes.target)
                self._rows[passes.target].take(self._rows[passes.source])

    def clear(self) -> None:
        """See `Bucket`."""
        super().clear()
        answers = self._answers
        for tensor in (answers.ids_RA, answers.lengths_R, answers.stopped_R):
            tensor.zero_()
        if self._thinking_R is not None:  # otherwise all rows have T steps
            self._steps_R.zero_()

    def restore(self) -> None:
        """See `Bucket`."""
        self._at_1.zero_()
        self._position_1.zero_()

    def agreement(self, found: Rollouts, wanted: Rollouts, roundings: float) -> float:
        """Share of rollouts that agree: latents and log-probabilities within rounding, steps and answers exactly.

        Where the two most probable tokens of an answer are as near each other as rounding, either answer will do.

        Args:
            found: some rollouts.
            wanted: the same, computed otherwise.
            roundings: how many roundings of the dtype (of float32, if it is wider) their mean difference may be.
        """
        limit = roundings * max(torch.finfo(dtype).eps for dtype in (wanted.latents_RTD.dtype, torch.float32))
        pairs = zip(found.answer_ids, wanted.answer_ids, strict=True)
        same_R = torch.tensor([ours == theirs for ours, theirs in pairs]) & torch.isclose(
            found.answer_logprob_R, wanted.answer_logprob_R, rtol=10 * limit, atol=10 * limit, equal_nan=True
        )
        near_R = torch.minimum(found.answer_margin_R, wanted.answer_margin_R) <= limit
        agree_R = (found.steps_R == wanted.steps_R) & (same_R | near_R)
        if wanted.latents_RTD.shape[1]:
            ours_RX, theirs_RX = (each.latents_RTD.flatten(1).double() for each in (found, wanted))
            agree_R &= ((ours_RX - theirs_RX).abs().mean(1) <= limit * theirs_RX.abs().mean(1)).cpu()
        return float(agree_R.double().mean())

    def _used_after(self, latents: int) -> int:
        """Slots in use after a number of latents: the last latent is not run yet."""
        return latents - self.first_is_free if latents else 0

    def _stand_after(self, latents: int) -> None:
        """Set the state to where a number of latents are made."""
        self.step, self.thinking_R, self.steps_R = latents, self._thinking_R, self._steps_R
        self._all.state.used = self._used_after(latents)
        self._hidden_RD, self._pending_RSD = self._begin_RD, None
        if latents:
            self._pending_RSD = self.latents_RTD[:, latents - 1, None]
        elif not self.first_is_free:
            self._pending_RSD = self._begin_RD[:, None]

    def _restart(self) -> None:
        """Forget the batch before."""
        self._all.state.restart()
        self._pending_RSD = None
        self.latents_RTD.zero_()
        if self._thinking_R is not None:
            self._thinking_R.fill_(True)
            self._steps_R.zero_()

    def _run_recorded_prompts(self) -> None:
        """Run the prompts; rows begin with embeddings of their last prompt tokens where those are their own, or h_1."""
        self._restart()
        prefixes, siblings = self._all.grid
        copies = prefixes // len(self._last_Q)
        ids_PL, lengths_P = self._ids_QL.repeat_interleave(copies, 0), self._lengths_Q.repeat_interleave(copies)
        _, begin_PD = self._run_piece(ids_PL, lengths_P, self.draw.rows(slice(prefixes)))
        if not self.first_is_free:
            begin_PD = self._embed(self._last_Q.repeat_interleave(copies))
        self._begin_RD.copy_(begin_PD.repeat_interleave(siblings, 0))

    def _run_latents(self, first: int, stop: int) -> None:
        self._stand_after(first)
        for _ in range(first, stop):
            self.advance()
        if self.thinking_R is not None:
            assert self._thinking_R is not None
            self._thinking_R.copy_(self.thinking_R)
            self._steps_R.copy_(self.steps_R)
            self._going.copy_(self.thinking_R.any())
            # a replay binds no names: what a recording made itself would be read for later batches
            self.thinking_R, self.steps_R = self._thinking_R, self._steps_R

    def _run_first_token(self, latents: int) -> None:
        self._stand_after(latents)
        self._answers.restart()
        self._all.alive_R.fill_(True)
        embeddings_RSD, keep_first_R = self._before_answers()
        position = len(self._plan.forced_ids)
        choice = self._choose(embeddings_RSD, self._plan.latents + position, keep_first_R)
        self._position_1.fill_(position)
        self._at_1.fill_(self._all.state.used)
        self._take(self._all, choice, position, over=position == self._plan.max_answer_tokens)

    def _run_next_token(self, passes: NextToken) -> None:
        rows = self._rows[passes.grid]
        step = self._plan.latents + (len(self._plan.forced_ids) + 1 if passes.position is None else passes.position)
        self._hooks.set_pass(rows.draw, Forward("answer", step, 1))
        hidden_R1D = rows.state.append_at(self._embed(rows.token_R)[:, None], self._at_1)
        choice = self._token_after(hidden_R1D[:, 0], rows.draw, step)
        self._take(rows, choice, self._position_1, over=passes.over)

    def _take(self, rows: AnswerRows, choice: Choice, position: int | Tensor, *, over: bool) -> None:
        rows.keep(choice.token_R, self._answers.take(choice, rows.here_R, rows.alive_R, position, over=over))
        self._position_1.add_(1)


class _LateReading:
    """Numbers on the device, read one pass late and through pinned memory, so that the device never waits."""

    def __init__(self, numbers: Tensor) -> None:
        self._numbers, self._reads = numbers, 0
        on_gpu = numbers.is_cuda
        self._host = [torch.ones(numbers.shape, dtype=numbers.dtype, pin_memory=on_gpu) for _ in range(2)]
        self._copied = [torch.cuda.Event() for _ in range(2)] if on_gpu else []

    def read(self) -> None:
        """Read the numbers as the passes so far leave them."""
        place = self._reads % 2
        self._host[place].copy_(self._numbers, non_blocking=True)
        if self._copied:
            self._copied[place].record(torch.cuda.current_stream(self._numbers.device))
        self._reads += 1

    def before_last(self) -> list[int] | None:
        """What the last but one reading found; None if there was none."""
        if self._reads < 2:
            return None
        place = self._reads % 2
        if self._copied:
            self._copied[place].synchronize()
        return self._host[place].tolist()


class GraphEngine(Engine):
    """An engine that replays recordings where batches of the same sizes come again."""

    def __init__(self, reasoner: Reasoner, plan: RolloutPlan, recordings: Recordings) -> None:
        """Record nothing yet.

        Args:
            reasoner: the model.
            plan: what a rollout consists of.
            recordings: where they are kept.

        Raises:
            RunError: graphs are needed, and the model is computed in a way that cannot be recorded.
        """
        super().__init__(reasoner, plan)
        self._recordings = recordings
        self._samplers: dict[int, Sampler] = {}  # kept, since a bucket's key holds its sampler's identity
        self._usable = recordings.usable(reasoner.computation) and plan.schedule.stepwise

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
        """See `Engine.roll`."""

        def usual() -> Rollouts:
            return Engine.roll(self, prompts, draw, sampler, donor_RTD=donor_RTD, answers=answers)

        tokens = self.plan.max_answer_tokens + (self.plan.eos_id is not None) - len(self.plan.forced_ids)
        longest = max(map(len, prompts)) - self.plan.owns_last(sampler)
        if not self._usable or longest < 1 or (answers and tokens < 1):
            return usual()
        length = power_of_two(longest, MIN_LENGTH)

        def fixed(known: FixedRollouts | None) -> tuple[FixedRollouts, Rollouts]:
            draw.donor_RTD = donor_RTD
            with SiteHooks(self.lm, sampler) as hooks:
                # without a circle of references, buckets go with their engine and not when garbage is collected
                bucket = known or FixedRollouts(
                    proxy(self), hooks, draw, len(prompts), length, self._recordings.new_recorder()
                )
                found = bucket.record_or_replay(
                    partial(bucket.load, prompts, draw, hooks), partial(bucket.walk, answers=answers)
                )
                bucket.wanted_before.update(bucket.wanted)
            return bucket, found

        self._samplers[id(sampler)] = sampler
        key = "rollouts", len(prompts), draw.rollouts_R.shape[0], length, id(sampler), answers
        return self._recordings.compute(key, usual, fixed)
