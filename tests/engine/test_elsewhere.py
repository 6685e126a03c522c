"""What a GPU refuses is refused by a device of our own making, and results are those of the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parents[1] / "helpers"


@pytest.mark.slow
def test_engine_and_training_compute_the_same_on_another_device():
    environment = os.environ | {"PYTHONPATH": f"{HERE.parents[1] / 'src'}{os.pathsep}{HERE}"}
    done = subprocess.run([sys.executable, HERE / "elsewhere.py"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": same\n") == 3 * (4 * 6 + 1 + 2 * 2) + 5 + 1 + 6 + 7


@pytest.mark.slow
def test_tests_for_a_gpu_need_no_package_that_they_do_not_use(tmp_path):
    (tmp_path / "gguf.py").write_text("raise ImportError")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parents[1] / "src"), str(tmp_path)])}
    line = [sys.executable, "-m", "pytest", "-m", "gpu", "--collect-only", "-p", "no:cacheprovider", HERE.parent]
    done = subprocess.run(line, cwd=HERE.parents[1], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "test_graphs.py" in done.stdout
