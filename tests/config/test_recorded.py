"""Data is never code: what a run folder or an annotation folder may name."""

import shutil
from pathlib import Path

import pytest
import yaml
from annotated import adapter_of, write
from omegaconf import OmegaConf
from records import change_record
from refusal import check, check_refused

from latent_tts.config.recorded import literal

STRANGERS = [
    {"_target_": "distutils.spawn.spawn", "cmd": ["touch", "pwned"]},
    {"_target_": "torch.hub.load", "repo_or_dir": "pwned", "model": "x", "source": "local"},
    {"_target_": "numpy.load", "file": "pwned", "allow_pickle": True},
    {"_target_": "builtins.open", "file": "pwned", "mode": "w"},
    {"_target_": "pwned.Aggregator"},
    {"_target_": "latent_tts.aggregator.majority.Majority.__class__"},
    {"_target_": "latent_tts.cli.main", "argv": ["run"]},
    {"_target_": "latent_tts.task.jsonl.Jsonl"},
    {"_target_": {"_target_": "builtins.open"}},
    {"_target_": "${oc.env:PWNED}"},
    {"_target_": None},
    {"name": "majority"},
    "latent_tts.aggregator.majority.Majority",
]


@pytest.fixture
def finished(completed_with_latents, place, tmp_path, monkeypatch):
    """The folder of a finished run; a module that writes a file when it is imported is on the path."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "pwned.py").write_text("open('pwned', 'w').close()\nclass Aggregator: pass\n")
    (tmp_path / "hubconf.py").write_text("open('pwned', 'w').close()\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("PWNED", "pwned.Aggregator")
    return shutil.copytree(completed_with_latents, place / "outputs" / "run" / "finished")


def compare_refused(folder, *words):
    check_refused("compare", f"a={folder}", f"b={folder}", words=[*words])
    assert not Path("pwned").exists()


def refused(result, *words):
    check(result, *words)
    assert not Path("pwned").exists()


@pytest.mark.every_other
@pytest.mark.parametrize("node", STRANGERS, ids=lambda node: str(node)[:50])
def test_an_aggregator_of_a_run_folder_is_one_of_the_group(finished, node):
    change_record(finished, lambda record: record["aggregators"].update(majority=node))
    compare_refused(finished, "aggregator")


@pytest.mark.parametrize("key", ["nested", "list", "hydra", "_args_", "_partial_"])
def test_no_value_of_an_option_is_code_either(finished, key):
    stranger = {"_target_": "builtins.open", "file": "pwned", "mode": "w"}
    values = {
        "nested": {"a": stranger},
        "list": [[stranger]],
        "hydra": stranger,
        "_args_": ["pwned", "w"],
        "_partial_": True,
    }
    change_record(finished, lambda record: record["aggregators"]["majority"].update({key: values[key]}))
    words = ["builtins.open", "--config-dir=DIR"] if key in ("nested", "list", "hydra") else [key, "no option has"]
    compare_refused(finished, *words)


@pytest.mark.parametrize("group", ["model", "task", "sampler", "schedule", "search", "budget"])
def test_rescoring_builds_only_known_options(finished, group):
    stranger = {"_target_": "builtins.open", "file": "pwned", "mode": "w"}
    change_record(finished, lambda record: record["config"].update({group: stranger}))
    check_refused("rescore", f"run={finished}", "scorer=latent_rm", words=[group, "builtins.open"])
    assert not Path("pwned").exists()


def test_seeds_and_collected_tables_build_only_known_options(ltts, run, finished):
    other = run("scorer=none", "seed=1").last.parent
    change_record(other, lambda record: record["aggregators"].update(majority=STRANGERS[0]))
    refused(ltts("collect", "outputs/run"), "distutils.spawn.spawn")


def test_a_config_of_the_users_allows_a_class_of_its_own(ltts, finished, tmp_path):
    (tmp_path / "site" / "mine.py").write_text(
        "from latent_tts.aggregator.majority import Majority\nclass Mine(Majority):\n    name = 'mine'\n"
    )
    node = {"_target_": "mine.Mine"}
    change_record(finished, lambda record: record["aggregators"].update(mine=node))
    refused(ltts("compare", finished, finished), "mine.Mine", "--config-dir=DIR")
    (tmp_path / "own" / "aggregator").mkdir(parents=True)
    (tmp_path / "own" / "aggregator" / "mine.yaml").write_text(yaml.safe_dump(node))
    (tmp_path / "own" / "broken.yaml").write_text("{")
    allowed = ltts("compare", finished, finished, f"--config-dir={tmp_path / 'own'}")
    assert allowed.code == 0, allowed.err
    assert "mine" in allowed.out
    shutil.move(tmp_path / "own", tmp_path / "config" / "latent_tts")
    assert ltts("compare", finished, finished).code == 0


def test_a_sweep_reads_its_own_jobs_with_classes_of_its_command_line(run, finished, tmp_path):
    (tmp_path / "site" / "ours.py").write_text(
        "from latent_tts.aggregator.majority import Majority\nclass Ours(Majority):\n    name = 'ours'\n"
    )
    result = run("+aggregator.ours._target_=ours.Ours", "aggregator=[majority]", "scorer=none", "seed=1,2", "-m")
    assert result.code == 0, result.err
    assert "ours" in result.out


def test_annotations_name_only_known_options(ltts, checkpoint, tmp_path):
    task = {"_target_": "builtins.open", "file": "pwned", "mode": "w"}
    folders = [write(tmp_path / name, adapter_of(checkpoint), 4, task=task) for name in ("data", "valid")]
    line = ["train-rm", f"model.checkpoint={checkpoint}", "model.latents=3"]
    result = ltts(*line, f"annotations={folders[0]}", f"valid_annotations={folders[1]}", "output=rm")
    refused(result, "task", "builtins.open")
    assert not (tmp_path / "rm").exists()


@pytest.mark.parametrize("command", ["rescore", "replay"])
def test_an_interpolation_in_a_folder_is_refused_and_reads_nothing(finished, ltts, monkeypatch, command):
    monkeypatch.setenv("SECRET", "hunter2")
    change_record(finished, lambda record: record["config"]["model"].update(name="${oc.env:SECRET}"))
    options = ["scorer=latent_rm"] if command == "rescore" else ["budget=adaptive"]
    result = ltts(command, finished, *options)
    refused(result, "model: the folder names '${oc.env:SECRET}'", "no interpolations")
    assert "hunter2" not in result.err + result.out


@pytest.mark.parametrize("value", ["${oc.env:HOME}", r"\${a}", r"\\${a} b ${c", "plain", r"a\b", "$ {}", ["${a}"], 3])
def test_text_of_data_is_never_an_interpolation(value):
    assert OmegaConf.to_container(OmegaConf.create({"key": literal(value)}), resolve=True) == {"key": value}


@pytest.mark.parametrize(
    ("command", "change", "words"),
    [
        (["replay", "budget=adaptive"], lambda record: record["config"].update(seed=["x"]), "seed=['x']"),
        (
            ["replay", "budget=adaptive"],
            lambda record: record["config"]["answer"].update(forced_prefix=[1.5]),
            "answer.forced_prefix=[1.5]: must be text",
        ),
        (
            ["compare"],
            lambda record: record["aggregators"].update(
                weighted={"_target_": "latent_tts.aggregator.weighted.Weighted"}
            ),
            "aggregator.weighted.temperature=null",
        ),
    ],
)
def test_values_that_no_run_records_are_refused_in_one_line(finished, command, change, words):
    change_record(finished, change)
    given = [f"a={finished}", f"b={finished}"] if command == ["compare"] else [f"run={finished}"]
    check_refused(command[0], *given, *command[1:], words=[words])
