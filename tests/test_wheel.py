"""The built wheel holds the configs and the weights, and runs away from the checkout."""

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_the_wheel_runs_from_another_folder(tmp_path):
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, text=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert wheel.stat().st_size < 12_000_000  # checkpoints of 1.4 to 1.6 MB each, compressed
    weights = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".safetensors")}
    here = ROOT / "src"
    assert weights == {str(path.relative_to(here)) for path in here.glob("latent_tts/weights/*/model.safetensors")}
    # the dependencies are this environment's; the project is the wheel's alone
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    packages = [path for path in sys.path if path.endswith("site-packages")]
    (site / "dependencies.pth").write_text("".join(f"{path}\n" for path in packages))
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"LTTS_CACHE": str(tmp_path / "cache")}
    command = [str(tmp_path / "venv" / "bin" / "ltts"), "run", "experiment=smoke"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].endswith("metrics.csv")
    where = [str(python), "-c", "import latent_tts; print(latent_tts.__file__)"]
    assert str(site) in subprocess.run(where, cwd=tmp_path, env=env, capture_output=True, text=True, check=True).stdout
