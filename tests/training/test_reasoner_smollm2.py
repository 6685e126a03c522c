"""`make reasoner-smollm2`: the whole script on a CPU, with a tiny model and seconds in place of minutes."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest
import tiny_gguf

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "experiments" / "smollm2" / "reasoner.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("reasoner_smollm2", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def write_gsm8k(folder):
    """Splits train, valid and test, in the form of the published files."""
    folder.mkdir()
    for name, first in (("train", 2), ("valid", 40), ("test", 60)):
        rows = [
            {"question": f"What is {a} plus {b}?", "answer": f"It is <<{a}+{b}={a + b}>>{a + b}.\n#### {a + b}"}
            for a in range(first, first + 8) for b in range(5)
        ]  # fmt: skip
        rows = rows if name == "train" else rows[:6]
        (folder / f"gsm8k_{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))


def write_wheel(folder):
    """A wheel of a package that nobody has."""
    folder.mkdir()
    info = "tiny_lacking-1.0.dist-info"
    with ZipFile(folder / "tiny_lacking-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny_lacking.py", "")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-lacking\nVersion: 1.0\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


def run(place, *arguments):
    environment = os.environ | {"LTTS_CACHE": str(place / "cache"), "LTTS_DATA": str(place / "data")}
    return subprocess.run(
        [sys.executable, SCRIPT, "--device", "cpu", *map(str, arguments)], cwd=place, env=environment, text=True,
        capture_output=True, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_the_whole_script_on_a_cpu(place, script):
    write_gsm8k(place / "data")
    write_wheel(place / "wheels")
    file = tiny_gguf.write(place / "tiny.gguf", tiny_gguf.model())
    assert run(place, "--base", file, "--split", place / "pieces").returncode == 0
    done = run(
        place, "--base", "pieces", "--wheels", "wheels", "--out", "out", "--questions", 6, "--trial", 2,
        "--minutes", 0.1, "--limit", 3600, "--", "save_every=50", "lora.rank=4", "validation.max_answer_tokens=4",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert (place / "out" / "site" / "tiny_lacking.py").is_file()
    back = {path.name: path.stat().st_size for path in (place / "out" / "back").iterdir()}
    assert {"verdict.json", "updates.jsonl", "adapter.adapter_model.safetensors", "state.model.safetensors"} <= set(
        back
    )
    assert max(back.values()) <= 15e6
    record = json.loads((place / "out" / "back" / "verdict.json").read_text())
    assert record["batch"] in script.BATCHES
    assert record["updates"] == len((place / "out" / "back" / "updates.jsonl").read_text().splitlines()) > 1
    assert record["skipped"] == []
    assert {"greedy - shuffle", "greedy - repeat"} <= set(record)
    assert record["thinks"] is (min(record[f"greedy - {control}"][1] for control in ("shuffle", "repeat")) > 0)
    assert "dropout n=8 coverage" in record["figures"]
    assert "checks passed: 40 training, 6 validation and 6 test questions" in done.stdout


@pytest.mark.slow
def test_what_is_missing_is_said_before_anything_is_trained(place):
    (place / "data").mkdir()
    file = tiny_gguf.write(place / "tiny.gguf", tiny_gguf.model())
    done = run(place, "--base", file, "--out", "out")
    assert done.returncode == 1
    assert "FAILED: GSM8K's split" in done.stdout
    assert not (place / "out" / "trial").exists()


def test_a_base_cut_into_pieces_is_joined_and_checked(tmp_path, script, capsys):
    base = tmp_path / "base.gguf"
    base.write_bytes(bytes(range(256)) * 10)
    pieces = script.split(base, tmp_path / "pieces", 1000, script.RECORD)
    assert [piece.stat().st_size for piece in pieces] == [1000, 1000, 560]
    assert script.join(tmp_path / "pieces", tmp_path / "models").read_bytes() == base.read_bytes()
    pieces[1].write_bytes(bytes(1000))
    (tmp_path / "models" / base.name).unlink()
    with pytest.raises(SystemExit):
        script.join(tmp_path / "pieces", tmp_path / "models")
    pieces[1].unlink()
    with pytest.raises(SystemExit):
        script.join(tmp_path / "pieces", tmp_path / "models")
    told = capsys.readouterr().out
    assert "the pieces are not those of base.gguf" in told
    assert "base.gguf.001 is missing" in told


def test_the_batch_is_the_fastest_that_allows_enough_updates(script):
    def trial(batch, seconds):
        return script.Trial(batch, seconds, seconds, 0)

    trials = [trial(32, 0.10), trial(64, 0.15), trial(128, 0.25), trial(256, 1.0)]
    best, overrides = script.chosen(trials, 300)
    assert best.batch == 128  # 256 would allow 300 updates
    assert "recipe.stage_updates=[200,200,200]" in overrides
    assert "optimization.batch=128" in overrides
    best, overrides = script.chosen(trials, 20)
    assert best.batch == 32
    assert "recipe.stage_updates=[]" in overrides
    for seconds in (20, 60, 300):
        counts = [override.partition("=")[2] for override in script.chosen(trials, seconds)[1][:3]]
        assert int(counts[0]) + sum(json.loads(counts[1])) + int(counts[2]) == script.SHARES


def test_files_to_keep_are_cut_to_size(tmp_path, script, monkeypatch):
    monkeypatch.setattr(script, "BACK_MB", 0.001)
    for name in ("checkpoint", "states/checkpoint-9"):
        (tmp_path / "training" / name).mkdir(parents=True)
    (tmp_path / "training" / "states" / "updates.jsonl").write_text("{}\n")
    (tmp_path / "training" / "checkpoint" / "adapter_model.safetensors").write_bytes(bytes(2500))
    (tmp_path / "training" / "states" / "checkpoint-9" / "model.safetensors").write_bytes(bytes(900))
    (tmp_path / "training" / "states" / "checkpoint-9" / "optimizer.pt").write_bytes(bytes(5000))
    script.pack(tmp_path / "training", tmp_path, {"thinks": None})
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "back").iterdir()}
    assert max(sizes.values()) <= 1000
    assert sizes["adapter_model.safetensors.002"] == 500
    assert "state.optimizer.pt" not in sizes
