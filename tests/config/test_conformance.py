"""`ltts run experiment=conformance`: greedy runs beside known figures; here a parity fixture's, known by the oracle."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pandas as pd
import pytest
import yaml
from oracle import Oracle

from latent_tts.config.conformance import KnownFigure, find_known
from latent_tts.engine.rollout import RolloutPlan
from latent_tts.errors import RunError
from latent_tts.model.codi import Codi
from latent_tts.sampler.greedy import Greedy
from latent_tts.types import Question

CODI = Path(__file__).parents[1] / "parity" / "codi"
CONF = Path(__file__).parents[2] / "conf"
TEXTS = [  # the random model writes numbers for three of these
    "A robe takes 2 bolts of blue fiber and half that much white fiber.  How many bolts in total does it take?",
    "Ann buys a house for $80,000.",
    "Ben eats 16 eggs per day.",
    "James has 15 cups of feed.",
    "A shop sells pens for $3 each.",
]
ANSWER = 8


def oracle_predictions() -> list[str | None]:
    """The last number of each greedy answer, one row at a time without a cache, read by a rule of its own."""
    model = Codi(name="codi", checkpoint=str(CODI), latents=6, recommended={})
    plan = RolloutPlan(model.latents, model.thinking_end_ids, model.eos_id, ANSWER)
    oracle, predictions = Oracle(model.load(device="cpu", dtype="float32"), plan), []
    for text in TEXTS:
        prompt = model.encode(Question("q", text, ""))
        ids = oracle.roll(prompt, Greedy(), question_id="q", rollout=0).answer_ids
        digits = re.sub(r"[^0-9]+", " ", model.tokenizer.decode(ids).replace(",", "")).split()
        predictions.append(digits[-1] if digits else None)
    return predictions


@pytest.fixture
def compared(ltts, tmp_path):
    """A run on questions that the oracle answers with a known accuracy, beside what is said to be known of it."""
    predictions = oracle_predictions()
    readable = [number for number, text in enumerate(predictions) if text is not None]
    golds = ["7"] * len(TEXTS)
    for number in readable[1:]:  # the first readable one is marked wrong
        golds[number] = str(predictions[number])
    assert 2 <= len(readable) < len(TEXTS)
    accuracy = sum(text == gold for text, gold in zip(predictions, golds, strict=True)) / len(TEXTS)
    lines = [json.dumps({"question": text, "answer": gold}) for text, gold in zip(TEXTS, golds, strict=True)]
    (tmp_path / "pens.jsonl").write_text("\n".join(lines))

    def run(expected: float, *more: str):
        figure = f"model:codi,task:pens,split:test,questions:{len(TEXTS)},accuracy:{expected},tolerance:0.01"
        return ltts(
            "run", "experiment=conformance", "model=codi", f"model.checkpoint={CODI}", "task=jsonl",
            "task.path=pens.jsonl", "task.split=test", f"max_answer_tokens={ANSWER}",
            f"hydra.callbacks.conformance.known=[{{{figure},source:oracle}}]", *more,
        )  # fmt: skip

    return accuracy, run


@pytest.mark.slow
def test_a_run_is_compared_with_the_figure_known_of_it(compared):
    accuracy, run = compared
    right = run(accuracy)
    assert right.code == 0, right.err
    assert re.search(rf"{100 * accuracy:.2f} .* 1\.00 .* {100 * accuracy:.2f} .* conforms", right.out)
    assert right.last.name == "metrics.csv"
    wrong = run(accuracy + 0.02)
    assert wrong.code == 1
    assert "DIFFERS" in wrong.out
    assert f"codi on pens/test is at {100 * accuracy:.2f} %, expected is {100 * accuracy + 2:.2f} +- 1.00" in wrong.err
    assert (wrong.last.parent / "0" / "run.json").is_file()
    assert "Traceback" not in wrong.err


@pytest.mark.slow
def test_each_job_of_a_sweep_is_judged_on_its_own(compared):
    accuracy, run = compared
    unknown = run(accuracy, "model.name=mine,codi")
    assert unknown.code == 1
    assert "no figure is known for mine on pens/test" in unknown.err
    assert unknown.out.count("conforms") == 1
    assert unknown.last.is_file()


@pytest.mark.slow
def test_without_more_it_is_a_sweep_over_the_published_models_and_sets(ltts):
    result = ltts("run", "experiment=conformance", "n=0")
    assert result.code == 2
    assert result.err.count("n=0: ") == 6


FIGURE = KnownFigure("m", "t", "test", 100, 0.5, 0.02, "somebody")


def table(**changes: object) -> pd.DataFrame:
    row = {
        "model": "m", "task": "t", "split": "test", "sampler": "greedy", "metric": "accuracy", "n": 1, "value": 0.5,
        "ci_low": 0.4, "ci_high": 0.6, "questions": 100,
    }  # fmt: skip
    return pd.DataFrame([row | changes])


@pytest.mark.parametrize(("value", "conforms"), [(0.5, True), (0.52, True), (0.48, True), (0.53, False), (0.47, False)])
def test_the_tolerance_includes_its_ends(value, conforms):
    row, known = find_known(table(value=value), [FIGURE])
    assert bool(known.conforms(row["value"])) is conforms


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sampler": "gaussian"}, "greedy runs"),
        ({"n": 4}, "greedy runs"),
        ({"task": "u"}, "no figure is known for m on u/test; known are m on t/test"),
        ({"split": "valid"}, "no figure is known for m on t/valid"),
        ({"questions": 20}, "100 questions, the run had 20"),
    ],
)
def test_what_cannot_be_compared_is_not_judged(changes, words):
    with pytest.raises(RunError, match=words):
        find_known(table(**changes), [FIGURE])


def test_the_embedded_reasoners_figure_is_its_cards():
    content = yaml.safe_load((CONF / "experiment" / "conformance.yaml").read_text())
    (own,) = [row for row in content["hydra"]["callbacks"]["conformance"]["known"] if row["model"] == "demo_coconut"]
    card = (CONF.parent / "src/latent_tts/weights/coconut_arith/README.md").read_text()
    assert f"| greedy | {100 * own['accuracy']:.1f} [" in card


def test_every_known_figure_is_possible_and_says_where_it_is_from():
    content = yaml.safe_load((CONF / "experiment" / "conformance.yaml").read_text())
    known = [KnownFigure(**row) for row in content["hydra"]["callbacks"]["conformance"]["known"]]
    assert len({str(figure) for figure in known}) == len(known)
    for figure in known:
        assert (CONF / "model" / f"{figure.model}.yaml").is_file()
        assert 0 < figure.accuracy < 1
        assert 0 < figure.tolerance <= 0.01
        assert figure.source
