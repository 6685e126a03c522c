"""The command line from outside: what is printed, where, and with which exit code."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from marks import slow
from refusal import check, check_refused

from latent_tts.results.run_folder import METRIC_COLUMNS, ROLLOUT_COLUMNS


def test_help_lists_every_command_and_imports_nothing_slow():
    code = (
        "import sys; from latent_tts import cli; cli.main(['--help']); "
        "assert not {'torch', 'transformers', 'hydra', 'omegaconf', 'numpy', 'pandas'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for command in ("run", "train-reasoner", "train-rm", "collect", "compare", "plot", "convert"):
        assert f"\n  {command} " in done.stdout


def test_a_refused_config_is_composed_once_and_imports_nothing_slow(tmp_path):
    code = """
import sys
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from latent_tts import cli
compose, composed = ConfigLoaderImpl.load_configuration, []
ConfigLoaderImpl.load_configuration = lambda *given, **more: composed.append(1) or compose(*given, **more)
for argument in ("samplr=gaussian", "sampler=gausian", "n=many", "-n=4"):
    composed.clear()
    assert cli.main(['run', argument]) == 2
    assert len(composed) <= 1, (argument, composed)
    assert not {'torch', 'pandas', 'pyarrow', 'rich'} & set(sys.modules), argument
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("main", ["lambda: os.kill(os.getpid(), signal.SIGINT)", "lambda: 130"])
def test_ctrl_c_before_a_command_begins_and_after_it_ended_shows_no_traceback(main):
    code = f"""
import atexit, os, signal
from latent_tts import cli
signal.signal(signal.SIGINT, signal.default_int_handler)
atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))
cli.main = {main}
cli.entry()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGINT
    assert done.stderr == ("" if "130" in main else "interrupted: nothing was begun\n")


@pytest.mark.parametrize("drops", ["weak reference", "except"])
def test_ctrl_c_that_an_import_drops_is_raised_at_the_next(drops):
    code = f"""
import os, signal, weakref
from latent_tts import cli
signal.signal(signal.SIGINT, signal.default_int_handler)
def press(*_):
    os.kill(os.getpid(), signal.SIGINT)
def main():
    if {drops!r} == "except":
        try:
            press()
        except BaseException:
            pass
    else:
        lock = press.__class__(press.__code__, globals())
        reference = weakref.ref(lock, press)
        del lock
    import colorsys
    print("went on")
cli.main = main
cli.entry()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "interrupted: nothing was begun\n"


def test_cfg_job_prints_the_config_and_runs_nothing(ltts, tmp_path):
    result = ltts("run", "--cfg", "job", "n=3")
    assert result.code == 0
    assert "max_answer_tokens:" in result.out
    assert not (tmp_path / "outputs").exists()


def test_a_run_ends_with_the_path_of_its_metrics_and_writes_every_table(run):
    result = run("keep_latents=true", "budget=ladder")
    assert result.code == 0, result.err
    assert result.last.name == "metrics.csv"
    folder = result.last.parent
    rollouts = pd.read_parquet(folder / "rollouts.parquet")
    assert list(rollouts.columns) == ROLLOUT_COLUMNS.names
    assert len(rollouts) == 24
    assert list(rollouts["rollout"][:5]) == [0, 1, 2, 3, 0]
    metrics = pd.read_csv(folder / "metrics.csv")
    assert list(metrics.columns) == METRIC_COLUMNS
    assert sorted(set(metrics["n"])) == [1, 2, 4]
    record = json.loads((folder / "run.json").read_text())
    assert record["rollouts"] == {"total": 24, "drawn_now": 24}
    assert {"torch", "transformers", "python"} <= set(record["versions"])
    assert (folder / "latents.safetensors").is_file()
    assert (folder / "scaling.png").is_file()
    assert (folder / "run.log").is_file()


def test_a_second_run_draws_nothing_and_gives_the_same_tables(run):
    first, second = run(), run()
    assert "INFO" not in first.out
    assert "rollouts to draw" in first.err
    record = json.loads((second.last.parent / "run.json").read_text())
    assert record["rollouts"] == {"total": 24, "drawn_now": 0}
    pd.testing.assert_frame_equal(pd.read_csv(first.last), pd.read_csv(second.last))


def test_the_readmes_sweep_draws_no_rollout_twice(run, tmp_path):
    result = run("sampler=gaussian", "sampler.sigma=0.1", "n=1,2,4", "-m")
    assert result.code == 0, result.err
    sweep = result.last.parent
    drawn = [json.loads((sweep / str(job) / "run.json").read_text())["rollouts"]["drawn_now"] for job in range(3)]
    assert drawn == [6, 6, 12]
    assert "\nINFO job 1: model=demo_coconut" in result.err
    assert "INFO 6 of 12 rollouts are in the cache" in result.err
    assert "\\t" not in result.err
    joined = pd.read_csv(result.last)
    assert sorted(set(joined["n"])) == [1, 2, 4]
    assert (sweep / "scaling.png").is_file()


def test_rollouts_of_a_small_budget_are_the_first_of_a_large_one(run, completed):
    a = pd.read_parquet(run("n=2").last.parent / "rollouts.parquet")
    b = pd.read_parquet(completed / "rollouts.parquet")
    pd.testing.assert_frame_equal(
        a.drop(columns=["answer_logprob", "answer_margin"]),
        b[b["rollout"] < 2].drop(columns=["answer_logprob", "answer_margin"]).reset_index(drop=True),
    )


@pytest.mark.parametrize("line", [["plot", "--help"], slow(["--help"])])
def test_a_reader_that_has_left_is_no_traceback(line):
    reading, writing = os.pipe()
    os.close(reading)
    code = "from latent_tts.cli import entry; entry()"
    done = subprocess.run([sys.executable, "-c", code, *line], stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("rows", [5, slow(1), slow(64)])
def test_the_rows_of_a_batch_do_not_change_the_rollouts(run, completed, rows):
    a = pd.read_parquet(completed / "rollouts.parquet")
    b = pd.read_parquet(run(f"engine.rows={rows}").last.parent / "rollouts.parquet")
    pd.testing.assert_series_equal(a["answer_text"], b["answer_text"])


def test_greedy_draws_one_rollout_and_says_so_once(run):
    result = run("sampler=greedy", "n=4")
    assert result.code == 0
    assert result.err.count("gives the same rollout every time") == 1
    assert len(pd.read_parquet(result.last.parent / "rollouts.parquet")) == 6


@pytest.mark.parametrize("override", ["sampler.sigma=0", slow("sampler=dropout sampler.rate=0")])
def test_no_noise_equals_greedy(run, override):
    noisy = run("sampler=gaussian", *override.split())
    assert noisy.err.count("gives the same rollout every time, so one is drawn") == 1
    a = pd.read_parquet(noisy.last.parent / "rollouts.parquet")
    b = pd.read_parquet(run("sampler=greedy").last.parent / "rollouts.parquet")
    assert list(a["answer_text"]) == list(b["answer_text"])


@pytest.mark.every_other
@pytest.mark.parametrize("mode", ["zero", "repeat", "shuffle"])
def test_controls_run(run, mode):
    assert run("sampler=control", f"sampler.mode={mode}", "n=1").code == 0


def test_settings_name_what_differs_from_the_defaults_and_has_no_column(run):
    table = pd.read_csv(run("sampler.site=residual", "seed=2").last)
    assert set(table["settings"]) == {"max_answer_tokens=4,sampler.site=residual,task.limit=6"}
    assert set(table["seed"]) == {2}


def test_settings_name_what_files_of_the_user_set(run, tmp_path):
    own = tmp_path / "own"
    for name, content in {
        "local/default": "# @package _global_\nmax_answer_tokens: 3\nanswer: {temperature: 0.9}\n",
        "model/mine": "defaults: [demo_coconut, _self_]\nlatents: 3\n",
        "sampler/dropout": "rate: 0.9\n",  # this package's own option of that name wins
        "sampler/answers": "defaults: [dropout, _self_]\nwhere: [thoughts, answer]\n",
    }.items():
        (own / name).parent.mkdir(parents=True, exist_ok=True)
        (own / f"{name}.yaml").write_text(content)
    line = [f"--config-dir={own}"]
    table = pd.read_csv(run(*line, "model=mine", "sampler=answers").last)
    (settings,) = set(table["settings"])
    for expected in ("answer.temperature=0.9", "model.latents=3", "sampler.where=['thoughts', 'answer']"):
        assert expected in settings
    # the fixture's own line wins over the file, as in any command
    assert "max_answer_tokens=4" in settings


def test_defaults_of_run_are_not_those_of_other_commands(ltts, tmp_path):
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / "default.yaml").write_text("# @package _global_\nn: 64\nengine: {dtype: bfloat16}\n")
    (tmp_path / "local" / "train_draft.yaml").write_text("# @package _global_\nupdates: -3\n")
    for command, words in {"train-draft": "updates=-3", "annotate": "completions=0"}.items():
        more = [] if command == "train-draft" else [words]
        check(ltts(command, f"--config-dir={tmp_path}", *more), words)


def test_a_jsonl_file_is_a_task(run, tmp_path):
    rows = [{"question": "Ann has 3 pens. She buys 4 more. How many pens does Ann have?", "answer": 7}] * 2
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run("task=jsonl", "task.path=mine.jsonl", "task.limit=null")
    assert result.code == 0, result.err
    ids = list(pd.read_parquet(result.last.parent / "rollouts.parquet")["question_id"].unique())
    assert ids[1] == f"{ids[0]}-2"
    assert set(pd.read_csv(result.last)["task"]) == {"mine"}


@pytest.mark.slow
def test_an_experiment_is_a_complete_setting(run):
    assert run("experiment=smoke", "n=2").code == 0


def test_a_folder_used_again_holds_the_new_run_alone(completed, run, tmp_path):
    shutil.copytree(completed, "mine")
    (tmp_path / "mine" / "latents.safetensors").touch()
    assert (tmp_path / "mine" / "scaling.png").is_file()
    second = run("hydra.run.dir=mine", "seed=1")
    left = {path.name for path in second.last.parent.iterdir()} - {".hydra", "run.log"}
    assert left == {"answers.jsonl", "metrics.csv", "rollouts.parquet", "run.json"}
    assert json.loads((tmp_path / "mine" / "run.json").read_text())["config"]["seed"] == 1


def test_a_sweep_joins_its_own_jobs_alone(completed, run, tmp_path):
    shutil.copytree(completed, tmp_path / "mine" / "1")
    again = run("hydra.sweep.dir=mine", "n=2", "seed=1", "-m")
    assert set(pd.read_csv(again.last)["seed"]) == {1}


def test_collect_needs_no_sweeps_unless_they_are_named(completed, ltts, tmp_path):
    shutil.copytree(completed, tmp_path / "outputs" / "run" / "first")
    assert ltts("collect").code == 0
    assert "multirun/run" in ltts("collect", "outputs/run", "multirun/run").err


def test_collect_names_no_interrupted_run_that_was_completed_elsewhere(run, ltts):
    done = run("seed=1").last.parent
    (shutil.copytree(done, done.with_name("interrupted")) / "run.json").unlink()
    result = ltts("collect", "outputs/run", "output=all.csv")
    assert result.code == 0, result.err
    assert "incomplete" not in result.err
    (run("seed=2").last.parent / "run.json").unlink()
    assert ltts("collect", "outputs/run", "output=all.csv").err.count("incomplete, left out") == 1


def test_collect_joins_what_is_complete_and_names_what_is_not(run, completed, ltts, tmp_path):
    first = shutil.copytree(completed, tmp_path / "outputs" / "run" / "first")
    (run("seed=1").last.parent / "run.json").unlink()
    result = ltts("collect", "outputs/run", "output=all.csv")
    assert result.code == 0, result.err
    assert "incomplete, left out" in result.err
    assert set(pd.read_csv(tmp_path / "all.csv")["run_id"]) == set(pd.read_csv(first / "metrics.csv")["run_id"])


def test_compare_pairs_two_runs(run, completed, ltts):
    other = run("sampler.rate=0.5").last.parent
    result = ltts("compare", completed, other)
    assert result.code == 0, result.err
    a, b = result.out.splitlines()[-2:]
    assert a.startswith("A: sampler=dropout rate=0.05, ")
    assert b.startswith("B: sampler=dropout rate=0.5, ")
    assert b.endswith(str(other))
    assert "coverage" in result.out
    assert "6 questions, 1 seed\n" in result.out
    same = ltts("compare", completed, completed)
    assert same.out.count("0.0 [-39.0, 39.0]") == 9  # coverage and two aggregators at n = 1, 2, 4


@pytest.mark.slow
@pytest.mark.usefixtures("no_figures")
def test_compare_takes_what_all_seeds_of_a_side_have(run, ltts):
    """Seeds that drew more, or have more aggregators, as after a sweep that was extended."""
    more, less = ["n=4"], ["n=2", "aggregator=[majority]"]
    for folder, seeds in (("mix", (more, less)), ("xim", (less, more))):
        for seed, settings in enumerate(seeds):
            assert run("budget=ladder", f"seed={seed}", f"hydra.run.dir={folder}/{seed}", *settings).code == 0
        result = ltts("compare", folder, folder, "output=all.csv")
        assert result.code == 0, result.err
        found = pd.read_csv("all.csv")[["a_figure", "a_n"]]
        assert found.to_numpy().tolist() == [[figure, n] for figure in ("coverage", "majority") for n in (1, 2)]
        check(ltts("compare", folder, folder, "a_n=4", "b_n=1"), "a_n=4: must be one of 1, 2, which the run reports")
        check(ltts("compare", folder, folder, "a_figure=likelihood"), "a_figure=likelihood: must be one of coverage, m")
    for seed, n in enumerate((3, 4)):
        assert run("budget=fixed", f"n={n}", f"seed={seed}", f"hydra.run.dir=fixed/{seed}").code == 0
    check(ltts("compare", "fixed", "fixed"), "no n in common")


def test_compare_pairs_the_questions_that_both_sides_have(run, completed, ltts):
    fewer = run("task.limit=4").last.parent
    refused = ltts("compare", completed, fewer)
    assert refused.code == 2
    assert "4 of 6 and 4 are shared; questions=shared compares those" in refused.err
    shared = ltts("compare", completed, fewer, "questions=shared")
    assert shared.code == 0, shared.err
    assert "4 questions, 1 seed\n" in shared.out
    none = ltts("compare", completed, run("task.split=valid").last.parent, "questions=shared")
    assert none.code == 2
    assert "0 of 6 and 6 are shared" in none.err
    assert ltts("compare", completed, fewer, "questions=other").code == 2


def test_compare_holds_the_vote_against_one_greedy_rollout(run, completed, ltts, tmp_path):
    greedy = run("sampler=greedy", "n=1").last.parent
    result = ltts("compare", completed, greedy, "a_n=4", "b_n=1", "output=paired.csv")
    assert result.code == 0, result.err
    assert "4 - 1" in result.out
    table = pd.read_csv(tmp_path / "paired.csv").set_index("a_figure")
    accuracies = [pd.read_csv(side / "metrics.csv").query("metric == 'accuracy'") for side in (completed, greedy)]
    majority = [table.query("aggregator == 'majority'").set_index("n")["value"] for table in accuracies]
    assert (table[["a_n", "b_n"]] == [4, 1]).all(axis=None)
    assert table["a"]["majority"] == pytest.approx(majority[0][4])
    assert table["b"]["majority"] == pytest.approx(majority[1][1])
    every = ltts("compare", completed, greedy, "b_n=1")
    assert all(f"{n} - 1" in every.out for n in (2, 4))


@pytest.mark.slow
def test_plot_draws_from_the_table_alone(completed, ltts, tmp_path):
    table = completed / "metrics.csv"
    (tmp_path / "results.csv").write_bytes(table.read_bytes())
    result = ltts("plot", "results.csv")
    assert result.code == 0, result.err
    assert result.out.split() == ["figure.png", "figure.svg"]
    figure = (tmp_path / "figure.svg").read_bytes()
    assert len(figure) > 5000
    assert ltts("plot", "results.csv").last.read_bytes() == figure
    assert ltts("plot", table.parent, "output=here.png").last.is_file()
    (tmp_path / "results_by_gflops.csv").write_bytes(table.read_bytes())
    assert ltts("plot", "results_by_gflops.csv", "format=svg").last.name == "figure_by_gflops.svg"
    check_refused(
        "plot", f"runs=[{table}]", "against=luck", words=["against=luck: must be one of n, rollouts, gflops, seconds"]
    )


def test_a_forced_prefix_begins_every_answer_and_is_a_cache_of_its_own(run, completed):
    forced = run("n=2", "answer.forced_prefix='###'")
    assert forced.code == 0, forced.err
    rollouts = pd.read_parquet(forced.last.parent / "rollouts.parquet")
    assert rollouts["answer_text"].str.startswith("###").all()
    assert (rollouts["answer_tokens"] >= 1).all()
    plain_cache, forced_cache = (
        Path(json.loads((folder / "run.json").read_text())["cache"]) for folder in (completed, forced.last.parent)
    )
    assert plain_cache.name != forced_cache.name
    metrics = pd.read_csv(forced.last, keep_default_na=False)
    assert set(metrics["settings"].str.contains("answer.forced_prefix=###")) == {True}


def test_flags_and_positional_arguments_stand_in_any_order(ltts):
    for line in (
        ["a", "b", "--cfg", "job", "a_n=4"],
        ["--cfg", "job", "a", "a_n=4", "b"],
        ["a", "a_n=4", "b", "-c", "job"],
    ):
        shown = ltts("compare", *line)
        assert shown.code == 0, shown.err
        assert "a: a\nb: b\n" in shown.out
