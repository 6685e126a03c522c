"""Any command with any values: no traceback, no raw exception, an exit code of 0, 1 or 2, at most four lines."""

import re
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

KEYS = {
    "run": ["n", "seed", "max_answer_tokens", "keep_latents", "answer.temperature", "answer.top_p", "answer.decode",
            "answer.forced_prefix", "engine.rows", "engine.dtype", "engine.device", "engine.quantize", "model", "task",
            "sampler", "schedule", "search", "budget", "scorer", "aggregator", "model.name", "model.latents",
            "model.revision", "model.recommended", "model.trained_latents", "model.latent_rm", "task.split",
            "task.steps", "task.seed", "sampler.rate", "sampler.site", "sampler.where", "sampler.mask"],
    "ask": ["question", "json", "n", "seed", "model.latents", "task", "task.texts", "sampler", "budget", "budget/rule",
            "budget.rule", "scorer", "aggregator", "answer.temperature", "answer", "engine.rows", "cache"],
    "replay": ["run", "n", "budget", "budget/rule", "budget.rule", "budget.round", "scorer.range", "aggregator"],
    "probe": ["tolerances", "guesses", "chunks", "threshold", "directions", "output", "task", "task.limit", "model"],
    "cache": ["action", "older_than", "max_size", "stale", "paths.cache"],
    "annotate": ["output", "n", "completions", "keep", "sampler", "schedule", "task.split", "model.latents"],
    "rescore": ["run", "scorer", "aggregator", "engine.rows", "engine.device", "paths.cache"],
    "trace": ["question", "run", "n", "beside", "maps", "top", "threshold", "directions", "sampler", "schedule",
              "task", "model.latents", "model.name", "scorer", "engine.rows", "paths.cache", "cache", "keep_latents"],
    "collect": ["runs", "output"],
    "compare": ["a", "b", "a_figure", "b_figure", "a_n", "b_n", "output"],
    "plot": ["runs", "output", "format", "against"],
    "convert": ["src", "dst", "tokenizer", "config", "base", "lora_alpha", "latents"],
    "tune": ["seconds", "dtypes", "n", "seed", "max_answer_tokens", "output", "engine.rows", "engine.dtype",
             "engine.device", "engine.quantize", "model", "task", "sampler", "model.latents", "task.split",
             "task.limit"],
    "train-reasoner": ["output", "init", "seed", "device", "save_every", "valid_questions", "recipe", "task.split",
                       "task.limit", "model", "backbone.layers", "backbone.width", "backbone.number_scale",
                       "optimization.batch", "optimization.lr", "optimization.bf16", "recipe.latents",
                       "recipe.stage_updates", "recipe.final_updates", "recipe.final_dropout"],
    "train-draft": ["output", "updates", "batch", "lr", "valid_questions", "seed", "sampler", "model", "model.latents",
                    "task", "task.split", "engine.dtype", "engine.device"],
    "train-rm": ["output", "annotations", "valid_annotations", "init", "seed", "bf16", "weights_dtype", "loss.name"],
}  # fmt: skip
FILES = ["run.json", "metrics.csv", "rollouts.parquet", ".hydra", "nothing"]
VALUES = st.one_of(
    st.sampled_from(["null", "nan", "inf", "-1", "0", "1", "2.5", "true", "[]", "{}", "[1,2]", "''", "'[/]'", "???",
                     "nosuch", "no/such/folder", "run", "'~/x'", "'${n}'", "'${oc.env:NO_SUCH}'", "{a: 1}",
                     "[arith,jsonl]", "[[lockout]]", "{_target_: os.system}", "{_target_: 1}", "a,b"]),
    st.text(max_size=6).map(lambda text: "'" + re.sub(r"[\\'$]", "", text) + "'"),
    st.integers(-3, 3).map(str),
)  # fmt: skip


@st.composite
def lines(draw: st.DrawFn) -> list[str]:
    command = draw(st.sampled_from(sorted(KEYS)))
    keys = draw(st.lists(st.sampled_from(KEYS[command]), max_size=3, unique=True))
    question = [draw(st.text(max_size=6))] if command == "ask" and draw(st.booleans()) else []
    return [command, *question, *(f"{key}={draw(VALUES)}" for key in keys)]


@pytest.fixture
def folder(run, monkeypatch, tmp_path) -> Path:
    """A run folder that draws damage."""
    monkeypatch.setenv("HOME", str(tmp_path))  # for values with ~
    made = run("scorer=none", "hydra.run.dir=run", "task.limit=2", "n=2")
    assert made.code == 0, made.err
    return Path("run").resolve()


def fuzz(ltts, checkpoint, folder, line, damaged, content):
    command, *rest = line
    shutil.rmtree(folder.parent / "copy", ignore_errors=True)
    shutil.rmtree("trained", ignore_errors=True)
    copy = shutil.copytree(folder, folder.parent / "copy")
    if damaged != "nothing":
        path = copy / damaged
        shutil.rmtree(path) if path.is_dir() else path.write_bytes(content)
    given_keys = {argument.partition("=")[0] for argument in rest}
    traced = {"run": copy}
    if "run" not in given_keys and damaged == "nothing":
        traced = {"model.checkpoint": checkpoint, "task": "arith", "task.limit": 1, "max_answer_tokens": 2, "n": 2}
    base = {
        "run": {"model.checkpoint": checkpoint, "task.limit": 2, "max_answer_tokens": 2, "n": 2, "budget": "fixed"},
        "ask": {"model.checkpoint": checkpoint, "max_answer_tokens": 2, "n": 2},
        "replay": {"run": copy, "budget": "adaptive"},
        "probe": {"model.checkpoint": checkpoint, "task.limit": 1, "max_answer_tokens": 2, "directions": 1,
                  "tolerances": "[0.0]", "output": "probed"},
        "cache": {"action": "prune"},
        "annotate": {"model.checkpoint": checkpoint, "task.limit": 2, "max_answer_tokens": 2, "n": 2, "completions": 1},
        "rescore": {"run": copy, "scorer": "latent_rm"},
        "trace": {"hydra.run.dir": "traced", **traced},
        "collect": {"runs": f"[{copy}]"},
        "compare": {"a": copy, "b": folder},
        "plot": {"runs": f"[{copy}]"},
        "convert": {"src": copy, "dst": "new"},
        "tune": {"model.checkpoint": checkpoint, "task.limit": 2, "n": 2, "max_answer_tokens": 2, "seconds": 0.01,
                 "dtypes": "[float32]", "engine.rows": 4, "output": "tuned.yaml"},
        "train-reasoner": {"output": "trained", "valid_questions": 2, "backbone.layers": 1, "backbone.width": 8,
                           "backbone.heads": 2, "optimization.batch": 2, "recipe.written_updates": 1,
                           "recipe.stage_updates": "[1,1]", "recipe.final_updates": 1, "recipe.latents": 2},
        "train-draft": {"model.checkpoint": checkpoint, "model.latents": 2, "updates": 1, "batch": 2,
                        "valid_questions": 2, "output": "draft"},
        "train-rm": {"model.checkpoint": checkpoint, "annotations": copy, "valid_annotations": copy},
    }[command]  # fmt: skip
    base = {key: value for key, value in base.items() if key not in given_keys and key.split(".")[0] not in given_keys}
    result = ltts(command, *(f"{key}={value}" for key, value in base.items()), *rest)
    assert result.code in (0, 1, 2), result.err
    assert "Traceback" not in result.err
    _, _, error = result.err.partition("ltts: error: ")
    assert (result.code == 0) == (not error), result.err
    assert not re.match(r"[\w.]*(Error|Exception|Warning)\b", error), error
    assert error.count("\n") <= 4, error


def fuzzing(draws: int):
    def decorate(function):
        health = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
        limits = settings(max_examples=draws, deadline=None, derandomize=True, suppress_health_check=health)
        return limits(given(lines(), st.sampled_from(FILES), st.binary(max_size=9) | st.just(b"[]"))(function))

    return decorate


@fuzzing(12)
@pytest.mark.slow
def test_no_line_ends_in_a_raw_exception(ltts, checkpoint, folder, line, damaged, content):
    fuzz(ltts, checkpoint, folder, line, damaged, content)


@pytest.mark.slow
@fuzzing(1000)
def test_no_line_of_many_ends_in_a_raw_exception(ltts, checkpoint, folder, line, damaged, content):
    fuzz(ltts, checkpoint, folder, line, damaged, content)
