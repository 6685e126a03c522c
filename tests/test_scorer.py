"""Scorers from the command line: runs with one, `ltts rescore`, and what a user gets wrong."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import tiny
from latent_tts import store
from latent_tts.model.coconut import Coconut
from latent_tts.scorer.auto import auto
from latent_tts.scorer.latent_rm import LatentRM
from latent_tts.scorer.none import NoScorer
from test_bad_input import check

SCORED = {"best_of_n", "weighted"}


@pytest.fixture
def latent_rm(checkpoint, tmp_path):
    return tiny.write_latent_rm(tmp_path / "rm", checkpoint)


@pytest.fixture
def scored(run, latent_rm):
    """`ltts run` with a LatentRM."""
    return lambda *arguments: run("scorer=latent_rm", f"scorer.checkpoint={latent_rm}", *arguments)


def tables(result) -> tuple[pd.DataFrame, pd.DataFrame, dict]:
    assert result.code == 0, result.err
    folder = result.last.parent
    record = json.loads((folder / "run.json").read_text())
    return pd.read_parquet(folder / "rollouts.parquet"), store.read_metrics(folder / "metrics.csv"), record


def rescore(ltts, source: Path, latent_rm: Path, *arguments):
    return ltts("rescore", source, "scorer=latent_rm", f"scorer.checkpoint={latent_rm}", *arguments)


# Runs


def test_without_a_scorer_the_default_run_says_so_in_one_line_and_reports_no_scored_picks(run):
    result = run()
    rollouts, metrics, _ = tables(result)
    assert result.err.count("scorer=auto") == 1
    assert set(metrics["aggregator"]) == {"", "majority", "likelihood"}
    assert rollouts["score"].isna().all()
    assert "scorer=auto" not in run("scorer=none").err


def test_a_run_with_a_scorer_reports_every_pick_from_the_same_rollouts(run, scored, latent_rm):
    plain, _, _ = tables(run())
    rollouts, metrics, record = tables(scored("budget=ladder"))
    pd.testing.assert_frame_equal(plain.drop(columns="score"), rollouts.drop(columns="score"))
    assert rollouts["score"].notna().all()
    assert set(metrics["aggregator"]) == {"", "majority", "likelihood"} | SCORED
    assert set(metrics["scorer"]) == {f"latent_rm:{latent_rm}"}
    assert record["rollouts"] == {"total": 24, "drawn_now": 0, "scored_now": 24}
    best = rollouts.sort_values(["score", "rollout"], ascending=[False, True]).groupby("question_id").first()
    at_4 = metrics[(metrics["n"] == 4) & (metrics["aggregator"] == "best_of_n")]
    assert at_4["value"].item() == best["correct"].mean()


def test_scores_are_kept_and_reductions_share_them(scored):
    first, _, _ = tables(scored("scorer.reduce=sum"))
    again, _, record = tables(scored("scorer.reduce=sum"))
    pd.testing.assert_frame_equal(first, again)
    assert record["rollouts"]["scored_now"] == 0
    mean, metrics, record = tables(scored("scorer.reduce=mean"))
    assert record["rollouts"]["scored_now"] == 0
    np.testing.assert_allclose(mean["score"], first["score"] / 6, rtol=1e-5)
    assert "scorer.reduce=mean" in metrics["settings"].iloc[0]
    last, _, _ = tables(scored("scorer.reduce=last"))
    assert not np.allclose(last["score"], mean["score"])


@pytest.mark.parametrize("rows", [1, 3])
def test_the_rows_of_a_batch_do_not_change_the_scores(scored, rows):
    a, _, _ = tables(scored())
    b, _, _ = tables(scored(f"engine.rows={rows}", f"paths.cache=rows{rows}"))
    np.testing.assert_allclose(a["score"], b["score"], rtol=0, atol=1e-4)


def test_a_scorers_cost_is_in_the_tables(run, scored):
    _, plain, _ = tables(run())
    _, with_scores, record = tables(scored())

    def value(table, metric):
        return table.loc[table["metric"] == metric, "value"].item()

    # the LatentRM has the reasoner's shape, but no answers to decode and no vocabulary to rank
    assert value(plain, "gflops") < value(with_scores, "gflops") < 2 * value(plain, "gflops")
    added = value(with_scores, "seconds") - value(plain, "seconds")
    assert added == pytest.approx(record["seconds"]["scoring"] / 6)


def test_official_positions_depend_on_the_longest_answer_of_the_question(scored, checkpoint, latent_rm):
    rollouts, metrics, _ = tables(scored("scorer.positions=official", "keep_latents=true"))
    assert "scorer.positions=official" in metrics["settings"].iloc[0]
    correct, _, _ = tables(scored())
    folder = max(Path("outputs/run").iterdir(), key=lambda path: (path / "latents.safetensors").exists())
    latents = store.read_latents(folder, rollouts["latent_steps"])
    longest = rollouts.groupby("question_id")["answer_tokens"].transform("max")
    shift = longest - rollouts["answer_tokens"]
    assert 0 < (shift == 0).mean() < 1, "the tiny reasoner should write answers of several lengths"
    same = shift == 0
    np.testing.assert_allclose(rollouts["score"][same], correct["score"][same], atol=1e-4)
    assert (np.abs(rollouts["score"] - correct["score"])[~same] > 1e-3).all()
    # one row by hand
    row = int(np.flatnonzero(~same)[0])
    adapter = Coconut("c", str(checkpoint), 6, {})
    from latent_tts.task.arith import Arith

    question = next(q for q in Arith("test", 6, [2, 3, 4, 5], 0).questions() if q.id == rollouts["question_id"][row])
    prompt = adapter.encode(question)
    model = LatentRM(str(latent_rm), None, "correct").load(device="cpu", dtype="float32")
    backbone = tiny.plain_copy(model.backbone)
    embedded = backbone.get_input_embeddings()(torch.tensor(prompt))
    embedded = torch.cat([embedded, torch.tensor(latents[row])])[None]
    positions = torch.arange(embedded.shape[1])[None] + int(shift[row])
    hidden = backbone(inputs_embeds=embedded, position_ids=positions).last_hidden_state[0, len(prompt) :]
    assert model.classifier(hidden).sum().item() == pytest.approx(rollouts["score"][row], abs=1e-4)


def test_the_weighted_vote_takes_its_temperature_from_the_scorer(run, checkpoint, tmp_path):
    folder = tiny.write_latent_rm(tmp_path / "rm", checkpoint, {"temperature": 0.125, "reduce": "mean"})
    result = run("scorer=latent_rm", f"scorer.checkpoint={folder}", "aggregator=weighted")
    _, metrics, record = tables(result)
    assert record["aggregators"]["weighted"]["temperature"] == 0.125
    assert set(metrics["aggregator"]) == {"", "weighted"}
    own = run(
        "scorer=latent_rm", f"scorer.checkpoint={folder}", "aggregator=weighted", "aggregator.weighted.temperature=2"
    )
    _, metrics, record = tables(own)
    assert record["aggregators"]["weighted"]["temperature"] == 2
    assert "aggregator.weighted.temperature=2" in metrics["settings"].iloc[0]


def test_bfloat16_scores_are_close_and_kept_apart(scored):
    a, _, _ = tables(scored())
    b, _, _ = tables(scored("engine.dtype=bfloat16"))
    assert len(a) == len(b)
    assert b["score"].dtype == "Float32" or b["score"].dtype == np.float32


def test_compare_reads_runs_with_scores(scored, ltts):
    folder = scored().last.parent
    result = ltts("compare", folder, folder)
    assert result.code == 0, result.err
    assert "best_of_n" in result.out
    assert "weighted" in result.out


def test_the_head_stays_in_float32_under_bfloat16(latent_rm):
    model = LatentRM(str(latent_rm), None, "correct").load(device="cpu", dtype="bfloat16")
    assert model.backbone.dtype == torch.bfloat16
    assert model.classifier(torch.ones(3, 16, dtype=torch.bfloat16)).dtype == torch.float32


# What `auto` takes


def test_auto_takes_a_shipped_latent_rm_alone():
    found = auto("shipped:some_rm", 6, "mean", "official")
    assert found == LatentRM("shipped:some_rm", "mean", "official")
    assert isinstance(auto("owner/name", 6, None, "correct"), NoScorer)
    assert isinstance(auto(None, 6, None, "correct"), NoScorer)
    assert isinstance(auto("shipped:some_rm", 0, None, "correct"), NoScorer)


# Rescoring


def test_rescoring_equals_a_run_with_that_scorer_and_draws_nothing(run, scored, ltts, latent_rm):
    source = run("budget=ladder", "sampler.site=residual").last.parent
    rollouts, metrics, record = tables(rescore(ltts, source, latent_rm, "scorer.reduce=mean"))
    assert record["rollouts"] == {"total": 24, "drawn_now": 0, "scored_now": 24}
    expected = scored("budget=ladder", "sampler.site=residual", "scorer.reduce=mean")
    direct, direct_metrics, direct_record = tables(expected)
    assert direct_record["rollouts"]["scored_now"] == 0
    pd.testing.assert_frame_equal(rollouts, direct)
    pd.testing.assert_frame_equal(metrics, direct_metrics)
    steps = pd.read_parquet(max(Path("outputs/rescore").iterdir()) / "scores.parquet")
    assert list(steps.columns) == ["question_id", "rollout", "score", "step_scores"]
    np.testing.assert_allclose([np.mean(row) for row in steps["step_scores"]], steps["score"], rtol=1e-5)


def test_kept_latents_are_enough_to_rescore(run, ltts, latent_rm, tmp_path):
    source = run("keep_latents=true").last.parent
    from_cache, _, _ = tables(rescore(ltts, source, latent_rm))
    shutil.rmtree(tmp_path / "cache")
    from_file, metrics, _ = tables(rescore(ltts, source, latent_rm))
    pd.testing.assert_frame_equal(from_cache, from_file)
    assert metrics.loc[metrics["metric"] == "seconds", "value"].isna().all()


def test_a_rescored_run_can_be_rescored_and_collected(run, ltts, latent_rm, checkpoint, tmp_path):
    other = tiny.write_latent_rm(tmp_path / "other", checkpoint, seed=6)
    source = run().last.parent
    once = rescore(ltts, source, latent_rm).last.parent
    twice, metrics, _ = tables(rescore(ltts, once, other))
    straight, _, _ = tables(rescore(ltts, source, other))
    pd.testing.assert_frame_equal(twice, straight)
    assert set(metrics["scorer"]) == {f"latent_rm:{other}"}
    result = ltts("collect", "outputs", "output=all.csv")
    assert result.code == 0, result.err
    assert len(set(pd.read_csv("all.csv")["scorer"].dropna())) == 2


def test_rescoring_refuses_what_has_no_latents_or_no_scorer(run, ltts, latent_rm, tmp_path):
    source = run().last.parent
    check(ltts("rescore", source), "scorer=auto", "scorer.checkpoint")
    check(ltts("rescore", source, "scorer=none"), "scorer=none", "scorer.checkpoint")
    check(ltts("rescore"), "run")
    check(rescore(ltts, tmp_path / "nowhere", latent_rm), "nowhere", "run.json")
    check(rescore(ltts, source, latent_rm, "engine.rows=0"), "engine.rows=0")
    shutil.rmtree(tmp_path / "cache")
    check(rescore(ltts, source, latent_rm), "neither in the cache", "latents.safetensors", "keep_latents=true")
    (source / "run.json").write_text("{}")
    check(rescore(ltts, source, latent_rm), "lacks", "config")
    (source / "run.json").unlink()
    check(rescore(ltts, source, latent_rm), "run.json")


def test_rescoring_refuses_a_reasoner_that_has_changed(run, ltts, latent_rm, checkpoint, tmp_path):
    copied = shutil.copytree(checkpoint, tmp_path / "copied")
    source = run(f"model.checkpoint={copied}").last.parent
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"embd_pdrop": 0.3}))
    check(rescore(ltts, source, latent_rm), "has changed since")


# Bad input


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["scorer=nosuch"], ["scorer=nosuch", "auto, latent_rm, none"]),
        (["scorer.reduce=max"], ["scorer.reduce=max", "sum, mean, last"]),
        (["scorer.positions=left"], ["scorer.positions=left", "correct, official"]),
        (["scorer=latent_rm"], ["scorer.checkpoint=null", "names no LatentRM"]),
        (["scorer=latent_rm", "scorer.checkpoint=no/such/folder"], ["scorer.checkpoint=no/such/folder"]),
        (["aggregator=best_of_n"], ["aggregator=best_of_n", "needs a scorer", "scorer=auto"]),
        (["aggregator=[majority,weighted]"], ["aggregator=weighted", "needs a scorer"]),
        (["scorer=none", "aggregator=weighted"], ["aggregator=weighted", "needs a scorer", "scorer=none"]),
        (["aggregator.weighted.temperature=0"], ["aggregator.weighted.temperature=0", "positive"]),
    ],
    ids=lambda value: " ".join(value) if "=" in value[0] else None,
)
def test_a_bad_override(run, overrides, words):
    check(run(*overrides), *words)


def test_the_models_own_choices_reach_the_scorer(scored):
    check(scored("scorer.reduce=max"), "scorer.reduce=max")
    check(scored("scorer.positions=left"), "scorer.positions=left")
    check(scored("model.latents=0"), "model.latents=0")


def test_a_latent_rm_of_another_width(run, tmp_path):
    wide = Path(__file__).parent / "parity" / "latent_rm"
    check(run("scorer=latent_rm", f"scorer.checkpoint={wide}"), "scorer.checkpoint", "width 64", "have 16")


def test_a_checkpoint_that_is_no_latent_rm(run, checkpoint):
    check(run("scorer=latent_rm", f"scorer.checkpoint={checkpoint}"), "no LatentRM", "classifier.weight missing")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_scorer_checkpoint_without_a_file(scored, latent_rm, name):
    (latent_rm / name).unlink()
    check(scored(), "scorer.checkpoint", f"lacks {name}")


def test_a_truncated_scorer_checkpoint(scored, latent_rm):
    weights = latent_rm / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    check(scored(), "scorer.checkpoint", "truncated")


def test_official_positions_need_a_tokenizer_and_correct_ones_do_not(scored, latent_rm):
    (latent_rm / "tokenizer.json").unlink()
    assert scored().code == 0
    check(scored("scorer.positions=official"), "scorer.checkpoint", "lacks tokenizer.json")


def test_too_few_positions(run, checkpoint, tmp_path):
    folder = tiny.write_latent_rm(tmp_path / "short", checkpoint)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_positions": 20}))
    check(run("scorer=latent_rm", f"scorer.checkpoint={folder}"), "has 20 positions")


@pytest.mark.parametrize(
    ("trained", "words"),
    [
        ({"temperature": -1}, ["latent_rm.temperature=-1"]),
        ({"reduce": "max"}, ["latent_rm.reduce=max"]),
        ([], ["does not hold an object"]),
    ],
)
def test_a_config_that_says_nonsense(run, checkpoint, tmp_path, trained, words):
    folder = tiny.write_latent_rm(tmp_path / "rm", checkpoint, trained)
    check(run("scorer=latent_rm", f"scorer.checkpoint={folder}"), "scorer.checkpoint", *words)


def test_another_reasoner_or_sampler_than_it_was_trained_for_is_a_warning(run, checkpoint, tmp_path):
    reasoner = Coconut("tiny", str(checkpoint), 6, {})
    dropout = {
        "_target_": "latent_tts.sampler.dropout.Dropout", "rate": 0.1, "site": "ffn", "where": ["thoughts"],
        "mask": "fresh",
    }  # fmt: skip

    def warnings(trained, *arguments):
        folder = tiny.write_latent_rm(tmp_path / "rm", checkpoint, trained)
        result = run("scorer=latent_rm", f"scorer.checkpoint={folder}", *arguments)
        assert result.code == 0, result.err
        return [line for line in result.err.splitlines() if "WARNING" in line]

    assert warnings({"reasoner": reasoner.digest, "sampler": dropout, "reduce": "sum"}) == []
    (line,) = warnings({"reasoner": "0123", "reasoner_name": "another", "sampler": dropout})
    assert "another (0123)" in line
    assert reasoner.digest in line
    (line,) = warnings({"reasoner": reasoner.digest, "sampler": dropout | {"rate": 0.3}})
    assert "rate=0.3; here it is rate=0.1" in line
    (line,) = warnings({"sampler": dropout}, "sampler=gaussian")
    assert "sigma=None" in line
    (line,) = warnings({"reduce": "mean"}, "scorer.reduce=sum")
    assert "trained with mean" in line
