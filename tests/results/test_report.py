"""Tables on terminals of four widths, in two encodings, and through pipes."""

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from marks import slow
from terminal import STYLE, on_terminal

from latent_tts.results import report
from latent_tts.results.run_folder import METRIC_COLUMNS, SEED_COLUMNS, read_metrics, write_metrics

GOLDEN = Path(__file__).parents[1] / "golden"
WIDTHS = (80, 100, 120, 160)
AGGREGATORS = ("majority", "likelihood", "best_of_n", "weighted")
INTERVAL = re.compile(r"\[\d+\.\d, \d+\.\d\]")
ELLIPSES = ("…", "...")


def metrics_of(aggregators=AGGREGATORS, *, sampler="gaussian", value="0.4", seed="0", drawn=64, high=0.999):
    """A table whose figures are all different, some of them near 100 %."""
    generator = np.random.default_rng(len(aggregators))
    run = dict.fromkeys(METRIC_COLUMNS, "") | {
        "run_id": sampler + value, "model": "demo_coconut", "task": "arith", "split": "test", "sampler": sampler,
        "sampler_param": "sigma", "sampler_value": value, "settings": "task.limit=1000", "seed": seed,
        "scorer": "latent_rm:shipped:coconut_arith_rm", "questions": 1000, "drawn": drawn, "format": 2,
    }  # fmt: skip
    rows = []
    for n in (1, 2, 4, 8, 16, 32, 64):
        named = [("accuracy", name) for name in aggregators] + [("coverage", "")]
        for metric, name in named:
            low, mid, top = np.sort(generator.uniform(0.5, high, 3))
            figure = {"metric": metric, "aggregator": name, "value": mid, "ci_low": low, "ci_high": top}
            rows.append(run | figure | {"n": n, "seed_sd": 0.012 if "," in seed else np.nan})
        rows.append(run | {"metric": "gflops", "value": 0.142 * n, "n": n})
    rows.append(run | {"metric": "rollouts_per_second", "value": 5123.0, "n": 64})
    table = pd.DataFrame(rows, columns=[*METRIC_COLUMNS, "seed_sd"]).assign(seeds=1 + seed.count(","))
    return table.assign(ci_low=pd.to_numeric(table["ci_low"]), ci_high=pd.to_numeric(table["ci_high"]))


TABLES = {
    "run": (metrics_of(), None),
    "certain": (metrics_of(high=1.0).assign(ci_high=1.0), None),
    "seeds": (metrics_of(seed="0,1,2"), None),
    "add-ons": (metrics_of((*AGGREGATORS, "self_certainty", "shortest_chain", "longest_common_prefix")), None),
    "sweep": (
        pd.concat([metrics_of(), metrics_of(sampler="dropout", value="0.05")], ignore_index=True),
        ["sampler=gaussian model=demo_coconut"] * 43 + ["sampler=dropout model=demo_coconut"] * 43,
    ),
}


@pytest.fixture(scope="module", params=["utf-8", slow("ascii")])
def shown(request, tmp_path_factory):
    """The tables as they stand on terminals: by width and name, with the encoding."""
    folder = (
        tmp_path_factory.mktemp(request.param) / "a_folder_with_a_long_name" / "outputs" / "run" / "2026-11-28_09-22"
    )
    folder.mkdir(parents=True)
    for name, (table, _) in TABLES.items():
        write_metrics(folder / f"{name}.csv", table)

    def show(resize):
        for columns in WIDTHS:
            resize(columns)
            for name, (_, labels) in TABLES.items():
                print(f"== {columns} {name}")
                failed = [{"label": "sampler=gaussian sigma=-1", "n": "64"}] if labels else []
                report.print_metrics(read_metrics(folder / f"{name}.csv"), labels, failed)
                print(folder / f"{name}.csv")
            print(f"== {columns} compare")
            difference = report.percent({"value": 0.035, "ci_low": -0.015, "ci_high": 0.085})
            rows = [["best_of_n - majority", "64 - 1", "61.8", "58.3", difference]]
            title, head = "A - B in points: 1000 questions, 1 seed", ["figure", "n", "A %", "B %", "A - B"]
            report.print_table(title, head, rows)

    text = on_terminal(show, encoding=request.param)
    parts = re.split(r"^== (\d+) (\S+)\n", text, flags=re.MULTILINE)[1:]
    tables = {(int(parts[i]), parts[i + 1]): parts[i + 2] for i in range(0, len(parts), 3)}
    return request.param, folder, tables


def flat(text):
    return " ".join(STYLE.sub("", text).split())


@pytest.mark.every_other
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", [*TABLES, "compare"])
def test_every_line_fits_and_no_figure_is_cut(shown, width, name):
    _, folder, tables = shown
    lines = STYLE.sub("", tables[width, name]).splitlines()
    path = folder / f"{name}.csv"
    assert all(len(line.rstrip()) <= width for line in lines if line != str(path)), "\n".join(lines)
    assert not any(sign in "\n".join(lines) for sign in ELLIPSES)
    if name == "compare":
        assert "3.5 [-1.5, 8.5]" in flat(tables[width, name])
        return
    assert str(path) in tables[width, name].splitlines()  # whole, and without colour
    table, _ = TABLES[name]
    text = "\n".join(lines)
    assert {f"{figure} %" for figure in set(table["aggregator"]) - {""}} | {"coverage %"} <= set(
        re.findall(r"\w+ %", text)
    )
    quality = table[table["metric"].isin(["accuracy", "coverage"])]
    wanted = sorted(f"[{100 * row.ci_low:.1f}, {100 * row.ci_high:.1f}]" for row in quality.itertuples())
    assert sorted(INTERVAL.findall(text)) == wanted
    for row in quality.itertuples():
        assert re.search(rf"(?<![\d.]){100 * row.value:.1f}(?![\d.])", text)
    cells = [re.split(r"[ |]+", line.strip()) for line in lines if "failed" not in line]
    rows = [row for row in cells if {"1", "2", "4", "8", "16", "32", "64"} & set(row[:2])]
    parts = sum(line.lstrip().startswith("n ") or " n " in line.split("%")[0] for line in lines if "%" in line)
    assert len(rows) == 7 * table["run_id"].nunique() * parts


@pytest.mark.parametrize(
    ("width", "columns"),
    [
        (80, {"drawn"}),
        (100, {"drawn", "GFLOP/question"}),
        (120, {"drawn", "GFLOP/question", "rollouts/s"}),
        (160, {"drawn", "GFLOP/question", "rollouts/s"}),
    ],
)
def test_costs_leave_first_and_one_table_is_left(shown, width, columns):
    _, _, tables = shown
    text = STYLE.sub("", tables[width, "run"])
    assert {
        name
        for name in ("drawn", "GFLOP/question", "rollouts/s")
        if re.search(rf"{name}(?!\))\b", text.split("\nn: ")[0])
    } == columns
    assert text.count("coverage %") == text.count("majority %") == 1


def test_columns_that_do_not_fit_make_further_tables_and_n_stands_in_each(shown):
    _, _, tables = shown
    for width in (80, 100):
        text = STYLE.sub("", tables[width, "add-ons"])
        heads = [line.split() for line in text.splitlines() if "%" in line]
        assert len(heads) == 2
        assert all(head[0] == "n" for head in heads)


def test_where_it_is_wide_an_interval_stands_beside_its_figure(shown):
    _, _, tables = shown
    row = TABLES["run"][0].iloc[0]
    figure = f"{100 * row['value']:.1f} [{100 * row['ci_low']:.1f}, {100 * row['ci_high']:.1f}]"
    assert figure in STYLE.sub("", tables[160, "run"])
    assert figure not in STYLE.sub("", tables[80, "run"])


def test_a_column_that_can_be_spared_goes_before_a_second_table_is_made():
    def show(resize):
        for columns in (30, 20):
            resize(columns)
            report.print_table("runs", ["folder", "seed", "n"], [["outputs/run", "12345", "64"]], {"seed": 1})

    wide, narrow = STYLE.sub("", on_terminal(show)).split("runs\n")[1:]
    assert wide.splitlines()[0].split() == ["folder", "seed", "n"]
    assert narrow.splitlines()[0].split() == ["folder", "n"]
    assert "12345" not in narrow


def test_bars_of_rounds_leave_the_screen_and_later_rounds_log_warnings_alone(caplog):
    log = logging.getLogger("latent_tts.pipeline")

    def show(resize):
        for number in (1, 2):
            with report.in_round(number), report.progress_bar(4, "rollouts") as bar:
                log.info("drawing of round %d", number)
                log.warning("trouble in round %d", number)
                bar.advance(4)
        log.info("after the rounds")

    with caplog.at_level(logging.INFO, "latent_tts"):
        text = on_terminal(show)
    assert "round 2: rollouts" in text
    assert text.endswith("\x1b[2K")  # the bar is erased
    said = [record.getMessage() for record in caplog.records]
    assert said == ["drawing of round 1", "trouble in round 1", "trouble in round 2", "after the rounds"]


@pytest.mark.slow
def test_a_warning_of_a_sweep_is_written_once_by_all_its_processes(capsys):
    code = """
import logging
from latent_tts.results import report
logging.getLogger().addHandler(report.log_handler())
for text in ("n=4: the same", "n=8: the same", "another"):
    logging.warning(text)
"""

    def written():
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr

    with report.warnings_once():
        assert written() == "WARNING n=4: the same\nWARNING another\n"
        assert written() == ""
    logger = logging.Logger("afterwards")
    logger.addHandler(report.log_handler())
    for text in ("n=4: the same", "n=8: the same", "another"):
        logger.warning(text)
    assert capsys.readouterr().err.count("WARNING") == 3


def test_a_sweep_names_its_curves_and_failures_in_rows(shown):
    _, _, tables = shown
    for width in WIDTHS:
        lines = STYLE.sub("", tables[width, "sweep"]).splitlines()
        (failed,) = [place for place, line in enumerate(lines) if "failed" in line]
        assert "sampler=gaussian" in lines[failed]
        assert "sigma=-1" in lines[failed] + lines[failed + 1]
        assert re.search(r"\b64\b", lines[failed])


def test_an_ascii_terminal_gets_ascii(shown):
    encoding, _, tables = shown
    text = "".join(tables.values())
    assert text.isascii() == (encoding == "ascii")
    assert ("+- 1.2" in text) == (encoding == "ascii")
    assert "|" not in text
    assert "\\u" not in text


def test_a_pipe_gets_plain_aligned_text_of_any_width(capsys):
    table, labels = TABLES["add-ons"]
    report.print_metrics(table, labels)
    title, head, *rows, note = capsys.readouterr().out.splitlines()
    assert title.startswith(
        "demo_coconut on arith/test: gaussian sigma=0.4, seed 0, 1000 questions (task.limit=1000), "
    )
    assert note == "n: mean over choices of n of the 64 rollouts drawn (docs/statistics.md)"
    assert len(rows) == 7
    assert all(re.fullmatch(r"[\x20-\x7e]+", line) and line == line.rstrip() for line in (title, head, *rows, note))
    assert len(head) > 160
    for name in (*AGGREGATORS, "longest_common_prefix", "coverage"):
        end = head.index(f"{name} %") + len(f"{name} %")
        assert all(row[end - 1] == "]" for row in rows)


def test_the_golden_tables_text(capsys, monkeypatch):
    """Rewritten by `make golden`."""
    metrics = read_metrics(GOLDEN / "metrics.csv")
    report.print_metrics(metrics)
    piped = capsys.readouterr().out
    path = GOLDEN / "table.txt"
    if os.environ.get("LTTS_GOLDEN") == "write":
        path.write_text(piped)
    assert piped == path.read_text()


def test_seeds_stand_in_the_columns_of_means():
    assert SEED_COLUMNS == ["seeds", "seed_sd"]
    assert report.percent({"value": 0.5, "seed_sd": 0.012, "ci_low": 0.4, "ci_high": 0.6}) == "50.0 ± 1.2 [40.0, 60.0]"
    assert report.percent({"value": 0.5, "ci_low": np.nan, "ci_high": np.nan}) == "50.0"
