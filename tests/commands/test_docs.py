"""What README and the quick start tell people to type can be typed."""

import re
import shlex
from pathlib import Path

import pytest
from marks import slow

from latent_tts.cli import COMMANDS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "docs" / "quickstart.md"]
OTHERS = [page for page in sorted((ROOT / "docs").glob("*.md")) if page not in PAGES]
NOT_THERE = ("engine=tuned", "...", "--help", "my_conf")  # needs `ltts tune` or a folder, or is no whole line


def lines(pages: list[Path]) -> list[str]:
    found = []
    for page in pages:
        text = re.sub(r"\\\n *", "", page.read_text())  # a line goes on after a backslash
        for block in re.findall(r"^ *```\n(.*?)^ *```$", text, re.M | re.S):
            found += [line.partition("#")[0].strip() for line in block.splitlines() if line.strip().startswith("ltts ")]
    return list(dict.fromkeys(line for line in found if not any(part in line for part in NOT_THERE)))


def test_there_are_lines():
    assert len(lines(PAGES)) >= 20
    assert len(lines(OTHERS)) >= 20


@pytest.mark.every_other
@pytest.mark.parametrize("line", [*lines(PAGES), *(slow(line) for line in lines(OTHERS))])
def test_a_line_of_the_docs_can_be_typed(ltts, tmp_path, line):
    command, *arguments = shlex.split(line)[1:]
    if command not in COMMANDS:
        for folder in ("outputs/run/x/.hydra", "outputs/run/x"):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        assert ltts(command, *arguments).code == 0
        return
    result = ltts(command, *(word for word in arguments if word != "-m"), "--cfg", "job")
    commas = [word for word in arguments if "," in word.partition("=")[2] and "[" not in word]
    if commas and "-m" in arguments:
        assert "several values" in result.err or "no such option" in result.err
        one = [re.sub(r"=([^,\[]+),.*", r"=\1", word) for word in arguments if word != "-m"]
        result = ltts(command, *one, "--cfg", "job")
    assert result.code == 0, result.err


def test_readme_is_short():
    assert len(PAGES[0].read_text().splitlines()) <= 150
