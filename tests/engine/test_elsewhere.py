"""What a GPU refuses is refused by a device of our own making, and results are those of the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from latent_tts.results.run_folder import read_rollouts

HERE = Path(__file__).parents[1] / "helpers"
LINES = [
    ["model=demo_coconut", "sampler=gaussian", "budget=fixed", "keep_latents=true"],
    ["model=demo_coconut", "sampler=gaussian", "budget=adaptive", "budget.round=1"],
    ["model=demo_colar", "sampler=gaussian", "budget=fixed"],
    ["model=demo_cot", "sampler=greedy", "budget=fixed", "answer.temperature=1"],
    ["model=demo_coconut", "sampler=dropout", "budget=fixed", "sampler.where=[prompt,thoughts,answer]"],
]


def run_there(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": f"{HERE.parents[1] / 'src'}{os.pathsep}{HERE}"}
    done = subprocess.run([sys.executable, HERE / script, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
def test_engine_and_training_compute_the_same_on_another_device():
    assert run_there("elsewhere.py").stdout.count(": same\n") == 3 * (4 * 6 + 1 + 2 * 2) + 5 + 1 + 6 + 7


@pytest.mark.slow
def test_tests_for_a_gpu_need_no_package_that_they_do_not_use(tmp_path):
    (tmp_path / "gguf.py").write_text("raise ImportError")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parents[1] / "src"), str(tmp_path)])}
    line = [sys.executable, "-m", "pytest", "-m", "gpu", "--collect-only", "-p", "no:cacheprovider", HERE.parent]
    done = subprocess.run(line, cwd=HERE.parents[1], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "test_graphs.py" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("line", LINES, ids=" ".join)
def test_a_run_of_replayed_graphs_draws_the_rollouts_of_the_cpu(ltts, place, line):
    line = ["run", "task.limit=12", "n=4", "engine.rows=8", "max_answer_tokens=4", *line]
    assert ltts(*line, "engine.device=cpu", "paths.cache=here", "hydra.run.dir=cpu").code == 0
    run_there("played_gpu.py", *line, "engine.device=cuda", "engine.graph=on", "paths.cache=there", "hydra.run.dir=gpu")
    here, there = (read_rollouts(place / name) for name in ("cpu", "gpu"))
    assert list(there["answer_text"]) == list(here["answer_text"])
    assert list(there["latent_steps"]) == list(here["latent_steps"])
    for name in ("answer_logprob", "score"):
        np.testing.assert_allclose(there[name].astype(float), here[name].astype(float), rtol=0, atol=1e-3)
    if "keep_latents=true" in line:
        latents = [load_file(place / name / "latents.safetensors")["latents_RTD"] for name in ("cpu", "gpu")]
        np.testing.assert_allclose(*latents, rtol=0, atol=1e-4)
