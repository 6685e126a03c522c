"""Help, lists and completion: every key and option with its comment, at the terminal's width, in a real shell."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from refusal import check
from terminal import STYLE, on_terminal

from latent_tts import cli
from latent_tts.cli import COMMANDS, FLAG_CHOICES, FLAGS_OF_COMMAND
from latent_tts.config.completion import SCRIPTS, candidates
from latent_tts.config.help import PLURALS, definitions
from latent_tts.config.reference import GROUPS, conf_dir, option_names, read_command, read_option

CONF = [Path(conf_dir())]
FILES = [name.replace("-", "_") for name in COMMANDS]
OPTIONS = [(group, name) for group in GROUPS for name in option_names(group, CONF)]


def test_help_needs_neither_torch_nor_hydra():
    code = (
        "import sys; from latent_tts import cli; cli.main(['train-reasoner', '--help']); cli.main(['list']); "
        "assert not {'torch', 'transformers', 'hydra', 'pandas'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


@pytest.mark.parametrize("command", FILES)
def test_every_key_of_a_command_has_a_comment_and_a_type(command):
    for key in read_command(command).keys:
        assert key.comment, key.name
        assert key.kind or key.name.startswith(("task.", "annotate.")), key.name


@pytest.mark.parametrize(("group", "name"), OPTIONS)
def test_every_option_says_what_it_is_and_what_its_keys_mean(group, name):
    option = read_option(group, name, CONF)
    assert option.about
    for key in option.keys if group != "experiment" else ():
        assert key.comment, key.name


def test_every_group_is_described_and_can_be_listed():
    groups = {group for command in FILES for group in read_command(command).groups}
    assert groups == {group for group in GROUPS if "/" not in group}
    assert set(PLURALS.values()) == set(GROUPS) - {"local"}


def test_a_commands_help_lists_keys_types_defaults_and_options(ltts, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    shown = ltts("run", "--help").out
    lines = {" ".join(line.split()) for line in shown.splitlines()}
    assert "usage: ltts run [KEY=VALUE ...] [GROUP=OPTION ...] [-m]" in lines
    assert "n=16 rollouts per question [integer]" in lines
    assert "answer.top_p=1.0 draw only from the most probable tokens that together reach this" in lines
    assert "sampler.rate dropout rate, in [0, 1) [number; default: model.recommended.rate]" in lines
    assert "* sampler=dropout Monte Carlo dropout: dropout switched on at test time" in lines
    assert "sampler=gaussian Gaussian noise added to every latent" in lines
    assert "sampler.sigma" not in shown
    assert "sampler.sigma" in ltts("run", "sampler=gaussian", "-h").out
    assert ltts("run", "-h").out == ltts("help", "run").out == shown
    assert ltts("help", "run", "sampler=gaussian").out == ltts("run", "--help", "sampler=gaussian").out
    assert "recipe=codi" in ltts("train-reasoner", "model=demo_codi", "--help").out
    assert "* recipe=codi" in ltts("train-reasoner", "model=demo_codi", "--help").out
    assert "Groups" not in ltts("plot", "-h").out
    assert "usage: ltts compare A B [KEY=VALUE ...]" in ltts("compare", "-h").out


def test_options_of_the_user_and_of_a_folder_are_shown(ltts, tmp_path):
    for folder, name in (("config/latent_tts", "mine"), ("here", "other")):
        (tmp_path / folder / "task").mkdir(parents=True)
        (tmp_path / folder / "task" / f"{name}.yaml").write_text(f"# {name} questions\npath: x # where\n")
    assert "task=mine   " in ltts("run", "--help").out
    shown = ltts("run", "--help", "--config-dir", "here", "task=other").out
    assert "* task=other" in shown
    assert "task.path=x  where" in shown
    assert "mine questions" in ltts("list", "tasks").out


@pytest.mark.parametrize("width", [60, 80, 120])
def test_texts_fit_the_terminal(ltts, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    shown = [ltts("help", "sampler").out, ltts("list").out] + [ltts(command, "-h").out for command in ("tune", "cache")]
    for line in "\n".join(shown).splitlines():
        assert len(line) <= width or line.startswith("  ltts") or " " not in line.strip(), line
    assert definitions([("a", "word " * 20)], width).count("\n") == (100 - 1) // (width - 5)


def test_an_experiment_is_shown_where_it_can_be_chosen(ltts):
    of_run, of_training = ltts("run", "--help").out, ltts("train-reasoner", "--help").out
    assert "experiment=smoke" in of_run
    assert "smollm2/" not in of_run
    assert "experiment=smollm2/coconut" in of_training
    assert "experiment=smoke" not in of_training
    assert "smollm2/coconut" in ltts("list", "experiments").out
    assert ltts("train-reasoner", "experiment=smollm2/coconut", "--cfg", "job").code == 0


def test_a_group_and_all_options_are_listed(ltts):
    shown = ltts("help", "sampler").out
    assert "sampler.sigma" in shown
    assert "sampler.rate" in shown
    assert [line.split()[0] for line in ltts("list", "searches").out.splitlines()[1:]] == ["beam", "independent"]
    every = ltts("list").out
    assert all(f"{plural} ({group}=NAME)" in every for plural, group in PLURALS.items())
    check(ltts("list", "smaplers"), "'smaplers'; did you mean samplers? one of models, tasks, samplers")
    check(ltts("help", "nothing"), "no command, group or key 'nothing'", "one of run, ask, rescore")
    check(ltts("completion", "fish"), "usage: ltts completion bash|zsh")


def test_the_rules_of_a_budget_have_a_list_and_a_help_of_their_own(ltts):
    assert {"lockout", "certified"} <= {line.split()[0] for line in ltts("list", "rules").out.splitlines()[1:]}
    shown = ltts("help", "budget/rule").out
    assert "budget.rule.delta=0.05" in shown
    assert ltts("help", "rule").out == ltts("help", "rules").out == shown


def test_a_key_has_a_help(ltts, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    shown = ltts("help", "n").out
    assert "ltts run, ltts ask, ltts trace:\n  n=16  rollouts per question [integer]\n" in shown
    assert "ltts annotate:\n  n=8  rollouts per question" in shown
    of_schedule = ltts("help", "schedule.tolerance").out
    assert of_schedule.startswith("schedule=speculative:\n  schedule.tolerance=0.0  relative RMS")
    assert "budget/rule=certified:\n  budget.rule.delta=0.05" in ltts("help", "delta").out
    check(ltts("help", "tolerence"), "no command, group or key 'tolerence'; did you mean tolerance?")


def test_runs_are_listed(run, ltts, tmp_path):
    check(ltts("list", "runs"), "no run in outputs or multirun")
    folder = run().last.parent
    started = folder.with_name("started")
    (started / ".hydra").mkdir(parents=True)
    shown = ltts("list", "runs").out
    assert "2 runs" in shown
    row = next(line for line in shown.splitlines() if folder.name[:10] in line)
    assert "demo_coconut" in row
    assert "incomplete" in shown
    check(ltts("list", "runs", "nowhere"), "runs=nowhere: no such folder")


def test_runs_fit_a_terminal_of_80_columns(run):
    folder = run("sampler=gaussian", "sampler.sigma=0.1").last.parent
    of_sweep = Path("multirun/run") / folder.name / "0"
    shutil.copytree(folder, of_sweep)
    shown = STYLE.sub("", on_terminal(lambda _: cli.main(["list", "runs"]), columns=80))
    head, *rows = [line for line in shown.splitlines() if line[:1] not in (" ", "─", "")][1:]
    assert head.split() == ["folder", "model", "sampler", "n"]
    assert sorted(row.split()[0] for row in rows) == sorted([str(of_sweep), str(Path("outputs/run") / folder.name)])
    assert max(map(len, shown.splitlines())) <= 80


def offered(line: str) -> list[str]:
    words = {"list": ["models", "runs"], "help": ["run"]}
    flags = {name: ["--help", "-m", *FLAGS_OF_COMMAND.get(name, ())] for name in COMMANDS}
    return candidates(line, list(COMMANDS), words, flags, FLAG_CHOICES)


def test_what_a_line_can_go_on_with():
    assert offered("ltts resc") == ["rescore"]
    assert offered("ltts list ") == ["models", "runs"]
    assert offered("ltts run sampler=g") == ["sampler=gaussian", "sampler=greedy"]
    assert offered("ltts run sampler=gaussian,dr") == ["sampler=gaussian,dropout"]
    assert offered("ltts run sampler=gaussian sampler.s") == ["sampler.sigma="]
    assert offered("ltts run sampler=dropout sampler.s") == ["sampler.site="]
    assert offered("ltts run keep_latents=") == ["keep_latents=true", "keep_latents=false"]
    assert offered("ltts run -") == ["--help", "-m"]
    assert offered("ltts ask --json --") == ["--help", "--json", "--example"]
    assert offered("ltts run --i") == []
    assert offered("ltts run -i ") == list(FLAG_CHOICES["-i"])
    assert offered("ltts run --cfg h") == ["hydra"]
    assert offered("ltts run --config-dir ") == []
    assert offered("ltts run budget=adaptive budget/") == ["budget/rule="]
    assert offered("ltts run budget=adaptive budget/rule=p") == ["budget/rule=posterior"]
    assert offered("ltts run budget=adaptive budget/rule=posterior budget.rule.") == ["budget.rule.threshold="]
    assert offered("ltts run budget/") == []
    assert offered("ltts run +experiment=s") == ["+experiment=smoke"]
    assert offered("ltts train-reasoner experiment=s") == ["experiment=smollm2/coconut", "experiment=smollm2/codi"]
    assert offered("ltts run aggregator=[ma") == ["aggregator=[majority"]
    assert offered("ltts run aggregator=[majority,li") == ["aggregator=[majority,likelihood"]
    assert offered("ltts run aggregator=[likelihood,li") == []
    assert offered("ltts run sampler=gaussian,g") == ["sampler=gaussian,greedy"]
    assert offered("ltts cache p") == ["prune", "paths.cache="]
    assert "seed=" in offered("ltts run n=4 ")
    assert offered("ltts run task.path=qu") == []
    assert offered("ltts nothing ") == []


@pytest.fixture
def ltts_on_path(tmp_path, monkeypatch):
    program = tmp_path / "bin" / "ltts"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m latent_tts "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")


def test_bash_completes(ltts_on_path):
    script = """
        eval "$(ltts completion bash)"
        tab() {
            COMP_LINE="$1" COMP_POINT=${#1} COMP_WORDS=($1) COMP_CWORD=$((${#COMP_WORDS[@]} - 1)) COMPREPLY=()
            _ltts 2>/dev/null
            echo "${COMPREPLY[*]}"
        }
        complete -p ltts
        tab "ltts resc"
        tab "ltts run sampler=ga"
        tab "ltts ask --json --ex"
        tab "ltts run --info defaults-"
    """
    done = subprocess.run(["bash", "--norc", "-c", script], capture_output=True, text=True, check=True)
    wanted = ["rescore", "gaussian", "--example", "defaults-tree"]
    assert done.stdout.splitlines() == ["complete -o default -F _ltts ltts", *wanted]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("zsh") is None, reason="needs zsh")
def test_zsh_completes(ltts_on_path, tmp_path):
    script = """
        autoload -Uz compinit && compinit -u -d "$1"
        eval "$(ltts completion zsh)"
        compadd() { print -- "${@[@]:#(-S|--|)}" }
        PREFIX="sampler=ga" CURRENT=3 words=(ltts run "sampler=ga")
        _ltts
        PREFIX="answer.de" words=(ltts run "answer.de")
        _ltts
        PREFIX="--ex" CURRENT=4 words=(ltts ask --json "--ex")
        _ltts
    """
    done = subprocess.run(
        ["zsh", "-f", "-c", script, "zsh", tmp_path / "dump"], capture_output=True, text=True, check=True
    )
    words = done.stdout.split()
    assert words == ["sampler=gaussian", "answer.decode=", "--example"], done.stderr


def test_scripts_say_where_they_go(ltts):
    for shell, script in SCRIPTS.items():
        assert f'eval "$(ltts completion {shell})"' in script
        assert ltts("completion", shell).out.rstrip() == script.rstrip()
