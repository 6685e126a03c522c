"""Runs of other questions or other weights are never seeds of each other, whatever their names say."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import tiny
from places import place_of_its_own, run_line
from records import change_record
from refusal import check_refused

from latent_tts import cli
from latent_tts.results.run_folder import DIGEST_COLUMNS, read_metrics
from latent_tts.task.arith import Arith


def write_questions(place):
    """Two files of one name."""
    known = Arith("test", 6, None, 0).questions()
    for name, part in (("a", known[:3]), ("b", known[3:])):
        rows = [{"question": question.text, "answer": question.answer} for question in part]
        (place / name).mkdir()
        (place / name / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def line_of(place, name, seed, folder):
    path = place / name / "test.jsonl"
    return ["task=jsonl", f"task.path={path}", "task.limit=null", f"seed={seed}", f"hydra.run.dir={folder}"]


@pytest.fixture(scope="module")
def runs(checkpoint, tmp_path_factory):
    """Runs on the files with two seeds, in folders such as `a0`, which no test may change."""
    place = tmp_path_factory.mktemp("runs")
    write_questions(place)
    with place_of_its_own(place):
        for name, seed in (("a", 0), ("a", 1), ("b", 1)):
            assert cli.main(run_line(checkpoint, *line_of(place, name, seed, f"{name}{seed}"))) == 0
    return place


@pytest.fixture
def questions(tmp_path):
    """The folder that the two files are in."""
    write_questions(tmp_path)
    return tmp_path


@pytest.fixture
def seeded(run, questions):
    """A run on a file, in a folder."""

    def one(name, seed, folder, *more):
        done = run(*line_of(questions, name, seed, folder), *more)
        assert done.code == 0, done.err
        return done.last.parent

    return one


@pytest.mark.slow  # `ltts collect` tells the same files apart below
def test_a_sweep_over_two_files_of_one_name_has_means_of_each(run, ltts, questions, tmp_path):
    paths = ",".join(str(questions / name / "test.jsonl") for name in "ba")
    swept = run("-m", "task=jsonl", f"task.path={paths}", "task.limit=null", "seed=0,1", "n=2", "hydra.sweep.dir=swept")
    assert swept.code == 0, swept.err
    means = read_metrics(tmp_path / "swept" / "metrics_over_seeds.csv")
    assert means.groupby("questions_digest")["seed"].unique().map(list).tolist() == [["0,1"], ["0,1"]]
    assert len(set(means["weights_digest"])) == 1
    joined = read_metrics(swept.last)
    own = ["questions_digest", "n", "metric", "aggregator"]
    expected = joined[joined["metric"] != "seconds"].groupby(own)["value"].mean()
    found = means.set_index(own)["value"]
    pd.testing.assert_series_equal(found.loc[expected.index], expected, check_names=False)
    assert all(f"path={path}" in swept.out for path in paths.split(","))


def test_seeds_of_other_questions_are_not_averaged_and_a_figure_has_a_curve_of_each(runs, ltts, tmp_path):
    folders = [Path(shutil.copytree(runs / name, f"mix/{name}")) for name in ("a0", "b1")]
    collected = ltts("collect", "mix", "output=mix.csv")
    assert collected.out.split() == ["mix.csv"]
    drawn = ltts("plot", "mix.csv", "output=mix.svg")
    assert drawn.code == 0, drawn.err
    words = (tmp_path / "mix.svg").read_text()
    for folder in folders:
        assert f"questions {read_metrics(folder / 'metrics.csv')['questions_digest'][0][:8]}" in words
    assert "means over" not in words


@pytest.mark.slow
def test_a_file_by_another_path_or_name_is_the_same_set_and_one_read_by_another_rule_is_not(
    run, ltts, questions, tmp_path
):
    path = tmp_path / "a" / "test.jsonl"
    (tmp_path / "link.jsonl").symlink_to(path)
    shutil.copy(path, tmp_path / "copy.json")
    for seed, name in enumerate(("a/test.jsonl", "./a/../link.jsonl", tmp_path / "copy.json", path)):
        done = run(
            "task=jsonl", f"task.path={name}", "task.limit=null", f"seed={seed % 3}", f"hydra.run.dir=mix/{seed}"
        )
        assert done.code == 0, done.err
    assert ltts("collect", "mix", "output=mix.csv").out.split() == ["mix_over_seeds.csv", "mix.csv"]
    means = read_metrics(tmp_path / "mix_over_seeds.csv")
    assert (set(means["seed"]), set(means["task"])) == ({"0,1,2"}, {"test"})
    joined = read_metrics(tmp_path / "mix.csv")
    assert joined["run_id"].nunique() == 3  # mix/3 is the run in mix/0
    assert ltts("plot", "mix.csv", "output=mix.svg").code == 0
    assert "means over seeds 0, 1, 2" in (tmp_path / "mix.svg").read_text()
    compared = ltts("compare", "mix/0", "mix/3")
    assert compared.code == 0, compared.err
    read = run("task=math500", f"task.path={path}", "task.limit=null", "hydra.run.dir=mix/latex")
    assert read.code == 0, read.err
    ltts("collect", "mix", "output=mix.csv")
    assert set(read_metrics(tmp_path / "mix_over_seeds.csv")["task"]) == {"test", "math500"}
    compared = ltts("compare", "mix/0", "mix/latex")
    assert compared.code == 0, compared.err


def test_a_number_is_one_setting_however_it_is_written(seeded, latent_rm):
    scored = ["scorer=latent_rm", f"scorer.checkpoint={latent_rm}", "sampler=gaussian"]
    for name, one, low in (("int", "1", "-90"), ("float", "1.0", "-90.0"), ("power", "1e0", "-9e1")):
        more = [f"sampler.sigma={one}", f"model.recommended.sigma={one}", f"task.tolerance={one}"]
        seeded("a", 0, f"mix/{name}", *scored, *more, f"scorer.range=[{low},90]", "paths.cache=mine")
    tables = [read_metrics(path) for path in sorted(Path("mix").glob("*/metrics.csv"))]
    assert len({table["run_id"][0] for table in tables}) == 1
    assert {"model.recommended.sigma=1.0" in table["settings"][0] for table in tables} == {True}
    assert len([path for path in Path("mine").iterdir() if path.is_dir()]) == 1


def test_seeds_of_other_weights_are_not_averaged(seeded, ltts, checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "model")
    seeded("a", 0, "mix/0", f"model.checkpoint={tmp_path / 'model'}")
    config = json.loads((checkpoint / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"initializer_range": 0.5}))
    seeded("a", 1, "mix/1", f"model.checkpoint={tmp_path / 'model'}")
    collected = ltts("collect", "mix", "output=mix.csv")
    assert collected.out.split() == ["mix.csv"]
    seeded("a", 2, "mix/2", f"model.checkpoint={tmp_path / 'model'}")
    assert ltts("collect", "mix", "output=mix.csv").out.split() == ["mix_over_seeds.csv", "mix.csv"]
    means = read_metrics(tmp_path / "mix_over_seeds.csv")
    assert set(means["seed"]) == {"0", "1,2"}


@pytest.mark.slow
def test_a_moved_checkpoint_and_a_moved_scorer_stay_on_one_curve(seeded, ltts, checkpoint, tmp_path):
    scorer = tiny.write_latent_rm(tmp_path / "rm", checkpoint)
    for seed in (0, 1):
        shutil.copytree(checkpoint, tmp_path / f"model{seed}")
        shutil.copytree(scorer, tmp_path / f"rm{seed}")
        places = [f"model.checkpoint=model{seed}", f"scorer.checkpoint=rm{seed}"]
        seeded("a", seed, f"mix/{seed}", "scorer=latent_rm", *places)
    assert ltts("collect", "mix", "output=mix.csv").out.split() == ["mix_over_seeds.csv", "mix.csv"]
    assert set(read_metrics(tmp_path / "mix_over_seeds.csv")["seed"]) == {"0,1"}
    drawn = ltts("plot", "mix/0", "mix/1", "output=mix.svg")
    assert drawn.code == 0, drawn.err
    assert "model1" not in (tmp_path / "mix.svg").read_text()
    assert "means over seeds 0, 1" in (tmp_path / "mix.svg").read_text()
    assert ltts("compare", "mix", "mix").code == 0


@pytest.mark.slow  # the reasoner's weights are in the quick test above
def test_the_weights_of_a_scorer_are_part_of_a_curve(seeded, ltts, checkpoint, tmp_path):
    scored = ["scorer=latent_rm", f"scorer.checkpoint={tmp_path / 'rm'}"]
    for seed in (0, 1):
        tiny.write_latent_rm(tmp_path / "rm", checkpoint, seed=seed)
        seeded("a", seed, f"mix/{seed}", *scored)
    assert ltts("collect", "mix", "output=mix.csv").out.split() == ["mix.csv"]


def test_compare_takes_no_side_of_two_curves_and_no_other_gold_answers(runs, seeded, tmp_path):
    for number, name in enumerate(("a0", "b1")):
        shutil.copytree(runs / name, f"mix/{number}")
    others = "holds runs that are not seeds of each other"
    check_refused("compare", "a=mix", "b=mix", words=[f"a=mix: {others}", "questions_digest"])
    seeded("a", 1, "sampler/0", "sampler.rate=0.5")
    shutil.copytree(runs / "a0", "sampler/1")
    check_refused("compare", "a=sampler", "b=sampler", words=["sampler_value: 0.5 in sampler/0"])
    path = tmp_path / "a" / "test.jsonl"
    first, *others = path.read_text().splitlines(keepends=True)
    path.write_text("".join([json.dumps(json.loads(first) | {"answer": "12345"}) + "\n", *others]))
    seeded("a", 0, "golds")
    check_refused("compare", "a=mix/0", "b=golds", words=["a and b have different gold answers (seed 0)"])


def test_another_format_is_refused_by_name(runs, place):
    folder = Path(shutil.copytree(runs / "a0", "other"))
    table = pd.read_csv(folder / "metrics.csv", dtype=str, keep_default_na=False)
    for number in ("1", "3"):
        table.assign(format=number).to_csv("other.csv", index=False)
        check_refused("plot", "runs=[other.csv]", words=[f"other.csv: format {number}, this version reads 2"])
    table.drop(columns=[*DIGEST_COLUMNS, "format"]).to_csv("old.csv", index=False)
    check_refused("plot", "runs=[old.csv]", words=["old.csv: not a metrics table of this version: columns missing"])
    for number in (2, 4):
        change_record(folder, lambda record, number=number: record.update(format=number))
        words = [f"run.json: format {number}, this version reads 3; draw that run again"]
        check_refused("compare", "a=other", "b=other", words=words)
