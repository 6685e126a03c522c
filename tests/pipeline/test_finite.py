"""Numbers that are not finite end a run; rollouts without latents have no score, and that is no error."""

import shutil
from importlib.resources import files
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny
from marks import slow
from safetensors.torch import load_file, save_file
from tables import picked_accuracy

from latent_tts.aggregator.likelihood import Likelihood
from latent_tts.checkpoint.adapter import CheckpointAdapter
from latent_tts.checkpoint.files import load_tokenizer
from latent_tts.pipeline import models
from latent_tts.results.run_folder import read_metrics
from latent_tts.scorer.latent_rm import LatentRM
from latent_tts.text.answer import AnswerRule
from latent_tts.types import Computation, RolloutArrays

SHIPPED = Path(str(files("latent_tts"))) / "weights"


def rewrite(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def failure(result) -> str:
    assert result.code == 1, result.err
    assert "Traceback" not in result.err
    return result.err


@pytest.mark.parametrize("value", [np.nan, slow(np.inf)])
def test_log_probabilities_that_are_not_finite_name_the_question(run, checkpoint, tmp_path, monkeypatch, value):
    monkeypatch.setattr(models, "prove_reasoner", lambda reasoner, longest: Computation())  # it would see them first
    model = shutil.copytree(checkpoint, tmp_path / "model")
    unused = load_tokenizer(model).token_to_id("<|unknown|>")  # of no prompt, so that latents stay finite

    def change(tensors):
        tensors["transformer.wte.weight"][unused] = value

    rewrite(model, change)
    told = failure(run(f"model.checkpoint={model}"))
    questions = pd.read_parquet(run().last.parent / "rollouts.parquet")["question_id"]
    assert "log-probabilities of answers of question" in told
    assert any(question in told for question in questions)


def test_step_scores_that_are_not_finite_name_the_question(run, checkpoint, tmp_path):
    scorer = tiny.write_latent_rm(tmp_path / "rm", checkpoint)

    def change(tensors):
        tensors["classifier.bias"][:] = np.inf

    rewrite(scorer, change)
    told = failure(run("scorer=latent_rm", f"scorer.checkpoint={scorer}"))
    questions = pd.read_parquet(run().last.parent / "rollouts.parquet")["question_id"]
    assert "scoring rollouts failed: step scores of question" in told
    assert any(question in told for question in questions)


@pytest.mark.parametrize("value", [np.nan, slow(np.inf)])
def test_scores_of_a_scorer_that_are_not_finite_name_the_question(run, latent_rm, monkeypatch, value):
    reduced = LatentRM.score_rollouts

    def spoiled(self, step_scores):
        return np.where(np.arange(len(step_scores)) == 5, value, reduced(self, step_scores))

    monkeypatch.setattr(LatentRM, "score_rollouts", spoiled)
    told = failure(run("scorer=latent_rm", f"scorer.checkpoint={latent_rm}"))
    questions = list(dict.fromkeys(pd.read_parquet(run().last.parent / "rollouts.parquet")["question_id"]))
    assert f"of question {questions[1]} the score {value:g}; scores must be finite" in told


@pytest.fixture(scope="module")
def thoughtless(tmp_path_factory) -> Path:
    """A CoLaR that stops at once, whatever it is asked: its hidden states are all the same, and nearest to `###`."""
    folder = shutil.copytree(SHIPPED / "colar_arith", tmp_path_factory.mktemp("models") / "thoughtless")
    end = load_tokenizer(folder).token_to_id("###")

    def change(tensors):
        tensors["transformer.ln_f.weight"][:] = 0
        tensors["transformer.ln_f.bias"][:] = 1
        tensors["transformer.wte.weight"][end] = 1

    rewrite(folder, change)
    return folder


@pytest.mark.every_other
@pytest.mark.parametrize("decode", [[], ["answer.decode=winners", "aggregator=[best_of_n]"]])
def test_rollouts_without_latents_have_no_score_and_are_no_best_of_n(ltts, thoughtless, tmp_path, monkeypatch, decode):
    monkeypatch.setattr(CheckpointAdapter, "read_answer", lambda self, text, rule: "1")
    monkeypatch.setattr(AnswerRule, "is_right", lambda self, prediction, gold: True)
    scorer = tiny.write_latent_rm(tmp_path / "rm", thoughtless)
    line = ["model=demo_colar", f"model.checkpoint={thoughtless}", "task.limit=3", "n=2", "max_answer_tokens=3"]
    result = ltts("run", *line, "budget=fixed", "scorer=latent_rm", f"scorer.checkpoint={scorer}", *decode)
    assert result.code == 0, result.err
    rollouts = pd.read_parquet(result.last.parent / "rollouts.parquet")
    assert set(rollouts["latent_steps"]) == {0}
    assert rollouts["score"].isna().all()
    assert rollouts["correct"].any()
    metrics = read_metrics(result.last)
    picked = metrics[(metrics["metric"] == "accuracy") & (metrics["aggregator"] == "best_of_n")]
    assert set(picked["value"]) == {0.0}


def test_a_figure_that_is_missing_never_wins():
    correct = np.array([[True, False]])
    arrays = RolloutArrays(np.array([[0, 1]]), correct, np.array([[np.nan, -5.0]]), np.full((1, 2), np.nan))
    assert picked_accuracy(Likelihood(), arrays, 2).tolist() == [0.0]
    flipped = RolloutArrays(np.array([[1, 0]]), ~correct, arrays.answer_logprob_QD, arrays.score_QD)
    assert picked_accuracy(Likelihood(), flipped, 2).tolist() == [1.0]
