"""Recorded passes: one batch is recorded, and what is recorded gives the rollouts of other batches.

A GPU records kernels, here operators are recorded: what the host reads, or a pass keeps as a number, stays as it was in
the recorded batch.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import product
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import tiny
import torch
from against_oracle import NOISE, assert_rows_equal
from hypothesis import given
from hypothesis import strategies as st
from marks import slow
from recordable import FEW, PLANS, SAMPLERS
from recorders import Recording, Tracer
from torch import Tensor

from latent_tts.engine import attention, graphs, head, recording
from latent_tts.engine.graphs import FirstToken, GraphEngine, Latents, Move, NextToken
from latent_tts.engine.recording import Bucket, CudaRecorder, Prompts, Recordings
from latent_tts.engine.rollout import Engine, Rollouts
from latent_tts.engine.state import FixedState
from latent_tts.errors import RunError
from latent_tts.pipeline import models
from latent_tts.random import bits
from latent_tts.random.draw import Draw
from latent_tts.results.run_folder import read_rollouts
from latent_tts.sampler import Sampler
from latent_tts.sampler.gaussian import Gaussian
from latent_tts.types import Reasoner

N = 2
LENGTHS = [[9, 3], [2, 7], [1, 1], [4, 8]]
FINISH_UNEQUALLY = [(0, [9, 3, 5]), (4, [4, 8, 6]), (3, [4, 8, 6]), (1, [9, 3, 5])]


def decide(keys_R2: Tensor, rollouts_R: Tensor, places_P: Tensor, stream: int, threshold: int, kept: Tensor) -> None:
    """`bits.decide` by operators on a CPU too."""
    rows, places, tokens, _, per_token = kept.shape
    element_B = torch.arange(tokens * per_token // 4, device=kept.device)
    counter = element_B, places_P[None, :, None], rollouts_R[:, None, None], stream
    words = bits.philox(counter, (keys_R2[:, :1, None], keys_R2[:, 1:, None]))
    for half in range(2):
        halves = [word >> shift & 0xFFFF for word in words[2 * half : 2 * half + 2] for shift in (0, 16)]
        values = torch.stack(halves, -1).view(rows, places, tokens, per_token)
        kept[:, :, :, half] = (values ^ 0x8000) >= threshold


@pytest.fixture(autouse=True)
def decisions_by_operators(monkeypatch):
    """What draws masks on a CPU is no operator: a tracer does not see it."""
    monkeypatch.setattr(bits, "decide", decide)


def both(
    family: str = "gpt2",
    *,
    device: torch.device | str = "cpu",
    ends: bool = True,
    answer: int = 3,
    latents: int = 2,
    recorder: Callable[[], Any] = Recording,
    dtype: torch.dtype = torch.float64,
    **settings,
):
    """An engine, one that records, and the recorders that it has made."""
    made = tiny.reasoner(family, dtype, next_latent=lambda hidden: hidden.tanh())
    reasoner = Reasoner(made.lm.to(device), made.next_latent, lambda hidden: hidden.square())
    known = {name: settings.pop(name) for name in ("needed", "max_bytes") if name in settings}
    plan = tiny.plan(latents, eos_id=tiny.EOS_IDS[family] if ends else None, answer=answer, **settings)
    recorders: list[Any] = []

    def new_recorder() -> Any:
        recorders.append(recorder())
        return recorders[-1]

    settings = {"needed": True, "max_bytes": 1e9} | known
    recordings = Recordings(device, new_recorder=new_recorder, **settings)
    return Engine(reasoner, plan), GraphEngine(reasoner, plan, recordings), recorders


def rolled(engine: Engine, sampler: Sampler, number: int, lengths: list[int], *, answers: bool = True):
    """A batch that has keys, rollouts, prompts and donors of its own."""
    prompts = tiny.prompts([length + number for length in lengths])
    ids, numbers = (
        [f"{number}-{place}" for place in range(len(lengths))],
        torch.arange(number, number + N, device=engine.device),
    )
    draw = Draw.of(3, ids, numbers.repeat(len(lengths), 1), tiny.WIDTH, engine.blocks)
    donor_RTD = None
    if sampler.needs_donor:
        donor_RTD = torch.full(
            (len(lengths) * N, engine.plan.latents, tiny.WIDTH), 0.1 * number, dtype=torch.float64, device=engine.device
        )
    return engine.roll(prompts, draw, sampler, donor_RTD=donor_RTD, answers=answers)


def assert_same(found, wanted):
    torch.testing.assert_close(found.steps_R, wanted.steps_R)
    for row in range(len(wanted.answer_ids)):
        assert_rows_equal(found, row, wanted, row)


def check(family: str, sampler: Sampler, plan: dict, recorder: type[Recording] = Recording) -> None:
    eager, graphed, recorders = both(family, recorder=recorder, **plan)
    for number, lengths in enumerate(LENGTHS):
        assert_same(rolled(graphed, sampler, number, lengths), rolled(eager, sampler, number, lengths))
    assert recorders[0].recorded >= 2


@pytest.mark.every_other
@pytest.mark.parametrize(("family", "sampler", "plan"), FEW)
def test_a_recorded_batch_gives_the_rollouts_of_others(family, sampler, plan):
    check(family, SAMPLERS[sampler], PLANS[plan])


@pytest.mark.slow
@pytest.mark.parametrize(("family", "sampler", "plan"), FEW)
def test_so_does_a_traced_one(family, sampler, plan):
    check(family, SAMPLERS[sampler], PLANS[plan], Tracer)


def check_on(device: torch.device | str, recorder: Callable[[], Any], family: str, sampler: str, plan: str) -> None:
    eager, graphed, recorders = both(family, device=device, recorder=recorder, **PLANS[plan])
    for number, lengths in enumerate(LENGTHS):
        found, wanted = (rolled(engine, SAMPLERS[sampler], number, lengths) for engine in (graphed, eager))
        latents = found.latents_RTD.cpu(), wanted.latents_RTD.cpu()
        torch.testing.assert_close(*latents, rtol=0, atol=1e-3)  # noise is float32
        assert found.answer_ids == wanted.answer_ids
    assert len(recorders) == 1


@pytest.mark.gpu
@pytest.mark.parametrize(("family", "sampler", "plan"), FEW)
def test_so_does_a_graph_of_kernels(family, sampler, plan):
    check_on("cuda:0", CudaRecorder, family, sampler, plan)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("sampler", "plan"),
    [("gaussian", "stops by a token"), ("dropout everywhere", "no end"), ("drawn answers", "forced beginning")],
)
def test_so_does_a_graph_of_the_kernels_of_triton(monkeypatch, dtype, sampler, plan):
    """In float64, and with heads as narrow as elsewhere here, operators compute."""
    monkeypatch.setattr(sys.modules[__name__], "N", 8)
    eager, graphed, _ = both("qwen3", device="cuda:0", dtype=dtype, recorder=CudaRecorder, **PLANS[plan])
    assert attention.has_kernel(torch.empty(16, dtype=dtype, device="cuda:0"))
    assert head.has_kernel(torch.empty(16, dtype=dtype, device="cuda:0"))
    roundings, most = recording._OTHER_ORDER[dtype.itemsize < 4]
    for number, lengths in enumerate(LENGTHS):
        found, wanted = (rolled(engine, SAMPLERS[sampler], number, lengths) for engine in (graphed, eager))
        assert graphs.FixedRollouts.agreement(graphed, found, wanted, roundings) >= most
    (bucket,) = graphed._recordings.buckets.values()
    assert len(bucket.trusted) >= 3


@pytest.mark.gpu
def test_what_waits_for_a_gpu_is_not_recorded_and_others_are(caplog):
    eager, graphed, recorders = both(needed=False, device="cuda:0", recorder=CudaRecorder)
    for number in range(3):
        found, wanted = (rolled(engine, ReadsOnTheHost(), number, [9, 3]) for engine in (graphed, eager))
        assert found.answer_ids == wanted.answer_ids
    assert len(recorders) == 1
    assert "run without CUDA graphs" in caplog.text
    test_so_does_a_graph_of_kernels("gpt2", "gaussian", "plain")


def test_a_recording_that_a_gpu_breaks_off_gives_its_memory_back(monkeypatch):
    done = []

    class BreaksOff(nullcontext):
        def __exit__(self, *exception):
            raise RuntimeError("operation failed due to a previous error during capture")

    for name in ("CUDAGraph", "Stream", "current_stream", "graph_pool_handle"):
        monkeypatch.setattr(torch.cuda, name, lambda *given: (0, 7))
    for name in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, name, nullcontext)
    monkeypatch.setattr(torch.cuda, "graph", lambda *given, **named: BreaksOff())
    monkeypatch.setattr(recording, "_recording_stream", lambda device: None)
    for name in ("endAllocateToPool", "releasePool"):
        monkeypatch.setattr(torch._C, f"_cuda_{name}", lambda *given, name=name: done.append((name, *given)))

    def run():
        raise ValueError("operation not permitted when stream is capturing")

    tensor: Any = SimpleNamespace(device=torch.device("cuda", 0))
    with pytest.raises(ValueError, match="not permitted"):
        CudaRecorder().record(run, [tensor])
    assert done == [("endAllocateToPool", 0, (0, 7)), ("releasePool", 0, (0, 7))]


@pytest.mark.gpu
@pytest.mark.usefixtures("moves_soon")
def test_a_graph_of_kernels_moves_rows(monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "N", 8)
    plan = PLANS["stops by a token"]
    eager, graphed, _ = both("gpt2", device="cuda:0", recorder=CudaRecorder, answer=12, **plan)
    for number, lengths in FINISH_UNEQUALLY:
        found, wanted = (rolled(engine, NOISE, number, lengths) for engine in (graphed, eager))
        assert found.answer_ids == wanted.answer_ids
    (bucket,) = graphed._recordings.buckets.values()
    assert any(isinstance(passes, Move) for passes in bucket.trusted)


@pytest.mark.slow
@pytest.mark.parametrize(("sampler", "plan"), list(product(SAMPLERS, PLANS)))
def test_so_does_every_sampler_with_every_plan(sampler, plan):
    if PLANS[plan]["latents"] == 0 and SAMPLERS[sampler].only_latents:
        pytest.skip("there are no latents to change")
    check("llama_tied", SAMPLERS[sampler], PLANS[plan])


@pytest.mark.slow
@pytest.mark.parametrize("model", ["demo_coconut", "demo_codi", "demo_colar", "demo_cot"])
def test_so_does_every_adapter(ltts, monkeypatch, tmp_path, model):
    line = ["run", f"model={model}", "task.limit=12", "n=4", "engine.rows=8", "max_answer_tokens=4", "budget=fixed"]
    line += ["sampler=greedy", "answer.temperature=1"] if model == "demo_cot" else ["sampler=gaussian"]
    runs = []
    for way in ("eager", "recorded"):
        runs.append(ltts(*line, f"paths.cache={tmp_path / way}"))
        assert runs[-1].code == 0, runs[-1].err
        monkeypatch.setattr(
            models, "open_recordings", lambda settings, device, share: Recordings(device, new_recorder=Recording)
        )
    there, here = (read_rollouts(run.last.parent) for run in runs)
    assert "without CUDA graphs" not in runs[1].err
    assert list(here["answer_text"]) == list(there["answer_text"])
    torch.testing.assert_close(*(torch.tensor(table["answer_logprob"]) for table in (here, there)), rtol=0, atol=1e-4)


def test_latents_are_made_without_answers():
    eager, graphed, recorders = both()
    for number, lengths in enumerate(LENGTHS):
        found, wanted = (rolled(engine, NOISE, number, lengths, answers=False) for engine in (graphed, eager))
        torch.testing.assert_close(found.latents_RTD, wanted.latents_RTD, rtol=0, atol=1e-9)
        assert found.answer_ids == [[]] * 4
    assert recorders[0].recorded == 2  # prompts and latents


def test_without_answers_each_batch_has_its_own_numbers_of_latents():
    eager, graphed, _ = both(latents=4, stop_id=11)
    for number, lengths in enumerate([*LENGTHS, [5, 5], [7, 2]]):
        found, wanted = (rolled(engine, NOISE, number, lengths, answers=False) for engine in (graphed, eager))
        assert found.steps_R.tolist() == wanted.steps_R.tolist()


@pytest.mark.parametrize(("family", "sampler", "plan"), [FEW[0], slow(*FEW[3])])
def test_long_prompts_are_not_recorded(monkeypatch, family, sampler, plan):
    monkeypatch.setattr(graphs, "PROMPT_TOKENS", 0)
    ran = passes_run(monkeypatch)
    check(family, SAMPLERS[sampler], PLANS[plan])
    assert not any(isinstance(passes, Prompts) for passes in ran)


def passes_run(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The passes that are run from now on, without those that are replayed."""
    ran: list[object] = []
    run = graphs.FixedRollouts.run
    monkeypatch.setattr(graphs.FixedRollouts, "run", lambda self, passes: (ran.append(passes), run(self, passes)))
    return ran


@pytest.fixture
def moves_soon(monkeypatch):
    """Rows move to smaller tensors as soon as half of them have finished."""
    monkeypatch.setattr(graphs, "MIN_ROWS", 1)
    monkeypatch.setattr(graphs, "MIN_WANTED", 0)


@pytest.mark.usefixtures("moves_soon")
@pytest.mark.parametrize(
    ("family", "sampler", "plan"),
    [
        ("gpt2", "gaussian", "stops by a token"),
        slow("gpt2", "gaussian", "plain"),
        slow("gpt2", "dropout everywhere but in answers", "stops by a token"),
    ],
)
def test_rows_that_go_on_move_to_smaller_tensors(monkeypatch, family, sampler, plan):
    monkeypatch.setattr(sys.modules[__name__], "N", 8)
    eager, graphed, _ = both(family, answer=12, **PLANS[plan])
    for number, lengths in FINISH_UNEQUALLY:
        found, wanted = (rolled(engine, SAMPLERS[sampler], number, lengths) for engine in (graphed, eager))
        assert_same(found, wanted)
    (bucket,) = graphed._recordings.buckets.values()
    moves = {passes for passes in bucket.trusted if isinstance(passes, Move)}  # replayed in more than one batch
    assert moves
    assert all(2 * move.target[0] * move.target[1] <= move.source[0] * move.source[1] for move in moves)


@pytest.mark.slow
def test_rows_move_once_other_batches_have_wanted_it(monkeypatch):
    monkeypatch.setattr(graphs, "MIN_ROWS", 1)
    monkeypatch.setattr(sys.modules[__name__], "N", 4)
    ran, graphed = passes_run(monkeypatch), both("gpt2", answer=12, **PLANS["stops by a token"])[1]
    for batch in range(4):
        rolled(graphed, NOISE, 3, [4, 8, 6])
        assert any(isinstance(passes, Move) for passes in ran) == (batch >= graphs.MIN_WANTED)


@pytest.mark.parametrize(
    ("left_P", "grid", "smaller"),
    [
        ([64] * 64, (64, 64), None),
        ([64] * 33 + [0] * 31, (64, 64), None),  # 64 questions in powers of two
        ([64] * 32 + [0] * 32, (64, 64), (32, 64)),
        ([9] + [1] * 63, (64, 64), (64, 16)),
        ([1, 0, 0, 0], (4, 4096), (1, 256)),
        ([1] + [0] * 63, (64, 64), (4, 64)),  # as many rows as a GPU runs at once
        ([1] * 10 + [0] * 10, (20, 20), None),  # 16 x 16
        ([1] * 8 + [0] * 12, (20, 26), None),  # 13 x 20
        ([1, 0], (2, 128), None),
    ],
)
def test_a_smaller_grid_holds_all_that_go_on_in_at_most_half_of_the_rows(left_P, grid, smaller):
    assert graphs.smaller_grid(left_P, grid) == smaller


@given(st.lists(st.integers(0, 40), min_size=1, max_size=40).filter(any), st.integers(1, 300))
def test_so_does_every_other_one(left_P, fewest):
    grid = len(left_P), 40
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "MIN_ROWS", fewest)
        found = graphs.smaller_grid(left_P, grid)
    if found is not None:
        assert grid[0] >= found[0] >= sum(left > 0 for left in left_P)
        assert grid[1] >= found[1] >= max(left_P)
        assert fewest <= found[0] * found[1] <= grid[0] * grid[1] / 2


def test_a_batch_is_recorded_when_another_one_of_its_sizes_comes():
    eager, graphed, recorders = both(needed=False)
    for number, (lengths, made) in enumerate([([9, 3], 0), ([40, 3], 0), ([2, 7], 1), ([33, 9], 2), ([5], 2)]):
        assert_same(rolled(graphed, NOISE, number, lengths), rolled(eager, NOISE, number, lengths))
        assert len(recorders) == made
    rolled(graphed, Gaussian(0.1, False), 0, [9, 3])
    assert len(recorders) == 2  # this sampler's first


def test_the_oldest_batches_give_way(caplog):
    eager, graphed, recorders = both()
    sizes = [[9, 3], [5], [1, 2, 3]]
    for number, lengths in enumerate(sizes[:2]):
        rolled(graphed, NOISE, number, lengths)
    small = sum(bucket.bytes for bucket in graphed._recordings.buckets.values())
    graphed._recordings.max_bytes = small + 1
    rolled(graphed, NOISE, 2, [6])
    assert len(graphed._recordings.buckets) == 2
    assert_same(rolled(graphed, NOISE, 2, sizes[2]), rolled(eager, NOISE, 2, sizes[2]))
    assert len(graphed._recordings.buckets) == 1
    graphed._recordings.max_bytes = 1
    for number in range(3):
        assert_same(rolled(graphed, NOISE, number, sizes[2]), rolled(eager, NOISE, number, sizes[2]))
    assert not graphed._recordings.buckets
    for lengths in sizes:
        assert_same(rolled(graphed, NOISE, 3, lengths), rolled(eager, NOISE, 3, lengths))
    assert len(recorders) == 3  # what had to give way is not recorded again


@dataclass(frozen=True)
class ReadsOnTheHost(Sampler):
    """What a recording keeps of it is wrong in other batches."""

    name: ClassVar[str] = "reads"

    def latent(self, h_RD: Tensor, draw: Draw, step: int) -> Tensor:
        return h_RD + 0.1 * draw.rollouts_R.tolist()[0]


def test_a_recording_that_gives_something_else_is_not_used(caplog):
    eager, graphed, recorders = both(needed=False)
    sampler = ReadsOnTheHost()
    for number in range(5):
        assert_same(rolled(graphed, sampler, number, [9, 3]), rolled(eager, sampler, number, [9, 3]))
    assert len(recorders) == 1
    (said,) = [record.message for record in caplog.records if "CUDA graphs" in record.message]
    assert "100.0% of the rollouts differ when they are replayed" in said
    graphed = both()[1]
    rolled(graphed, sampler, 0, [9, 3])
    with pytest.raises(RunError, match=r"engine\.graph=on: 100\.0% of the rollouts differ"):
        rolled(graphed, sampler, 1, [9, 3])


class Differs(Recording):
    """Its replays differ, as by kernels that sum in another order."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def record(self, run, tensors):
        replay = super().record(run, tensors)
        vectors = [tensor for tensor in tensors if tensor.dim() == 3 and tensor.shape[-1] == tiny.WIDTH]

        def differ() -> None:
            replay()
            for tensor in vectors:
                tensor.mul_(1 + self.by)

        return differ


@pytest.mark.parametrize(("by", "used"), [(1e-7, True), (1e-3, False)])
def test_replays_may_differ_by_rounding(caplog, by, used):
    _, graphed, _ = both(needed=False, recorder=partial(Differs, by))
    for number in range(3):
        rolled(graphed, NOISE, number, [9, 3])
    assert [bool(bucket.trusted) for bucket in graphed._recordings.buckets.values()] == [True] * used
    assert ("differ when they are replayed" in caplog.text) != used


class Remembers(Gaussian):
    """Keeps a tensor that a pass made, in memory that other recorded passes write to."""

    def latent(self, h_RD: Tensor, draw: Draw, step: int) -> Tensor:
        if step == 0:
            draw.spread_RD = torch.full_like(h_RD, 0.5)
        assert draw.spread_RD is not None
        return h_RD + draw.spread_RD


def test_what_a_pass_made_is_not_there_for_the_next_one():
    (_, graphed, _), sampler = both(stop_id=11), Remembers(0.3, False)  # each latent is a pass
    rolled(graphed, sampler, 0, [9, 3])
    with pytest.raises(RunError, match="differ when they are replayed"):
        rolled(graphed, sampler, 1, [9, 3])


class RecordsNothing(Recording):
    def record(self, run, tensors):
        return lambda: None


def test_a_recording_of_nothing_is_not_used(caplog):
    eager, graphed, _ = both(needed=False, recorder=RecordsNothing)
    for number in range(4):
        assert_same(rolled(graphed, NOISE, number, [9, 3]), rolled(eager, NOISE, number, [9, 3]))
    assert "differ when they are replayed" in caplog.text


class WritesNoAnswers(Recording):
    """Its replays leave the tokens of answers as they were."""

    def record(self, run, tensors):
        replay, answers = super().record(run, tensors), [each for each in tensors if each.shape == (2 * N, 3)]
        assert len(answers) == 1

        def all_others() -> None:
            before = answers[0].clone()
            replay()
            answers[0].copy_(before)

        return all_others


def test_neither_is_one_that_leaves_answers_as_they_were(caplog):
    eager, graphed, _ = both(needed=False, recorder=WritesNoAnswers)
    for number in range(4):
        assert_same(rolled(graphed, NOISE, number, [9, 3]), rolled(eager, NOISE, number, [9, 3]))
    assert "differ when they are replayed" in caplog.text


@pytest.mark.parametrize(("family", "sampler", "plan"), [FEW[0], FEW[3]])
def test_padding_stays_within_the_positions_of_the_model(family, sampler, plan):
    eager, graphed, recorders = both(family, **PLANS[plan])
    for number, lengths in enumerate([[66, 70], [72, 3], [1, 68]]):  # padded to 128 tokens; the model has 96 positions
        found, wanted = (rolled(engine, SAMPLERS[sampler], number, lengths) for engine in (graphed, eager))
        assert_same(found, wanted)
    assert recorders[0].recorded >= 2


class Fails(Recording):
    def record(self, run, tensors):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")


def test_what_cannot_be_recorded_runs_as_usual(caplog):
    eager, graphed, _ = both(needed=False)
    graphed._recordings.new_recorder = Fails
    for number in range(3):
        assert_same(rolled(graphed, NOISE, number, [9, 3]), rolled(eager, NOISE, number, [9, 3]))
    (said,) = [record.message for record in caplog.records if "CUDA graphs" in record.message]
    assert said.endswith("slower (operation not permitted when stream is capturing)")


def test_nothing_else_is_recorded_then_but_where_memory_was_short(caplog):
    for error, tried in ((RuntimeError("operation not permitted"), 1), (torch.OutOfMemoryError("out of memory"), 2)):
        eager, graphed, recorders = both(needed=False, recorder=partial(Raises, error))
        for number, lengths in enumerate([[9, 3], [2, 7], [5], [6]]):
            assert_same(rolled(graphed, NOISE, number, lengths), rolled(eager, NOISE, number, lengths))
        assert len(recorders) == tried
        assert len([record for record in caplog.records if error.args[0] in record.message]) == tried


class Raises(Recording):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def record(self, run, tensors):
        raise self.error


def test_what_could_not_be_recorded_has_given_its_memory_back_when_the_batch_runs_again(monkeypatch):
    _, graphed, _ = both(needed=False, recorder=partial(Raises, torch.OutOfMemoryError("out of memory")))
    rolled(graphed, NOISE, 0, [9, 3])
    made, held = [], []
    fixed, roll = graphs.FixedRollouts.__init__, Engine.roll
    monkeypatch.setattr(
        graphs.FixedRollouts, "__init__", lambda self, *rest: (fixed(self, *rest), made.append(weakref.ref(self)))[0]
    )
    monkeypatch.setattr(
        Engine, "roll", lambda *given, **named: (held.append([each() for each in made]), roll(*given, **named))[1]
    )
    rolled(graphed, NOISE, 1, [9, 3])
    assert held == [[None]]


def test_tensors_of_fixed_sizes_that_give_something_else_are_not_used(monkeypatch, caplog):
    eager, graphed, _ = both(needed=False)
    run = FixedState._run
    monkeypatch.setattr(FixedState, "_run", lambda self, embeddings, positions: run(self, embeddings, positions * 0))
    for number in range(3):
        assert_same(rolled(graphed, NOISE, number, [9, 3]), rolled(eager, NOISE, number, [9, 3]))
    assert "in tensors of fixed sizes" in caplog.text


def test_what_is_recorded_goes_with_its_engine():
    _, graphed, _ = both()
    rolled(graphed, NOISE, 0, [9, 3])
    (bucket,) = map(weakref.ref, graphed._recordings.buckets.values())
    assert bucket() is not None
    del graphed
    assert bucket() is None


def test_either_answer_will_do_where_the_two_most_probable_tokens_are_as_near_as_rounding():
    latents_RTD, nothing_R = torch.ones(3, 1, 2, dtype=torch.bfloat16), torch.zeros(3, dtype=torch.long)
    margins_R = torch.tensor([1e-3, 1e-3, 1.0])

    def rollouts(ids):
        counts = nothing_R, nothing_R, nothing_R
        return Rollouts(latents_RTD, nothing_R, ids, -margins_R, margins_R, nothing_R > 0, *counts)

    wanted, agreement = rollouts([[1], [2], [3]]), partial(graphs.FixedRollouts.agreement, None)
    assert agreement(rollouts([[1], [4], [5]]), wanted, roundings=1) == pytest.approx(2 / 3)
    assert agreement(rollouts([[1], [4], [5]]), wanted, roundings=0.01) == pytest.approx(1 / 3)


def test_finished_rows_are_noticed_one_pass_late(monkeypatch):
    _, graphed, _ = both(latents=40, answer=40, stop_id=11)
    monkeypatch.setattr(Bucket, "_record", lambda self, passes: None)
    ran = passes_run(monkeypatch)
    rollouts = rolled(graphed, NOISE, 0, [9, 3])
    thinking, tokens = int(rollouts.steps_R.max()), max(map(len, rollouts.answer_ids))
    assert thinking < 35
    assert tokens < 35
    # the pass that finds the end, and the one that is there before that is known
    assert sum(isinstance(passes, Latents) for passes in ran) == thinking + 2
    assert sum(isinstance(passes, FirstToken | NextToken) for passes in ran) == tokens + 2
