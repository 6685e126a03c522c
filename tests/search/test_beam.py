"""Beam search against a search by hand over the one-row oracle, and through the command line."""

import json
import re

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from marks import slow
from oracle import Oracle, plain_scores

from latent_tts.engine.decoding import AnswerSampling
from latent_tts.engine.packing import RolloutJob
from latent_tts.engine.rollout import Engine
from latent_tts.engine.scoring import LatentScorer
from latent_tts.errors import RunError
from latent_tts.random.draw import Draw
from latent_tts.random.philox import key_of
from latent_tts.sampler.dropout import Dropout
from latent_tts.sampler.gaussian import Gaussian
from latent_tts.search.beam import Beam, children, copies, prefix_scores

T, LENGTHS = 3, [5, 1]
NOISE, MASKS = Gaussian(1.0, False), Dropout(0.4, "residual", ["thoughts"], "fresh")
EVERYWHERE = Dropout(0.3, "residual_embedding", ["prompt", "thoughts", "answer"], "fresh")


def child(parent: int, step: int, candidate: int) -> int:
    return int(children(torch.tensor([[parent]]), step, torch.tensor([candidate]))[0, 0])


def grow(beam, engine, scorer, reduction, prompts, ids, sampler):
    batch = [RolloutJob(id_, id_, prompt, list(range(beam.beams))) for id_, prompt in zip(ids, prompts, strict=True)]
    return beam.roll(engine, batch, sampler, 0, scorer=scorer, reduction=reduction)


class ByHand:
    """The docstring of `search/beam.py`, one prefix at a time: a prefix is the tuple of its lineage codes."""

    def __init__(self, family, sampler, plan, prompt, question, beam, reduce):
        self.oracle = Oracle(tiny.reasoner(family), plan)
        self.family, self.sampler, self.prompt, self.question = family, sampler, prompt, question
        self.beam, self.reduce = beam, reduce
        self.rows = {}

    def row(self, codes):
        key = torch.tensor([key_of(0, f"{self.question} beams")])
        draws = [(step, Draw(key, torch.tensor([code]), tiny.WIDTH)) for step, code in enumerate(codes)]
        return self.oracle.roll(self.prompt, self.sampler, question_id="", rollout=0, branches=draws)

    def score(self, codes):
        latents = self.row(codes).latents_TD[: len(codes)]
        steps = plain_scores(self.family, self.prompt, latents).tolist()
        return {"sum": np.sum, "mean": np.mean, "last": lambda s: s[-1]}[self.reduce](steps) if steps else -np.inf

    def search(self):
        beams, candidates = self.beam.beams, self.beam.candidates
        grown = [(child(0, 0, j),) for j in range(beams * candidates)]
        for step in range(T):
            scores = [self.score(codes) for codes in grown]
            order = sorted(range(len(grown)), key=lambda i: (-scores[i], i))
            if self.beam.diverse:
                best = [max(range(b * candidates, (b + 1) * candidates), key=lambda i: scores[i]) for b in range(beams)]
                order = [i for i in order if i in best]
            kept = [grown[i] for i in order[:beams]]
            grown = [(*codes, child(codes[-1], step + 1, c)) for codes in kept for c in range(candidates)]
        return [self.row(codes) for codes in kept]


@pytest.mark.parametrize(
    ("family", "sampler", "diverse", "reduce"),
    [
        slow("gpt2", NOISE, False, "sum"),
        ("gpt2", MASKS, True, "last"),
        slow("qwen3", EVERYWHERE, False, "mean"),
        slow("llama", NOISE, True, "sum"),
        slow("gpt2", AnswerSampling(1.5, 0.9).over(NOISE), False, "sum"),
        slow("mistral", NOISE, False, "sum"),  # these two through transformers' own attention and cache
        slow("gpt_neo", EVERYWHERE, True, "mean"),
    ],
)
def test_the_search_equals_one_by_hand(family, sampler, diverse, reduce):
    beam, prompts, ids = Beam(2, 2, diverse), tiny.prompts(LENGTHS), ["a", "b"]
    plan = tiny.plan(T, eos_id=tiny.EOS_IDS.get(family, tiny.NEVER), answer=2)
    scorer = LatentScorer(tiny.proven(tiny.reward_model(family)))
    found = grow(beam, Engine(tiny.proven(tiny.reasoner(family)), plan), scorer, reduce, prompts, ids, sampler)
    for question in range(len(prompts)):
        by_hand = ByHand(family, sampler, plan, prompts[question], ids[question], beam, reduce).search()
        for place, wanted in enumerate(by_hand):
            row = question * beam.beams + place
            torch.testing.assert_close(found.latents_RTD[row], wanted.latents_TD, rtol=0, atol=1e-6)
            assert found.answer_ids[row] == wanted.answer_ids


@pytest.mark.parametrize("value", [float("nan"), slow(float("inf"))])
def test_a_step_score_that_is_not_finite_names_the_question_though_its_candidate_would_not_survive(monkeypatch, value):
    engine, scorer = Engine(tiny.reasoner("gpt2"), tiny.plan(T)), LatentScorer(tiny.reward_model("gpt2"))
    extend, steps = scorer.extend, []

    def spoiled(state, latents_RSD):
        scores_RS = extend(state, latents_RSD)
        steps.append(len(scores_RS))
        if len(steps) == 2:
            scores_RS[-1] = value
        return scores_RS

    monkeypatch.setattr(scorer, "extend", spoiled)
    with pytest.raises(RunError, match="step scores of question b are not finite"):
        grow(Beam(2, 2, False), engine, scorer, "sum", tiny.prompts([5, 2]), ["a", "b"], NOISE)


def test_questions_do_not_depend_on_their_batch():
    engine, scorer = Engine(tiny.reasoner("gpt2"), tiny.plan(T)), LatentScorer(tiny.reward_model("gpt2"))
    prompts, ids, beam = tiny.prompts([5, 2, 9]), ["a", "b", "c"], Beam(2, 3, False)
    together = grow(beam, engine, scorer, "sum", prompts, ids, MASKS)
    alone = grow(beam, engine, scorer, "sum", prompts[1:2], ids[1:2], MASKS)
    torch.testing.assert_close(together.latents_RTD[2:4], alone.latents_RTD, rtol=0, atol=1e-6)
    assert together.answer_ids[2:4] == alone.answer_ids


def test_a_beam_as_wide_as_the_budget_keeps_every_root():
    engine, scorer = Engine(tiny.reasoner("gpt2"), tiny.plan(T)), LatentScorer(tiny.reward_model("gpt2"))
    wide = grow(Beam(4, 1, False), engine, scorer, "sum", tiny.prompts([5]), ["a"], NOISE)
    greedy_best = grow(Beam(1, 4, False), engine, scorer, "sum", tiny.prompts([5]), ["a"], NOISE)
    assert len(wide.answer_ids) == 4
    assert len({tuple(row.flatten().tolist()) for row in wide.latents_RTD}) == 4
    assert len(greedy_best.answer_ids) == 1


def test_a_row_that_stopped_by_a_token_has_one_continuation():
    plan = tiny.plan(4, stop_id=34, answer=2)
    scorer = LatentScorer(tiny.reward_model("gpt2"))
    engine = Engine(tiny.reasoner("gpt2"), plan)
    found = grow(Beam(3, 2, False), engine, scorer, "mean", tiny.prompts([9, 1]), ["q0", "q1"], NOISE)
    assert len(set(found.steps_R.tolist())) > 1
    for question in range(2):
        rows = [tuple(found.latents_RTD[question * 3 + place].flatten().tolist()) for place in range(3)]
        assert len(set(rows)) == 3, "the same finished row was kept twice"


def test_candidates_that_stopped_are_one_and_those_that_think_on_are_kept():
    stopped = torch.tensor([[False, True, True, True, True, False, True, False]])
    assert copies(stopped, 4).tolist() == [[False, False, True, True, False, False, True, False]]


def test_children_have_codes_of_their_own():
    parents = torch.arange(50)[:, None].expand(50, 20)
    codes = {int(code) for step in range(4) for code in children(parents, step, torch.arange(20)).flatten()}
    assert len(codes) == 4 * 50 * 20
    assert all(0 <= code < 2**32 for code in codes)


def test_reductions_leave_out_steps_that_are_not_there():
    scores = torch.tensor([[[1.0, 2.0, 6.0], [1.0, 2.0, float("nan")], [float("nan")] * 3]])
    assert prefix_scores(scores, "sum").tolist() == [[9.0, 3.0, -np.inf]]
    assert prefix_scores(scores, "mean").tolist() == [[3.0, 1.5, -np.inf]]
    assert prefix_scores(scores, "last").tolist() == [[6.0, 2.0, -np.inf]]


@pytest.fixture
def beam_run(run, checkpoint, tmp_path):
    latent_rm = tiny.write_latent_rm(tmp_path / "rm", checkpoint)
    scored = ("scorer=latent_rm", f"scorer.checkpoint={latent_rm}")
    return lambda *overrides: run("search=beam", "sampler=gaussian", "task.limit=3", *scored, *overrides)


def test_a_beam_run_keeps_its_beams_and_costs_what_n_rollouts_cost(beam_run):
    result = beam_run("n=6", "search.beams=2", "search.candidates=3")
    assert result.code == 0, result.err
    metrics = pd.read_csv(result.last, keep_default_na=False)
    rollouts = pd.read_parquet(result.last.parent / "rollouts.parquet")
    assert rollouts.groupby("question_id").size().tolist() == [2, 2, 2]
    assert (rollouts.groupby("question_id")["score"].first() >= rollouts.groupby("question_id")["score"].last()).all()
    assert set(metrics["search"]) == {"beam"}
    assert set(metrics["n"]) == {6}
    value = pd.to_numeric(metrics.set_index(["metric", "aggregator"])["value"])  # the floor of a search is empty
    assert value["latent_steps", ""] == 6 * rollouts["latent_steps"].mean()
    assert value["answer_tokens", ""] == pytest.approx(2 * rollouts["answer_tokens"].mean())
    first = rollouts.groupby("question_id", sort=False)["correct"].first()
    assert value["accuracy", "best_of_n"] == first.mean()
    again = beam_run("n=6", "search.beams=2", "search.candidates=3")
    pd.testing.assert_frame_equal(pd.read_parquet(again.last.parent / "rollouts.parquet"), rollouts)
    assert "grown" not in again.err


BAD = [
    (["n=5"], ["n=5", "search.beams * search.candidates = 4 * 4 = 16"]),
    (["search.beams=0"], ["search.beams=0"]),
    (["search.candidates=1.5"], ["search.candidates=1.5"]),
    (["search.diverse=maybe"], ["search.diverse"]),
    (["scorer.positions=official"], ["scorer.positions=official", "search=beam"]),
    (["sampler=greedy"], ["sampler=greedy"]),
    (["sampler.sigma=0"], ["sampler=gaussian", "make the continuations of a beam differ"]),
    (["sampler=dropout", "sampler.where=[prompt]"], ["sampler=dropout", "make the continuations of a beam differ"]),
    (["sampler=dropout", "sampler.where=[answer]"], ["sampler dropout", "the same latents"]),
    (["sampler=dropout", "sampler.mask=locked"], ["sampler.mask=locked"]),
    (["budget=ladder"], ["budget=ladder"]),
    (["schedule=jacobi"], ["schedule=jacobi", "search=beam"]),
    (["answer.decode=winners"], ["answer.decode=winners"]),
]


@pytest.mark.every_other
@pytest.mark.parametrize(("overrides", "words"), BAD, ids=lambda value: " ".join(value))
def test_a_beam_run_refuses(refuse, latent_rm, overrides, words):
    scored = "scorer=latent_rm", f"scorer.checkpoint={latent_rm}"
    refuse("search=beam", "sampler=gaussian", "task.limit=3", "n=16", *scored, *overrides, words=words)


def test_a_beam_run_needs_a_scorer(run):
    result = run("search=beam", "sampler=gaussian", "n=16", "scorer=none")
    assert result.code == 2
    assert "search=beam" in result.err


@pytest.mark.usefixtures("little_memory")
def test_rows_that_do_not_fit_are_fewer_and_that_is_said_and_recorded(beam_run):
    result = beam_run("n=4", "search.beams=2", "search.candidates=2", "engine.rows=4096")
    assert result.code == 0, result.err
    lowered = int(re.search(r"engine.rows: 4096 rows do not fit half of the free memory, (\d+) do", result.err)[1])
    recorded = json.loads((result.last.parent / "run.json").read_text())["rows"]
    assert max(recorded) <= max(lowered // 2, 2)  # beams, of two candidates each
