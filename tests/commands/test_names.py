"""Names are text: no markup, no escape sequence, no formula, whatever a user or a file calls a thing."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from marks import slow

from latent_tts.errors import printable
from latent_tts.results import report
from latent_tts.results.files import plain_cells, spreadsheet_cells
from latent_tts.results.run_folder import read_metrics

ROOT = Path(__file__).resolve().parents[2]
NAMES = ["[/]", "[bold]x[/bold]", "+x", "-x", "@x", "$x_", "'=x", "名前"]


@pytest.mark.parametrize("name", ["=1+1", *map(slow, ["[link=file:///etc]x", *NAMES])])
def test_a_models_name_is_shown_as_it_is(run, name):
    result = run(f"model.name='{name}'" if "'" not in name else f'model.name="{name}"', "budget=ladder")
    assert result.code == 0, result.err
    assert f"{name} on arith" in result.out
    assert set(read_metrics(result.last)["model"]) == {name}
    with result.last.open() as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    assert not [cell for cell in cells if cell[:1] in ("=", "+", "@") or (cell[:1] == "-" and not cell[1:2].isdigit())]


def test_escape_sequences_are_written_out(run):
    result = run("model.name='\x1b[31mred\x07\u202e'")
    assert result.code == 0, result.err
    assert "\x1b[31m" not in result.out + result.err
    assert r"\x1b[31mred\x07\u202e on arith" in result.out
    refused = run("task.split='\x1b]0;title\x07'")
    assert refused.code == 2
    assert r"\x1b]0;title\x07" in refused.err
    assert "\x1b" not in refused.err


def test_cells_and_columns_hold_no_markup(capsys):
    report.print_table("[/]", ["[red]column"], [["[/]\x1b[1m"]])
    out = capsys.readouterr().out
    assert "[red]column" in out
    assert r"[/]\x1b[1m" in out


def test_every_csv_is_written_without_formulas():
    lines = [line for path in (ROOT / "src").rglob("*.py") for line in path.read_text().splitlines()]
    written = [line for line in lines if ".to_csv(" in line]
    assert written
    assert not [line for line in written if "spreadsheet_cells(" not in line]


@given(st.lists(st.text("=+-@'\t a1.e"), min_size=1, max_size=8))
def test_no_cell_is_a_formula_and_each_is_read_back(cells):
    frame = pd.DataFrame({"text": cells, "number": [-1.5] * len(cells)})
    written = spreadsheet_cells(frame)
    assert written["number"].equals(frame["number"])
    for cell in written["text"]:
        assert cell[:1] not in tuple("=+-@\t") or pd.notna(pd.to_numeric(cell, errors="coerce"))
    pd.testing.assert_frame_equal(plain_cells(written), frame)


@given(st.text())
def test_printable_text_has_no_control_characters_but_newlines(text):
    assert all(character == "\n" or ord(character) > 31 for character in printable(text))


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_an_output_encoding_without_every_character_is_no_error(encoding, tmp_path, checkpoint):
    code = "from latent_tts.cli import entry; entry()"
    line = ["run", f"model.checkpoint={checkpoint}", "task.limit=2", "n=2", "model.name='名 ±'", "seed=0,1", "-m"]
    environment = os.environ | {"PYTHONIOENCODING": encoding, "LTTS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", code, *line], capture_output=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr.decode()[-600:]
    assert rb"\u540d" in done.stdout


def test_a_checkpoint_given_alone_is_called_by_its_own_name(ltts, checkpoint):
    result = ltts("run", f"model.checkpoint={checkpoint}", "task.limit=2", "n=1", "max_answer_tokens=2")
    assert result.code == 0, result.err
    assert f"{checkpoint.name} on arith/test" in result.out
    assert "demo_coconut" not in result.out
    assert pd.read_csv(result.last)["model"].eq(checkpoint.name).all()
