"""What a user meant: paths with `=`, values that need quotes, flags of other programs, words nearly right."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from refusal import check

from latent_tts.config.meant import quoted, quoted_override
from latent_tts.errors import RunError, computing


@pytest.mark.slow
def test_a_sweep_over_n_names_its_folders_after_what_was_given(ltts, checkpoint):
    line = ["run", f"model.checkpoint={checkpoint}", "task.limit=2", "n=1,2", "sampler=greedy", "-m"]
    dirname = "hydra.sweep.subdir=${hydra.job.override_dirname}"
    made = ltts(
        *line, dirname, "hydra.sweep.dir=sw", "hydra.job.config.override_dirname.exclude_keys=[model.checkpoint]"
    )
    assert made.code == 0, made.err
    names = sorted(path.parent.name for path in Path("sw").rglob("run.json"))
    assert names == [f"n={n},sampler=greedy,task.limit=2" for n in (1, 2)]


def test_paths_with_an_equals_sign(run, ltts, tmp_path, no_figures):
    subdir = "hydra.sweep.subdir=${hydra.job.override_dirname}"
    made = run("n=1,2", "sampler=gaussian", "-m", subdir, "hydra.sweep.dir=sw", "keep_latents=true")
    assert made.code == 0, made.err
    folders = sorted(path.parent for path in Path("sw").rglob("run.json"))
    assert len(folders) == 2
    assert all("=" in str(folder) for folder in folders)
    joined = ltts("collect", *folders)
    assert joined.code == 0, joined.err
    drawn = ltts("plot", folders[1] / "metrics.csv", "output=here.png")
    assert drawn.code == 0, drawn.err
    paired = ltts("compare", *folders, "a_n=1", "b_n=2")
    assert paired.code == 0, paired.err
    check(ltts("rescore", folders[1], "scorer=none"), "scorer=none", "name one")


def test_a_path_with_an_equals_sign_that_is_not_there(ltts):
    check(ltts("convert", "runs/epoch=6.ckpt", "new"), "src=runs/epoch=6.ckpt: no such file or folder")
    check(ltts("collect", "ouput=x"), "ouput: no such key; did you mean output?")


@pytest.mark.every_other
@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("compare", ["usage: ltts compare A B"]),
        ("compare x", ["usage: ltts compare A B", "B is missing"]),
        ("run n=1,4", ["n=1,4: several values; -m runs a job for each"]),
        ("probe tolerances=0.1,0.2", ["several values; -m runs a job for each, tolerances=[0.1,0.2] is a list"]),
        ("run --limit 5", ["did you mean task.limit=5?"]),
        ("run -n 4", ["did you mean n=4?"]),
        ("run --seed=3", ["did you mean seed=3?"]),
        ("run --model coconut", ["did you mean model=coconut?"]),
        ("run --tasks gsm8k", ["did you mean task=gsm8k?"]),
        ("run --output_path here", ["did you mean hydra.run.dir=here?"]),
        ("ask --output_path here", ["did you mean hydra.run.dir=here?"]),
        ("run batch_size=8", ["batch_size: no such key; did you mean engine.rows?"]),
        ("plot --output_path here.pdf", ["did you mean output=here.pdf?"]),
        ("run gausian", ["did you mean sampler=gaussian?"]),
        ("run sampler gaussian", ["did you mean sampler=NAME?"]),
        ("run limit=5", ["limit: no such key; did you mean task.limit?"]),
        ("run temperature=1", ["did you mean answer.temperature?"]),
        ("annotate dtype=fp16", ["did you mean engine.dtype?"]),
        ("run sampler=gausian", ["did you mean gaussian?"]),
        ("run task.path=x", ["task.path: no such key", "task=jsonl"]),
        ("rum", ["did you mean run?"]),
        ("run aggregator=null", ["aggregator=null: must be a list of best_of_n, ", "majority"]),
        (
            "run task=[arith,jsonl]",
            ["task=[arith,jsonl]: must be one of arith, ", "; -m task=arith,jsonl runs a job for"],
        ),
        ("run sampler=[gaussian]", ["sampler=[gaussian]: must be one of control, dropout"]),
        ("run task=[[arith]]", ["task=[[arith]]: must be one of arith, "]),
        ("run -m task=[arith,jsonl],arith", ["task=[arith,jsonl],arith: must be one of"]),
        ("run task=arith,jsonl", ["task=arith,jsonl: several values; -m runs a job for each"]),
        ("run aggregator=[majority,[weighted]]", ["must be a list of best_of_n, likelihood"]),
        ("annotate sampler=[gaussian,dropout] output=x", ["sampler=[gaussian,dropout]: must be one of"]),
        ("rescore x scorer=[auto,none]", ["scorer=[auto,none]: must be one of auto, latent_rm, none"]),
        ("replay x budget/rule=[lockout]", ["budget/rule=[lockout]: must be one of certified, "]),
        ("run budget=adaptive budget/rule={a:1}", ["budget/rule={a:1}: must be one of"]),
        ("run budget=adaptive budget.rule=lockout", ["budget.rule=lockout: ", "`budget/rule=NAME`"]),
        ("run budget/rule=lockout", ["budget=ladder has no rule; choose budget=adaptive"]),
        ("run sigma=0.1", ["sigma: no such key; did you mean sampler.sigma? It goes with sampler=gaussian"]),
        ("run round=4", ["did you mean budget.round? It goes with budget=adaptive or budget=shared"]),
        ("run budget=adaptive budget.rule.delta=0.1", ["options with that key: budget/rule=certified"]),
        ("run delta=0.1", ["delta: no such key; did you mean budget.rule.delta? It goes with budget/rule=certified"]),
        ("train-rm scorer=auto output=x", ["scorer: ltts train-rm has no such group"]),
        ("run answer=3", ["answer=3: must be a mapping", "answer.KEY=VALUE"]),
        ("run answer=[1]", ["answer=[1]: must be a mapping"]),
        ("tune dtypes={}", ["dtypes={}: must be a list, as in dtypes=[A,B]"]),
        ("cache action=[list]", ["action=['list']: must be text"]),
        ("run schedule=nan", ["schedule=nan: must be one of auto, ", "sequential"]),
        ("run schedule=null", ["schedule=null: must be one of auto, "]),
        ("run task=[1,2]", ["task=[1,2]: must be one of arith, "]),
        ("run aggregator=[]", ["aggregator: needs a value"]),
        ("run n=null", ["n: needs a value"]),
        ("run model.recommended=null", ["model.recommended: must be a mapping with rate"]),
        ("run model.trained_latents=3", ["model.trained_latents=3: must be a mapping"]),
        ("run model.name={}", ["model.name={}: must be text"]),
        ("run model.revision=[1]", ["model.revision=[1]: must be text"]),
        ("train-rm seed=-1", ["seed=-1: must be a whole number, 0 or more"]),
        ("run =3", ["=3: not of the form key=value"]),
        ("collect ~nosuchuser/x", ["no home folder"]),
        ("collect =", ["=: not of the form key=value"]),
        ("run ~sampler", ["ltts run: '~sampler' is not of the form key=value; `ltts"]),
        ("run sampler.=3", ["sampler.=3: not of the form key=value; `ltts run --help` lists keys"]),
        ("collect \udcff", ["the byte 0xff is not UTF-8"]),
        (f"run hydra.run.dir={300 * 'x'}", ["hydra.run.dir=xxx", "File name too long"]),
        ("run --cfg jobs", ["--cfg jobs: must be one of job, hydra, all"]),
        ("run --cfg", ["--cfg: needs one of job, hydra, all"]),
        ("run -cn nosuch", ["--config-name nosuch: no such config"]),
        ("run keep_latents=maybe", ["keep_latents=maybe: must be true or false"]),
        ("run paths.cache=", ["paths.cache=: must be a folder"]),
        ("tune dtypes=fp32", ["dtypes: must be a list, as in dtypes=[A,B]"]),
        ("run seed=-1", ["seed=-1: must be a whole number, 0 or more"]),
    ],
)
def test_a_line_of_which_the_meaning_can_be_told(ltts, line, words):
    result = ltts(*line.split())
    check(result, *words)
    assert "Error executing job" not in result.err


def test_a_number_is_offered_no_list(ltts):
    assert "is a list" not in ltts("run", "n=1,4").err


def test_spaces_around_the_equals_sign(ltts):
    check(ltts("run", "n = 4"), "did you mean n=4?")


@pytest.mark.every_other
@pytest.mark.parametrize("value", ["~/a b.jsonl", "ä.jsonl", "a (b),c.jsonl", "a[1].jsonl", "it's.jsonl", "{x}.jsonl"])
def test_the_quoted_form_that_is_shown_works(ltts, run, tmp_path, monkeypatch, value):
    monkeypatch.setenv("HOME", str(tmp_path))
    refused = ltts("run", "task=jsonl", f"task.path={value}")
    check(refused, "with quotes around the value")
    shown = refused.err.partition("write ")[2].partition(", with quotes")[0]
    (typed,) = shlex.split(shown)
    Path(value).expanduser().write_text(json.dumps({"question": "Ann has 3 pens.", "answer": 3}) + "\n")
    result = run("task=jsonl", typed)
    assert result.code == 0, result.err


@settings(deadline=None)
@given(st.text(st.characters(blacklist_categories=["Cc", "Cs"])))
def test_quotes_keep_every_text(text):
    override = OverridesParser.create().parse_override(f"key={quoted(text)}")
    value = OmegaConf.create({"key": override.value()}).key if text != "???" else text
    assert value == text
    fixed = quoted_override(f"key={text}")
    assert fixed is not None
    assert shlex.split(fixed) == [f"key={quoted(text)}"]


def test_relative_paths_mean_the_folder_that_the_command_was_started_in(run, checkpoint):
    Path("q.jsonl").write_text(json.dumps({"question": "Ann has 3 pens.", "answer": 3}) + "\n")
    os.symlink(checkpoint, "own")
    line = ["task=jsonl", "task.path=q.jsonl", "model.checkpoint=own", "paths.cache=here", "hydra.job.chdir=true"]
    result = run(*line)
    assert result.code == 0, result.err
    assert Path("here").is_dir()


def test_a_sweeps_errors_name_their_job_and_stand_in_its_log(run, monkeypatch):
    def fail(*arguments):
        raise RunError("the disk burns")

    monkeypatch.setattr("latent_tts.pipeline.running.draw_rollouts", fail)
    result = run("n=0,1", "seed=7", "-m")
    assert result.code == 2
    assert "ltts: error: job n=0: n=0: must be a number" in result.err
    assert "ltts: error: job n=1: the disk burns" in result.err
    logs = {path.parent.name: path.read_text() for path in Path("multirun").rglob("run.log")}
    (sweep,) = Path("multirun/run").iterdir()
    assert logs.keys() == {sweep.name, "1"}
    assert "the disk burns" in logs["1"]
    assert "job n=0: n=0: must be a number of rollouts" in logs[sweep.name]
    assert "job n=1: the disk burns" in logs[sweep.name]
    single = run("seed=8")
    assert single.code == 1
    assert single.err.count("the disk burns") == 1


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device", "f"), RuntimeError("No space left on device")]
)
def test_a_full_disk_is_one_line(run, monkeypatch, error):
    monkeypatch.setattr("latent_tts.pipeline.running.make_tables", lambda *arguments: (_ for _ in ()).throw(error))
    result = run()
    assert result.code == 1
    assert "no space left on the disk\nfinished work is kept" in result.err


def test_an_empty_memory_error_says_what_it_is(run, monkeypatch):
    with pytest.raises(RunError, match="drawing failed: out of memory"), computing("drawing", "kept"):
        raise MemoryError
    failing = Mock(side_effect=MemoryError)
    monkeypatch.setattr("latent_tts.pipeline.running.make_tables", failing)
    result = run()
    assert result.code == 1
    assert "ltts: error: out of memory\n" in result.err


def test_a_user_without_a_home(monkeypatch, ltts):
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.delenv("XDG_CONFIG_HOME")
    assert ltts("run", "--cfg", "job").code == 0
    check(ltts("tune", "task.limit=1"), "output=null", "no home folder")


def test_a_path_with_the_character_nul_is_named(ltts, checkpoint):
    few = f"model.checkpoint={checkpoint}", "task.limit=2", "n=2", "completions=1", "max_answer_tokens=2"
    check(ltts("annotate", *few, "output='\0'"), "output: has the character NUL")


def test_a_relative_path_with_a_colon_is_no_address(run, ltts, checkpoint):
    assert run("paths.cache=a:cache").code == 0
    few = f"model.checkpoint={checkpoint}", "task.limit=2", "n=2", "completions=1", "max_answer_tokens=2"
    assert ltts("annotate", *few, "output=a:labels").code == 0


def test_a_path_that_looks_like_a_flag_is_shown_as_it_works(ltts, own_copy, place):
    own_copy.rename(place / "-runs")
    check(ltts("collect", "-runs"), "the file or folder is ./-runs")
    assert ltts("collect", "./-runs").code == 0


def test_short_dtypes_are_familiar(run, ltts, checkpoint):
    result = run("engine.dtype=fp32")
    assert result.code == 0, result.err
    assert ",float32," in result.last.read_text()
    line = [f"model.checkpoint={checkpoint}", "task.limit=2", "n=2", "max_answer_tokens=2", "seconds=1"]
    tuned = ltts("tune", *line, "dtypes=[fp32,bf16]", "output=tuned.yaml")
    assert tuned.code == 0, tuned.err
    assert "float32" in tuned.out
    assert "bfloat16" in tuned.out
    assert "fp32" not in tuned.out


def test_the_console_script_is_tested_with_the_same_arguments():
    line = [sys.executable, "-m", "latent_tts", "compare"]
    done = subprocess.run(line, capture_output=True, text=True, env=os.environ)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
