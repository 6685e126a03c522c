"""Draft heads: guesses that are predicted, their training, and what refuses another model's."""

import json

import pandas as pd
import pytest
import tiny
import torch
from against_oracle import MASKS, NOISE, TOLERANCE, assert_rows_equal, name, roll
from refusal import check_refused
from torch.utils.flop_counter import FlopCounterMode

from latent_tts.checkpoint.draft import DraftRecord
from latent_tts.engine.draft import DraftHead, load_draft, save_draft
from latent_tts.engine.rollout import Engine
from latent_tts.errors import UsageError
from latent_tts.model.coconut import Coconut
from latent_tts.sampler.dropout import Dropout
from latent_tts.sampler.greedy import Greedy
from latent_tts.schedule import Counts
from latent_tts.schedule.jacobi import Jacobi
from latent_tts.schedule.speculative import Speculative
from latent_tts.training.draft import LatentDrawer, relative_errors, train_draft
from latent_tts.types import Question

IN_THOUGHTS = Dropout(0.2, "residual_embedding", ["thoughts"], "fresh")
DRAFTED = {"guess": "draft", "draft": "draft.safetensors"}


def head_of(latents, seed=0):
    torch.manual_seed(seed)
    return DraftHead(latents, tiny.WIDTH).eval().requires_grad_(False)


@pytest.mark.every_other
@pytest.mark.parametrize("stop_id", [None, 11], ids=["fixed", "stops"])
@pytest.mark.parametrize("sampler", [Greedy(), NOISE, IN_THOUGHTS, MASKS], ids=name)
@pytest.mark.parametrize("chunk", [None, 2])
def test_with_any_draft_committed_latents_are_the_sequential_ones(sampler, chunk, stop_id):
    prompts, reasoner = tiny.prompts([5, 1, 9]), tiny.reasoner("gpt2")
    more = {"stop_id": stop_id, "answer": 2}
    there = roll(Engine(reasoner, tiny.plan(5, **more)), prompts, range(2), sampler)
    schedules = [Speculative(chunk, **DRAFTED), Speculative(chunk, **DRAFTED, mixing=2)]
    schedules += [Jacobi(chunk or 5, chunk, **DRAFTED)] if stop_id is None else []
    for schedule in schedules:
        engine = Engine(reasoner, tiny.plan(5, **more, schedule=schedule), head_of(5))
        here = roll(engine, prompts, range(2), sampler)
        torch.testing.assert_close(here.latents_RTD, there.latents_RTD, **TOLERANCE)
        assert here.answer_ids == there.answer_ids
        assert here.steps_R.tolist() == there.steps_R.tolist()


@pytest.mark.parametrize("sampler", [Greedy(), NOISE, IN_THOUGHTS], ids=name)
def test_right_predictions_are_committed_in_one_sweep(sampler):
    # latents hardly depend on anything, so that the head's means predict them, but for the rollout's own noise
    reasoner = tiny.reasoner("gpt2", next_latent=lambda hidden: 1e-4 * hidden + torch.linspace(-1, 1, tiny.WIDTH))
    head = head_of(6)
    head.mean_SD.copy_(torch.linspace(-1, 1, tiny.WIDTH).expand(5, -1))
    head.scale.zero_()
    plan = tiny.plan(6, schedule=Speculative(None, 0.01, **DRAFTED))
    result = roll(Engine(reasoner, plan, head), tiny.prompts([5, 2]), range(2), sampler)
    first_alone = sampler is IN_THOUGHTS  # the first latent is then no part of the prompt's pass
    assert result.sweeps_R.tolist() == [1 + first_alone] * 4
    assert not result.conflicts_R.any()
    zero = tiny.plan(6, schedule=Speculative(None, 0.01, "zero"))
    assert roll(Engine(reasoner, zero), tiny.prompts([5, 2]), range(2), sampler).conflicts_R.all()


def test_a_prediction_does_not_depend_on_its_batch():
    engine = Engine(tiny.reasoner("gpt2"), tiny.plan(5, schedule=Jacobi(1, **DRAFTED)), head_of(5))
    prompts = tiny.prompts([9, 1, 4])
    for sampler in (NOISE, MASKS):
        whole, alone = roll(engine, prompts, range(3), sampler), roll(engine, prompts[1:2], range(2, 3), sampler)
        # predictions are float32
        torch.testing.assert_close(alone.latents_RTD[0], whole.latents_RTD[5], rtol=0, atol=1e-5)
        assert alone.answer_ids[0] == whole.answer_ids[5]


def test_a_file_gives_back_the_head(tmp_path):
    head, record = head_of(4), DraftRecord("digest", 4, tiny.WIDTH)
    head.mean_SD.fill_(3.0)
    save_draft(head, tmp_path / "draft", record)
    loaded = load_draft(tmp_path / "draft", record, torch.device("cpu"))
    inputs = torch.randn(2, tiny.WIDTH), torch.randn(2, 7, tiny.WIDTH), torch.tensor([7, 3])
    assert torch.equal(head(*inputs), loaded(*inputs))
    other = inputs[1].clone()
    other[1, 3:] = 9.0  # padding
    assert torch.equal(loaded(inputs[0], other, inputs[2]), loaded(*inputs))


def test_operations_are_those_of_a_prediction(monkeypatch):
    # the counter does not see into torch's fused operators, which scores and sums of attention are on CPUs
    monkeypatch.setattr("torch.backends.mha.get_fastpath_enabled", lambda: False)
    head, prompt = head_of(9), 20
    with FlopCounterMode(display=False) as counter:
        head(torch.zeros(1, tiny.WIDTH), torch.zeros(1, prompt, tiny.WIDTH), torch.tensor([prompt]))
    attention = 2 * 2 * 8 * (8 + prompt + 1) * tiny.WIDTH
    assert DraftRecord("", 9, tiny.WIDTH).flops(prompt) == counter.get_total_flops() + attention


def question(number):
    return Question(str(number), str(number), None)


@pytest.mark.every_other
@pytest.mark.parametrize("stop_id", [None, 11], ids=["fixed", "stops"])
def test_training_makes_predictions_better(stop_id):
    engine = Engine(tiny.reasoner("gpt2", torch.float32), tiny.plan(4, stop_id=stop_id))

    def encode(question):
        return [(int(question.id) * place + place) % 60 for place in range(3, 9)]

    drawer = LatentDrawer(engine, encode, NOISE, 0)
    valid, losses = [question(number) for number in range(1000, 1020)], []
    heads = [
        train_draft(
            drawer, iter(map(question, range(1, 900))), updates=updates, batch=16, lr=3e-3, seed=0,
            report=lambda _, loss: losses.append(loss),
        )
        for updates in (1, 30)
    ]  # fmt: skip
    before, after = (relative_errors(head, drawer, valid) for head in heads)
    assert len(after) == 3
    assert after[0] < 0.9 * before[0]
    assert losses[-1] < losses[0]


# --- through the command line


@pytest.fixture
def write_draft(place, checkpoint):
    """Write an untrained draft head for the tiny reasoner with T=3: `write_draft(name)` returns its path."""
    adapter = Coconut(name="tiny", checkpoint=str(checkpoint), latents=3, recommended={})

    def write(name):
        torch.manual_seed(0)
        save_draft(DraftHead(3, adapter.width), place / name, DraftRecord(adapter.digest, 3, adapter.width))
        return place / name

    return write


def test_a_run_takes_a_draft_and_keeps_rollouts_of_others_apart(write_draft, ltts, run, checkpoint):
    few = "model.latents=3", "updates=2", "batch=4", "valid_questions=4", "sampler=gaussian"
    trained = ltts("train-draft", f"model.checkpoint={checkpoint}", *few, "output=trained")
    assert trained.code == 0, trained.err
    assert "relative RMS error of each predicted latent" in trained.out
    paths = [trained.last, write_draft("untrained")]
    counts, line = [], ["model.latents=3", "n=2", "schedule=speculative", "schedule.tolerance=0.5"]
    for path in [*paths, paths[0]]:
        result = run(*line, "schedule.guess=draft", f"schedule.draft={path}", "schedule.verify=true")
        assert result.code == 0, result.err
        folder = result.last.parent
        counts.append(json.loads((folder / "run.json").read_text())["rollouts"]["drawn_now"])
        assert pd.read_parquet(folder / "rollouts.parquet")["sweeps"].between(1, 4).all()
    assert counts == [12, 12, 0]


@pytest.mark.slow
def test_a_draft_guesses_the_latents_of_another_question_too(write_draft, run):
    draft = "schedule.guess=draft", f"schedule.draft={write_draft('untrained')}"
    result = run("model.latents=3", "n=1", "sampler=control", "sampler.mode=shuffle", "schedule=speculative", *draft)
    assert result.code == 0, result.err


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model=demo_coconut", "model.latents=3"], ["schedule.draft=", "other weights than"]),
        (["model.latents=4"], ["schedule.draft=", "trained for model.latents=3, not 4"]),
    ],
)
def test_a_draft_of_another_model_is_refused(write_draft, checkpoint, overrides, words):
    line = ["task.limit=2", "schedule=speculative", "schedule.guess=draft", f"schedule.draft={write_draft('draft')}"]
    own = [] if "model=demo_coconut" in overrides else [f"model.checkpoint={checkpoint}"]
    check_refused("run", *overrides, *own, *line, words=words)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["schedule.guess=draft"], ["schedule.draft=null", "ltts train-draft"]),
        (["schedule.guess=draft", "schedule.draft=nowhere"], ["schedule.draft=nowhere", "no file"]),
        (["schedule.guess=draft", "schedule.draft=text"], ["schedule.draft=text", "no draft head"]),
        (["schedule.draft=text"], ["schedule.draft=text", "schedule.guess=token"]),
        (["schedule.guess=draft", "schedule.draft=text", "model.latents=1"], ["schedule.guess=draft", "latents=1"]),
        (["schedule.mixing=-1"], ["schedule.mixing=-1", "0 or more"]),
    ],
)
def test_a_run_refuses(refuse, place, overrides, words):
    (place / "text").write_text("text")
    refuse("schedule=speculative", *overrides, words=words)


@pytest.mark.every_other
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["updates=0"], ["updates=0"]),
        (["lr=0"], ["lr=0", "a positive number"]),
        (["model.latents=1"], ["model.latents=1", "2 or more"]),
        (["model=demo_pccot"], ["own sweeps"]),
        (["sampler=control", "sampler.mode=shuffle"], ["sampler=control"]),
        (["task.split=test"], ["task.split=test"]),
    ],
)
def test_train_draft_refuses(place, overrides, words):
    check_refused("train_draft", *overrides, words=words)


# --- mixing of earlier sweeps


def contracting(scale):
    return tiny.reasoner("gpt2", next_latent=lambda hidden: scale * hidden + torch.linspace(-1, 1, tiny.WIDTH))


class Chain:
    """Latents h_t = 0.9 h_(t-1) + b that begin at their limit, as a schedule drives them."""

    total, first_is_free = 20, False

    def __init__(self):
        self.latents_RTD = torch.zeros(2, self.total, 3)
        self.counts = Counts(*(torch.zeros(2, dtype=torch.int64) for _ in range(3)))
        self.bias_R1D = torch.tensor([[[1.0, 2.0, -1.0]], [[0.5, 0.0, 3.0]]])

    def guess(self, start, stop, what):
        assert what == "zero"

    def compute(self, first, stop):
        before = torch.cat([10 * self.bias_R1D, self.latents_RTD], 1)[:, first:stop]
        return 0.9 * before + self.bias_R1D, None

    def commit_until(self, steps_R):
        assert steps_R.tolist() == [self.total] * 2


def test_mixing_finds_the_limit_of_sweeps_that_all_shrink_the_error_alike():
    counts = []
    for mixing in (0, 1, 3):
        chain = Chain()
        Speculative(None, 1e-3, "zero", mixing=mixing).run(chain)
        counts.append(chain.counts.sweeps_R.tolist())
        made_RTD, _ = chain.compute(0, chain.total)
        torch.testing.assert_close(chain.latents_RTD, made_RTD, rtol=2e-3, atol=0)
    assert counts[0] == [20, 20]  # only what is exact so far moves on, a latent per sweep
    assert max(counts[1]) <= 10
    assert max(counts[2]) <= 10


def test_what_a_row_mixes_does_not_depend_on_its_batch():
    plan = tiny.plan(6, schedule=Speculative(4, 1e-3, "zero", mixing=2))
    engine, prompts = Engine(contracting(0.05), plan), tiny.prompts([9, 1, 4])
    whole, alone = roll(engine, prompts, range(3), NOISE), roll(engine, prompts[1:2], range(2, 3), NOISE)
    assert_rows_equal(alone, 0, whole, 5)
    assert int(alone.sweeps_R) == int(whole.sweeps_R[5])


def test_a_bad_number_of_mixed_sweeps_is_named():
    with pytest.raises(UsageError, match=r"\Aschedule\.mixing="):
        Speculative(mixing=1.5)
