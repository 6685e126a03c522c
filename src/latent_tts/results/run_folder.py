"""The files of a run folder: names, columns, reading, writing."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from latent_tts.errors import UsageError, require
from latent_tts.results.files import plain_cells, settings_digest, whole_file, write_csv, write_text
from latent_tts.types import Float32, file_digest

if TYPE_CHECKING:
    from torch import Tensor

ROWS_AT_ONCE = 1 << 16  # of a table, where all at once would be large
ROLLOUTS, METRICS, RUN_JSON, LATENTS = "rollouts.parquet", "metrics.csv", "run.json", "latents.safetensors"
ANSWERS, SCORES, FIGURE, BUDGET = "answers.jsonl", "scores.parquet", "scaling.png", "budget.parquet"
METRICS_OVER_SEEDS = "metrics_over_seeds.csv"
SAFETENSORS_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
TABLES = (METRICS, ROLLOUTS, ANSWERS, BUDGET, LATENTS, SCORES)
OUTPUT_FOLDERS = ("outputs", "multirun")  # `conf/hydra_folders.yaml`: COMMAND/TIME in each

COUNT_COLUMNS = ["sweeps", "commits", "conflicts"]  # of the schedule
ROLLOUT_COLUMNS = pa.schema(
    [
        pa.field("question_index", pa.int32(), nullable=False),
        pa.field("question_id", pa.string(), nullable=False),
        pa.field("rollout", pa.int32(), nullable=False),
        pa.field("prediction", pa.string()),
        pa.field("correct", pa.bool_()),
        pa.field("score", pa.float32()),
        pa.field("answer_logprob", pa.float32()),
        pa.field("answer_margin", pa.float32()),
        pa.field("stop_reason", pa.string(), nullable=False),
        pa.field("answer_text", pa.string(), nullable=False),
        pa.field("answer_ids", pa.list_(pa.int64()), nullable=False),
        pa.field("answer_tokens", pa.int64(), nullable=False),
        pa.field("latent_steps", pa.int32(), nullable=False),
        *(pa.field(name, pa.int32(), nullable=False) for name in COUNT_COLUMNS),
    ]
)
BUDGET_COLUMNS = ["question_id", "used", "drawn", "why", "certificate", "pick", "answer", "correct"]
METRIC_COLUMNS = [
    "run_id",
    "model",
    "checkpoint",
    "task",
    "split",
    "sampler",
    "sampler_param",
    "sampler_value",
    "settings",
    "schedule",
    "search",
    "budget",
    "scorer",
    "aggregator",
    "seed",
    "dtype",
    "questions_digest",
    "weights_digest",
    "n",
    "drawn",
    "metric",
    "value",
    "ci_low",
    "ci_high",
    "questions",
    "format",
]
# what a damaged table raises: its metadata may be damaged too
READ_ERRORS = (OSError, ValueError, LookupError, TypeError, AttributeError, pa.ArrowException)
FORMAT = 2  # of tables
RECORD_FORMAT = 3  # of `run.json`
WHOLE_COLUMNS = ["n", "drawn", "questions"]
RUN_COLUMNS = METRIC_COLUMNS[: METRIC_COLUMNS.index("n")]
# in `.hydra/hydra.yaml` of a command that makes no run
NO_RUN = re.compile(r"^  job:\n(?:    .*\n)*?    name: (annotate|train_reasoner|train_rm)$", re.MULTILINE)
DIGEST_COLUMNS = ["questions_digest", "weights_digest"]
PLAIN_BUDGETS = ("ladder", "fixed")  # of one run, they report the same figures
# what makes rows belong to one curve: names, settings, and the question set and weights behind the names
CURVE_COLUMNS = [name for name in RUN_COLUMNS if name not in ("run_id", "aggregator", "seed")]
SEED_COLUMNS = ["seeds", "seed_sd"]  # beside the others in a table of means over seeds


def write_rollouts(folder: Path, rollouts: pd.DataFrame) -> None:
    """Write `rollouts.parquet`."""
    with whole_file(folder / ROLLOUTS) as path, pq.ParquetWriter(path, ROLLOUT_COLUMNS) as writer:
        for start in range(0, len(rollouts), ROWS_AT_ONCE):  # all rows once more would be large
            part = rollouts.iloc[start : start + ROWS_AT_ONCE]
            writer.write_table(pa.Table.from_pandas(part, ROLLOUT_COLUMNS, preserve_index=False))


def read_rollouts(folder: Path) -> pd.DataFrame:
    """The `rollouts.parquet` of a run folder.

    Raises:
        UsageError: it is missing, damaged or of another run.
    """
    try:
        table = pq.read_table(folder / ROLLOUTS, columns=ROLLOUT_COLUMNS.names)
        for column in ROLLOUT_COLUMNS:
            if table[column.name].type != column.type:
                raise ValueError(f"column {column.name} must contain {column.type}")
            if table[column.name].null_count and not column.nullable:
                raise ValueError(f"column {column.name} lacks a value")
        if not len(table):
            raise ValueError("it has no rows")
        if table["correct"].null_count not in (0, len(table)):  # null in all rows without gold answers
            raise ValueError("column correct lacks a value")
        rollouts = table.to_pandas()
    except READ_ERRORS as error:
        raise UsageError(f"{folder / ROLLOUTS}: cannot be read ({str(error).splitlines()[0]})") from error
    check_file(folder, ROLLOUTS)
    return rollouts


def write_answers(folder: Path, answers: Sequence[Mapping[str, Any]]) -> None:
    """Write `answers.jsonl`: a line per question."""
    with whole_file(folder / ANSWERS) as path, path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)


def read_budget(folder: Path) -> pd.DataFrame | None:
    """The `budget.parquet` of a run folder; None where every question got the same number of rollouts.

    Raises:
        UsageError: it is damaged or of another run.
    """
    check_file(folder, BUDGET)
    if not (folder / BUDGET).is_file():
        return None
    try:
        budget = pq.read_table(folder / BUDGET, columns=BUDGET_COLUMNS).to_pandas()
    except READ_ERRORS as error:
        raise UsageError(f"{folder / BUDGET}: cannot be read ({str(error).splitlines()[0]})") from error
    return budget


KeepLatents = Callable[[Sequence[tuple[str, int]], "Tensor"], None]


@contextmanager
def latents_file(path: Path, wanted: pd.DataFrame, shape_TD: tuple[int, int], dtype: str) -> Iterator[KeepLatents]:
    """`latents.safetensors` in the making: one tensor `latents_RTD`; rows with fewer steps end in zeros.

    The file gets its name when the block ends well.

    Args:
        path: of the file.
        wanted: its rows (columns `row_key`, `rollout`), those of a question side by side.
        shape_TD: T and D.
        dtype: `float32`, `bfloat16` or `float16`.

    Yields:
        A function that writes the latents (on the CPU, in the file's dtype) of some rollouts, each a (row key,
        rollout), in any order.
    """
    shape, number = (len(wanted), *shape_TD), np.dtype("<f4" if dtype == "float32" else "<u2")
    size = math.prod(shape) * number.itemsize
    about = {"dtype": SAFETENSORS_DTYPES[dtype], "shape": shape, "data_offsets": [0, size]}
    header = json.dumps({"latents_RTD": about}).encode()
    header += b" " * (-len(header) % 8)
    row_of_0 = wanted.assign(row=np.arange(len(wanted)) - wanted["rollout"]).drop_duplicates("row_key")
    first = dict(zip(row_of_0["row_key"], row_of_0["row"], strict=True))
    with whole_file(path) as partial:
        with partial.open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + size)
        latents_RTD = np.memmap(partial, number, "r+", 8 + len(header), shape) if size else np.zeros(shape, number)

        def keep(places: Sequence[tuple[str, int]], some_RTD: Tensor) -> None:
            import torch

            rows = [first[key] + rollout for key, rollout in places]
            latents_RTD[rows] = (some_RTD if dtype == "float32" else some_RTD.view(torch.uint16)).numpy()

        yield keep


def open_latents(folder: Path, rows: int) -> Any:
    """The latents (rows, T, D) of a run folder, a slice of which is read when it is asked for.

    Raises:
        UsageError: the file is damaged or of another run, or has another number of rows.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / LATENTS
    try:
        latents_RTD = safe_open(path, framework="pt").get_slice("latents_RTD")
    except (OSError, KeyError, SafetensorError) as error:
        raise UsageError(f"{path}: cannot be read ({error})") from error
    check_file(folder, LATENTS)
    if (found := latents_RTD.get_shape()[0]) != rows:
        raise UsageError(f"{path}: {found} rows, but {rows} in {ROLLOUTS}")
    return latents_RTD


def write_scores(folder: Path, rollouts: pd.DataFrame, step_scores: Sequence[Float32]) -> None:
    """Write `scores.parquet`: each rollout's score and the step scores behind it."""
    table = rollouts[["question_id", "rollout", "score"]].assign(step_scores=pd.Series(list(step_scores)))
    with whole_file(folder / SCORES) as path:
        table.to_parquet(path, index=False)


def write_metrics(path: Path, metrics: pd.DataFrame) -> None:
    """Write a metrics table (or one of means over seeds); missing figures are empty cells."""
    columns = METRIC_COLUMNS + [name for name in SEED_COLUMNS if name in metrics]
    write_csv(path, metrics.assign(format=FORMAT)[columns], index=False, float_format="%.10g")


def read_metrics(path: Path) -> pd.DataFrame:
    """Read a metrics table.

    Raises:
        UsageError: it is not one, is cut off, or is of another format.
    """
    numbers = [name for name in METRIC_COLUMNS + SEED_COLUMNS if name not in (*RUN_COLUMNS, "metric")]
    try:
        content = path.read_bytes()
        frame = pd.read_csv(
            BytesIO(content),
            dtype=dict.fromkeys([*RUN_COLUMNS, "metric"], str) | dict.fromkeys(numbers, float),
            keep_default_na=False,
            na_values={name: [""] for name in numbers},
        )
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read as a metrics table ({error})") from error
    missing = [name for name in METRIC_COLUMNS if name not in frame.columns]
    if missing:
        raise UsageError(f"{path}: not a metrics table of this version: columns missing: {', '.join(missing[:5])}")
    if frame.empty or not content.endswith((b"\n", b"\r")):  # the rest of a last number would not be missed
        raise UsageError(f"{path}: {'has no rows' if frame.empty else 'is truncated: the last line is incomplete'}")
    for name in WHOLE_COLUMNS:
        if not (frame[name] % 1 == 0).all() or not frame[name].between(1, 1 << 53).all():
            raise UsageError(f"{path}: not a metrics table: column {name} must contain integers, 1 or more")
        frame[name] = frame[name].astype(int)
    if other := set(frame["format"]) - {FORMAT}:
        raise UsageError(f"{path}: format {max(other):g}, this version reads {FORMAT}")
    return plain_cells(frame)[METRIC_COLUMNS + [name for name in frame.columns if name not in METRIC_COLUMNS]]


def has_curve(metrics: pd.DataFrame) -> bool:
    """Whether a table has accuracy or coverage at several n, or agreement where there are no gold answers."""
    return metrics.loc[metrics["metric"].isin(figures_drawn(metrics)), "n"].nunique() > 1


def figures_drawn(metrics: pd.DataFrame) -> list[str]:
    """The metrics that a figure shows; agreement only where there is neither accuracy nor coverage."""
    judged = metrics["metric"].isin(["accuracy", "coverage"]) & metrics["value"].notna()
    return ["coverage", "accuracy"] if judged.any() else ["agreement"]


def name_once(metrics: pd.DataFrame) -> pd.DataFrame:
    """A table in which equal weights and equal question sets have one name: files are moved, linked and copied."""
    named = metrics.copy()
    for same, names in (
        (["model", "weights_digest"], ["checkpoint", "scorer"]),
        (["questions_digest"], ["task", "split"]),
    ):
        named[names] = metrics.groupby(same)[names].transform("first")
    return named


def sampler_label(columns: Mapping[str, str] | pd.Series) -> str:
    """A sampler with its value, as in `gaussian sigma=0.4`, from columns of a table; what they lack is left out."""
    text, name, value = (str(columns.get(key, "")) for key in ("sampler", "sampler_param", "sampler_value"))
    return f"{text} {name}={value}".strip() if name and value else text


def read_run_metrics(folder: Path) -> pd.DataFrame:
    """The metrics table of a run folder."""
    check_file(folder, METRICS)
    return read_metrics(folder / METRICS)


def write_run_json(folder: Path, record: Mapping[str, Any]) -> None:
    """Write `run.json`, last of all: its presence means that the run is complete.

    It has the digests of the folder's tables, and one of everything else in it.
    """
    files = {name: file_digest(folder / name) for name in TABLES if (folder / name).is_file()}
    content = json.loads(json.dumps({"format": RECORD_FORMAT, "files": files, **record}, default=str))
    content["digest"] = settings_digest(content)
    write_text(folder / RUN_JSON, json.dumps(content, indent=1, sort_keys=True) + "\n")


def check_file(folder: Path, name: str) -> None:
    """Check that a file of a run folder is the one that its `run.json` was written for.

    Raises:
        UsageError: it is another, or one of the two is missing or damaged.
    """
    if not (folder / RUN_JSON).is_file():  # a table that lies alone
        return
    path = folder / name
    found = file_digest(path) if path.is_file() else None
    if found != read_run_json(folder, {"files": dict})["files"].get(name):
        problem = "is missing" if found is None else f"is damaged, or of another run than the {RUN_JSON} beside it"
        raise UsageError(f"{path}: {problem}\ndraw that run again with ltts run")


def read_run_json(folder: Path, needed: Mapping[str, type]) -> dict[str, Any]:
    """Read a `run.json`, and check that it is what was written.

    Args:
        folder: of the run.
        needed: the kinds of the values that have to be there, by dotted key.

    Returns:
        Its content without the digest.

    Raises:
        UsageError: it cannot be read, is damaged, or lacks a value.
    """
    path = folder / RUN_JSON
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: cannot be read ({error}); draw that run again with ltts run") from error
    record = record if isinstance(record, dict) else {}
    digest, found = record.pop("digest", None), record.get("format")
    if found != RECORD_FORMAT:
        raise UsageError(f"{path}: format {found}, this version reads {RECORD_FORMAT}; draw that run again")
    if digest != settings_digest(record):
        raise UsageError(f"{path}: is damaged, its content is not what was written; draw that run again with ltts run")
    missing = []
    for key, kind in needed.items():
        value = record
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if not isinstance(value, kind):
            missing.append(key)
    if missing:
        raise UsageError(
            f"{path}: values missing or of the wrong type: {', '.join(missing[:5])}; repeat the run with ltts run"
        )
    return record


def is_complete(folder: Path) -> bool:
    """Whether a run folder's run ended well."""
    return (folder / RUN_JSON).is_file()


def run_folders(path: Path, key: str = "runs") -> list[Path]:
    """The run folders at or below a folder: those with a `.hydra` record of a started run; in job order.

    Folders of commands that make no run, as `annotate`, are left out.

    Raises:
        UsageError: there are none.
    """
    require(key, path, path.is_dir(), "no such folder")
    found = [hydra.parent for hydra in path.rglob(".hydra") if hydra.is_dir() and _makes_runs(hydra / "hydra.yaml")]
    require(key, path, bool(found), "neither a run folder nor a folder of runs")
    return sorted(found, key=lambda folder: [(not p.isdigit(), int(p) if p.isdigit() else 0, p) for p in folder.parts])


def _makes_runs(hydra: Path) -> bool:
    """Whether a `hydra.yaml` is of a command that makes runs, or is missing."""
    return not (hydra.is_file() and NO_RUN.search(hydra.read_text(encoding="utf-8", errors="replace")))


def last_run() -> Path:
    """The folder of the run or sweep in this folder whose table was written last; questions to `ltts ask` are none.

    Raises:
        UsageError: there is none.
    """
    found = (table for name in OUTPUT_FOLDERS for table in Path(name).glob(f"*/*/**/{METRICS}"))
    tables = [table for table in found if table.parts[1] != "ask"]
    if not tables:
        raise UsageError(
            f"no run in the folders {' and '.join(OUTPUT_FOLDERS)} of this one; name a run folder or a table"
        )
    return Path(*max(tables, key=lambda table: table.stat().st_mtime).parts[:3])


def read_tables(folders: Iterable[Path]) -> dict[Path, pd.DataFrame]:
    """The metrics tables of the complete run folders among some.

    Raises:
        UsageError: a table is damaged or missing.
    """
    return {folder: read_run_metrics(folder) for folder in filter(is_complete, folders)}


def join_tables(tables: Iterable[pd.DataFrame]) -> pd.DataFrame:
    """The metrics of several runs in one table without repeated rows."""
    joined = name_once(pd.concat(tables, ignore_index=True))
    return joined.drop_duplicates(["run_id", "aggregator", "n", "drawn", "metric"], ignore_index=True)
