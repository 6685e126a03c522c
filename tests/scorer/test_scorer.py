"""Scorers from the command line: runs with one, `ltts rescore`, and what a user gets wrong."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from marks import slow
from refusal import check, check_refused
from safetensors.numpy import load_file

from latent_tts.engine.cost import Rates
from latent_tts.errors import UsageError
from latent_tts.model.coconut import Coconut
from latent_tts.pipeline import worker
from latent_tts.pipeline.batch import BatchScorer, batch_table
from latent_tts.pipeline.driver import jobs_of, split_by_offset
from latent_tts.pipeline.scores import CachedScores, reduce_scores, score_positions
from latent_tts.pipeline.spec import EngineSettings
from latent_tts.results.cache import MEASURED, SCORE_SCHEMA
from latent_tts.results.parts import write_part
from latent_tts.results.run_folder import read_metrics
from latent_tts.scorer.auto import auto
from latent_tts.scorer.latent_rm import LatentRM
from latent_tts.scorer.none import NoScorer
from latent_tts.task.arith import Arith
from latent_tts.types import Computation

SCORED = {"best_of_n", "weighted"}
WIDE = Path(__file__).parents[1] / "parity" / "latent_rm"


@pytest.fixture
def scored(run, latent_rm):
    """`ltts run` with a LatentRM."""
    return lambda *arguments: run("scorer=latent_rm", f"scorer.checkpoint={latent_rm}", *arguments)


@pytest.fixture
def refuse_scored(refuse, latent_rm):
    """A run with a LatentRM, which is to be refused."""
    return lambda *overrides, words: refuse(
        "scorer=latent_rm", f"scorer.checkpoint={latent_rm}", *overrides, words=words
    )


def tables(result) -> tuple[pd.DataFrame, pd.DataFrame, dict]:
    assert result.code == 0, result.err
    folder = result.last.parent
    record = json.loads((folder / "run.json").read_text())
    return pd.read_parquet(folder / "rollouts.parquet"), read_metrics(folder / "metrics.csv"), record


def rescore(ltts, source: Path, latent_rm: Path, *arguments):
    return ltts("rescore", source, "scorer=latent_rm", f"scorer.checkpoint={latent_rm}", *arguments)


# Runs


def test_without_a_scorer_the_default_run_says_so_in_one_line_and_reports_no_scored_picks(run):
    result = run()
    rollouts, metrics, _ = tables(result)
    assert result.err.count("scorer=auto") == 1
    assert set(metrics["aggregator"]) == {"", "majority", "likelihood"}
    assert rollouts["score"].isna().all()


def test_equal_latents_are_not_scored(run, latent_rm):
    line = ["sampler=greedy", "answer.temperature=1", "scorer=latent_rm", f"scorer.checkpoint={latent_rm}"]
    check(run(*line), "scorer=latent_rm", "the same latents")
    assert run(*line, "n=1").code == 0


def value(table, metric, aggregator="", n=4):
    found = table[(table["metric"] == metric) & (table["aggregator"] == aggregator) & (table["n"] == n)]
    return found["value"].item()


def test_a_run_with_a_scorer_reports_every_pick_from_the_same_rollouts(run, scored, latent_rm):
    result = run("scorer=none")
    assert "scorer=auto" not in result.err
    plain, plain_metrics, _ = tables(result)
    rollouts, metrics, record = tables(scored())
    pd.testing.assert_frame_equal(plain.drop(columns="score"), rollouts.drop(columns="score"))
    assert rollouts["score"].notna().all()
    assert set(metrics["aggregator"]) == {"", "majority", "likelihood"} | SCORED
    assert set(metrics["scorer"]) == {f"latent_rm:{latent_rm}"}
    assert record["rollouts"] == {"total": 24, "drawn_now": 0, "scored_now": 24}
    best = rollouts.sort_values(["score", "rollout"], ascending=[False, True]).groupby("question_id").first()
    assert value(metrics, "accuracy", "best_of_n") == best["correct"].mean()
    # the LatentRM has the reasoner's shape, but no answers to decode and no vocabulary to rank
    assert value(plain_metrics, "gflops") < value(metrics, "gflops") < 2 * value(plain_metrics, "gflops")
    added = value(metrics, "seconds") - value(plain_metrics, "seconds")
    assert added == pytest.approx(record["seconds"]["scoring"] / 6, abs=1e-8)  # the table has ten digits


def test_scores_are_kept_for_every_reduction_and_no_batch_changes_them(scored, ltts):
    total, _, _ = tables(scored())
    mean, metrics, record = tables(scored("scorer.reduce=mean"))
    assert record["rollouts"]["scored_now"] == 0
    assert "scorer.reduce=mean" in metrics["settings"].iloc[0]
    np.testing.assert_allclose(mean["score"], total["score"] / 6, rtol=1e-5)
    small = scored("engine.rows=3", "paths.cache=other", "scorer.reduce=last")
    last, _, record = tables(small)
    assert record["rollouts"]["scored_now"] == 24
    again, _, record = tables(scored("scorer.reduce=last"))
    assert record["rollouts"]["scored_now"] == 0
    np.testing.assert_allclose(last["score"], again["score"], rtol=0, atol=1e-4)
    assert not np.allclose(last["score"], mean["score"])
    result = ltts("compare", small.last.parent, small.last.parent)
    assert result.code == 0, result.err
    assert "best_of_n" in result.out
    assert "weighted" in result.out


def test_the_weighted_vote_takes_its_temperature_from_the_scorer(run, checkpoint, tmp_path):
    folder = tiny.write_latent_rm(tmp_path / "rm", checkpoint, {"temperature": 0.125, "reduce": "mean"})
    chosen = ("scorer=latent_rm", f"scorer.checkpoint={folder}", "aggregator=weighted")
    _, metrics, record = tables(run(*chosen))
    assert record["aggregators"]["weighted"]["temperature"] == 0.125
    assert set(metrics["aggregator"]) == {"", "weighted"}
    _, metrics, record = tables(run(*chosen, "aggregator.weighted.temperature=2"))
    assert record["aggregators"]["weighted"]["temperature"] == 2
    assert "aggregator.weighted.temperature=2" in metrics["settings"].iloc[0]


@pytest.mark.parametrize("positions", ["correct", "official"])
def test_scores_of_a_table_equal_plain_forward_passes(checkpoint, latent_rm, tmp_path, positions):
    adapter = Coconut("tiny", str(checkpoint), 6, {})
    scorer = LatentRM(str(latent_rm), None, positions)
    questions = Arith(split="test", limit=2, steps=[2, 3, 4, 5], seed=0).questions()
    prompts = {question.id: adapter.encode(question) for question in questions}
    texts = ["### 12", "### 7", "5 ### 200", "### 3", "### 4", "### 1234"]
    answer_tokens = [2, 2, 3, 2, 2, 5]  # long numbers are spelt
    latents = torch.randn(6, 6, 16, generator=torch.Generator().manual_seed(1))
    engine = EngineSettings("float32", "cpu", None)
    spec: Any = SimpleNamespace(
        adapter=adapter,
        questions=questions,
        prompts=prompts,
        n=3,
        scorer=scorer,
        given_scorer=scorer,
        engine=engine,
        kept=3,
        donors={},
        keep_steps=False,
    )
    spec.row_key, spec.guided = lambda question: question.id, False
    answer_ids = [adapter.tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    places = [(q.id, i) for q in questions for i in range(3)]
    rows = pd.DataFrame(places, columns=["row_key", "rollout"]).assign(latent_steps=6, answer_ids=answer_ids)
    rows = rows.assign(**dict.fromkeys(MEASURED, 1.0))
    offsets = score_positions(spec, rows)
    cached = CachedScores(spec, tmp_path / "cache", rows[["row_key", "rollout"]], Computation())

    batch_scorer = BatchScorer(spec, Rates(1e9, 1e9))
    for job in split_by_offset(jobs_of(spec, cached.rows.missing()), offsets):
        found = [places.index((job.row_key, number)) for number in job.rollouts]
        columns = batch_scorer.score([job], latents[found], torch.full((len(found),), 6))
        write_part(cached.open().folder, batch_table(SCORE_SCHEMA, [job], columns))
    cached.gather_rescored()
    scores = reduce_scores(spec, cached, rows, offsets, 6)
    assert scores.seconds > 0
    assert rows["seconds"].sum() == pytest.approx(6 + scores.seconds)
    assert scores.prefills == ([1, 1] if positions == "correct" else [2, 2])
    model = scorer.load(device="cpu", dtype="float32")
    for row, tokens in enumerate(answer_tokens):
        longest = max(answer_tokens[:3] if row < 3 else answer_tokens[3:])
        shift = longest - tokens if positions == "official" else 0
        prompt = prompts[questions[row // 3].id]
        vectors = torch.cat([model.backbone.wte(torch.tensor(prompt)), latents[row]])
        places = shift + torch.arange(len(vectors))
        hidden = model.backbone(inputs_embeds=vectors[None], position_ids=places[None]).last_hidden_state[0]
        assert model.classifier(hidden[len(prompt) :]).sum().item() == pytest.approx(scores.score[row], abs=1e-4)


def test_the_head_stays_in_float32_under_bfloat16(latent_rm):
    model = LatentRM(str(latent_rm), None, "correct").load(device="cpu", dtype="bfloat16")
    assert model.backbone.dtype == torch.bfloat16
    assert model.classifier(torch.ones(3, 16, dtype=torch.bfloat16)).dtype == torch.float32


# Winners


def test_winners_are_the_picks_of_the_same_rollouts_and_nothing_else_is_decoded(scored, ltts, latent_rm, no_figures):
    budget = ("budget=ladder", "max_answer_tokens=6")
    everything, all_metrics, _ = tables(scored(*budget, "paths.cache=other"))
    result = scored(*budget, "answer.decode=winners")
    rollouts, metrics, record = tables(result)
    np.testing.assert_allclose(rollouts["score"], everything["score"], atol=1e-4)
    decoded = rollouts["stop_reason"] != "not_decoded"
    assert decoded.sum() == record["rollouts"]["decoded_now"] < len(rollouts)
    exact = ["question_id", "rollout", "prediction", "correct", "stop_reason", "answer_text", "answer_tokens"]
    pd.testing.assert_frame_equal(rollouts.loc[decoded, exact], everything.loc[decoded, exact])
    assert rollouts.loc[~decoded, "prediction"].isna().all()
    assert (rollouts.loc[~decoded, "answer_tokens"] == 0).all()
    assert set(metrics["aggregator"]) == {"", "best_of_n"}
    assert "coverage" not in set(metrics["metric"])
    assert "answer.decode=winners" in metrics["settings"].iloc[0]
    for n in (1, 2, 4):
        first = everything[everything["rollout"] < n]
        best = first.loc[first.groupby("question_id")["score"].idxmax()]
        assert value(metrics, "accuracy", "best_of_n", n) == best["correct"].mean()
        assert value(metrics, "invalid_rate", n=n) == best["prediction"].isna().mean()
        assert value(metrics, "answer_tokens", n=n) == best["answer_tokens"].mean()
    assert value(metrics, "accuracy", "best_of_n") == value(all_metrics, "accuracy", "best_of_n")
    assert value(metrics, "diversity") == pytest.approx(value(all_metrics, "diversity"), rel=1e-4)
    assert value(metrics, "gflops") < value(all_metrics, "gflops")
    folder = result.last.parent
    check(rescore(ltts, folder, latent_rm), "answer.decode=winners")
    check(ltts("compare", folder, folder), "answer.decode=winners")
    again, _, record = tables(scored(*budget, "answer.decode=winners"))
    assert record["rollouts"] == {"total": 24, "drawn_now": 0, "scored_now": 0, "decoded_now": 0}
    pd.testing.assert_frame_equal(rollouts, again)


def test_only_winners_of_a_scorer_can_be_decoded(refuse, refuse_scored):
    refuse("answer.decode=winners", words=["answer.decode=winners", "needs a scorer"])
    refuse_scored(
        "answer.decode=winners", "scorer.positions=official", words=["scorer.positions=official", "every answer"]
    )
    refuse_scored("answer.decode=winners", "aggregator=[majority,best_of_n]", words=["aggregator=majority,best_of_n"])
    refuse("answer.decode=some", words=["answer.decode=some", "all or winners"])


# What `auto` takes


def test_auto_takes_a_shipped_latent_rm_alone():
    found = auto("shipped:some_rm", 6, "mean", "official")
    assert found == LatentRM("shipped:some_rm", "mean", "official", only_own=True)
    assert isinstance(auto("owner/name", 6, None, "correct"), NoScorer)
    assert isinstance(auto(None, 6, None, "correct"), NoScorer)
    assert isinstance(auto("shipped:some_rm", 0, None, "correct"), NoScorer)


# Latents are not in the cache


def latents_of(result):
    return load_file(result.last.parent / "latents.safetensors")["latents_RTD"]


@pytest.mark.parametrize("sampler", [slow("gaussian"), "dropout"])
def test_latents_are_thought_again_for_another_scorer_and_to_be_kept(run, cached, latent_rm, sampler):
    line = [f"sampler={sampler}", "scorer=latent_rm", f"scorer.checkpoint={latent_rm}"]
    whole = run(*line, "keep_latents=true", "paths.cache=other", "engine.rows=5")
    first = cached if sampler == "dropout" else run(f"sampler={sampler}", "scorer=none").last.parent
    drawn = tables(whole)
    later = run(*line, "keep_latents=true")
    assert "latents of 24 cached rollouts to compute again, for scores: at most" in later.err
    rollouts, _, record = tables(later)
    assert record["rollouts"] == {"total": 24, "drawn_now": 0, "scored_now": 24}
    np.testing.assert_allclose(rollouts["score"], drawn[0]["score"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(latents_of(later), latents_of(whole), rtol=0, atol=1e-4)
    answers = ["answer_text", "answer_logprob", "correct"]
    pd.testing.assert_frame_equal(rollouts[answers], pd.read_parquet(first / "rollouts.parquet")[answers])
    # scores that are there stay when latents are made again
    again = run(*line, "keep_latents=true")
    assert "latents of 24 cached rollouts to compute again: at most" in again.err
    pd.testing.assert_frame_equal(tables(again)[0], rollouts)


@pytest.mark.slow  # the next test grows n too
def test_each_n_of_a_sweep_gives_the_diversity_that_it_gives_alone(run, monkeypatch):
    worker.directions_of.cache_clear()
    run("n=2", "sampler=gaussian", "scorer=none", "engine.rows=7")
    for n in (3, 6):
        alone = run(f"n={n}", f"paths.cache=alone{n}", "sampler=gaussian", "scorer=none")
        if n == 6:  # as another process would
            worker.directions_of.cache_clear()
        grown = run(f"n={n}", "sampler=gaussian", "scorer=none", "engine.rows=7")
        assert "compute again" not in grown.err
        found, expected = (value(tables(each)[1], "diversity", n=n) for each in (grown, alone))
        assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("damage", [slow(Path.unlink), lambda path: path.write_bytes(path.read_bytes()[:-1] + b"x")])
def test_sums_of_directions_that_are_lost_are_computed_again(run, monkeypatch, damage):
    line = "sampler=gaussian", "scorer=none"
    whole = run(*line, "n=6", "paths.cache=alone")
    run(*line, "n=3")
    (kept,) = Path("cache").rglob("*.sums")
    damage(kept)
    worker.directions_of.cache_clear()  # as another process would
    grown = run(*line, "n=6")
    assert "latents of 18 cached rollouts to compute again, for diversity" in grown.err
    found, expected = (value(tables(each)[1], "diversity", n=6) for each in (grown, whole))
    assert found == pytest.approx(expected, abs=1e-6)


def test_rollouts_and_their_scores_are_one_part(scored, tmp_path):
    scored("sampler=gaussian")
    (part,) = (tmp_path / "cache").rglob("*.parquet")
    table = pq.read_table(part)
    assert "latents" not in table.column_names
    assert table["scoring_step_scores"].null_count == 0


# Rescoring


def test_rescoring_equals_a_run_with_that_scorer_and_draws_nothing(run, scored, ltts, latent_rm):
    source = run("sampler.site=residual").last.parent
    rollouts, metrics, record = tables(rescore(ltts, source, latent_rm, "scorer.reduce=mean"))
    assert record["rollouts"] == {"total": 24, "drawn_now": 0, "scored_now": 24}
    expected = scored("sampler.site=residual", "scorer.reduce=mean")
    direct, direct_metrics, direct_record = tables(expected)
    assert direct_record["rollouts"]["scored_now"] == 0
    pd.testing.assert_frame_equal(rollouts, direct)
    pd.testing.assert_frame_equal(metrics, direct_metrics)
    folder = max(Path("outputs/rescore").iterdir())
    steps = pd.read_parquet(folder / "scores.parquet")
    assert list(steps.columns) == ["question_id", "rollout", "score", "step_scores"]
    np.testing.assert_allclose([np.mean(row) for row in steps["step_scores"]], steps["score"], rtol=1e-5)
    # what has been rescored can be rescored again
    last, _, record = tables(rescore(ltts, folder, latent_rm, "scorer.reduce=last"))
    assert record["rollouts"]["scored_now"] == 0
    np.testing.assert_allclose([row[-1] for row in steps["step_scores"]], last["score"], rtol=1e-5)


def test_rescoring_refuses_what_the_cache_lacks_and_what_has_no_scorer(run, ltts, latent_rm, checkpoint, tmp_path):
    copied = shutil.copytree(checkpoint, tmp_path / "copied")
    source = run(f"model.checkpoint={copied}").last.parent
    check(ltts("rescore", source), "scorer=auto", "scorer.checkpoint")
    check(ltts("rescore", source, "scorer=none"), "scorer=none", "scorer.checkpoint")
    check(ltts("rescore"), "RUN is missing")
    shutil.rmtree(tmp_path / "cache")
    check(rescore(ltts, source, latent_rm), "not in the cache", "re-run its command with cache=on")
    config_json = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config_json | {"embd_pdrop": 0.3}))
    line = "rescore", f"run={source}", "scorer=latent_rm", f"scorer.checkpoint={latent_rm}"
    check_refused(*line, words=["has changed since"])
    (source / "run.json").write_text('{"format": 3}')
    check_refused(*line, words=["run.json", "is damaged"])
    (source / "run.json").unlink()
    check_refused(*line, words=[str(source), "run.json"])


# Bad input


@pytest.mark.every_other
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["scorer=nosuch"], ["scorer=nosuch", "auto, latent_rm, none"]),
        (["scorer.reduce=max"], ["scorer.reduce=max", "sum, mean, last"]),
        (["scorer.positions=left"], ["scorer.positions=left", "correct or official"]),
        (["scorer=latent_rm", "model.latent_rm=null"], ["scorer.checkpoint=null", "names no LatentRM"]),
        (["scorer=latent_rm", "scorer.checkpoint=no/such/folder"], ["scorer.checkpoint=no/such/folder"]),
        (["aggregator=best_of_n"], ["aggregator=best_of_n", "needs a scorer", "scorer=auto"]),
        (["scorer=none", "aggregator=[majority,weighted]"], ["aggregator=weighted", "needs a scorer", "scorer=none"]),
        (["aggregator.weighted.temperature=0"], ["aggregator.weighted.temperature=0", "positive"]),
        (["scorer=latent_rm", f"scorer.checkpoint={WIDE}"], ["scorer.checkpoint", "width is 64", "have 16"]),
    ],
    ids=lambda value: " ".join(value) if "=" in value[0] else None,
)
def test_a_bad_override(refuse, overrides, words):
    refuse(*overrides, words=words)


def test_a_scorer_without_latents_to_score(refuse_scored):
    refuse_scored("model.latents=0", words=["model.latents=0"])


def test_a_truncated_scorer_checkpoint(refuse_scored, latent_rm):
    weights = latent_rm / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    refuse_scored(words=["scorer.checkpoint", "truncated"])


@pytest.fixture
def reasoner(checkpoint):
    return Coconut("tiny", str(checkpoint), 6, {})


def refused(folder, reasoner, *words, reduce=None, positions="correct"):
    with pytest.raises(UsageError) as caught:
        LatentRM(str(folder), reduce, positions).check(reasoner, {})
    for word in ("scorer.checkpoint", *words):
        assert word in str(caught.value)


def test_a_checkpoint_that_is_no_latent_rm(checkpoint, reasoner):
    refused(checkpoint, reasoner, "not a LatentRM", "classifier.weight missing")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_scorer_checkpoint_without_a_file(latent_rm, reasoner, name):
    (latent_rm / name).unlink()
    refused(latent_rm, reasoner, f"lacks {name}")


def test_official_positions_need_a_tokenizer_and_correct_ones_do_not(latent_rm, reasoner):
    (latent_rm / "tokenizer.json").unlink()
    assert LatentRM(str(latent_rm), None, "correct").check(reasoner, {}) == []
    refused(latent_rm, reasoner, "lacks tokenizer.json", positions="official")


def test_too_few_positions(refuse_scored, latent_rm):
    config_json = json.loads((latent_rm / "config.json").read_text())
    (latent_rm / "config.json").write_text(json.dumps(config_json | {"n_positions": 20}))
    refuse_scored(words=["has 20 positions"])


@pytest.mark.parametrize(
    ("trained", "words"),
    [
        ({"temperature": -1}, ["latent_rm.temperature=-1"]),
        ({"reduce": "max"}, ["latent_rm.reduce=max"]),
        ([], ["must be an object"]),
    ],
)
def test_a_config_that_says_nonsense(checkpoint, reasoner, tmp_path, trained, words):
    refused(tiny.write_latent_rm(tmp_path / "rm", checkpoint, trained), reasoner, *words)


DROPOUT = {"_target_": "latent_tts.sampler.dropout.Dropout", "rate": 0.1, "site": "ffn", "where": ["thoughts"]}


@pytest.mark.parametrize(
    ("trained", "reduce", "words"),
    [
        ({"sampler": DROPOUT, "reduce": "sum"}, None, None),
        ({"sampler": DROPOUT, "reduce": "mean"}, "mean", None),
        ({"reasoner": "0123", "reasoner_name": "another"}, None, ["another (0123)", "not for tiny"]),
        ({"sampler": DROPOUT | {"rate": 0.3}}, None, ["trained on dropout rate=0.3 and scores dropout rate=0.1 here"]),
        (
            {"sampler": {"_target_": "Gaussian", "sigma": 0.4}},
            None,
            ["trained on Gaussian 0.4 and scores dropout 0.1 here"],
        ),
        ({"reduce": "mean"}, "sum", ["scorer.reduce=sum", "trained with mean"]),
    ],
)
def test_another_use_than_it_was_trained_for_is_a_warning(checkpoint, reasoner, tmp_path, trained, reduce, words):
    folder = tiny.write_latent_rm(tmp_path / "rm", checkpoint, {"reasoner": reasoner.digest} | trained)
    warnings = LatentRM(str(folder), reduce, "correct").check(reasoner, DROPOUT)
    assert len(warnings) == (words is not None)
    for word in words or []:
        assert word in warnings[0]


def test_warnings_are_shown_and_the_run_goes_on(run, checkpoint, tmp_path):
    folder = tiny.write_latent_rm(tmp_path / "rm", checkpoint, {"reasoner": "0123", "sampler": {"rate": 0.3}})
    result = run("scorer=latent_rm", f"scorer.checkpoint={folder}", "aggregator=best_of_n")
    assert result.code == 0, result.err
    assert result.err.count("WARNING scorer.checkpoint=") == 2
