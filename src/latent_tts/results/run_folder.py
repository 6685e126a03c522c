"""The files of a run folder: names, columns, reading, writing."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pandas.api.types import is_numeric_dtype

from latent_tts.errors import UsageError, require
from latent_tts.results.files import plain_cells, settings_digest, whole_file, write_csv, write_text
from latent_tts.results.parts import runs_of
from latent_tts.types import Float32, file_digest

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)
ROWS_AT_ONCE = 1 << 16  # of a table, where all at once would be large
ROLLOUTS, METRICS, RUN_JSON, LATENTS = "rollouts.parquet", "metrics.csv", "run.json", "latents.safetensors"
ANSWERS, SCORES, FIGURE, BUDGET = "answers.jsonl", "scores.parquet", "scaling.png", "budget.parquet"
METRICS_OVER_SEEDS = "metrics_over_seeds.csv"
SAFETENSORS_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
TABLES = (METRICS, ROLLOUTS, ANSWERS, BUDGET, LATENTS, SCORES)
OUTPUT_FOLDERS = ("outputs", "multirun")  # `conf/hydra_folders.yaml`: COMMAND/TIME in each

KINDS: dict[str, Callable[[pa.DataType], bool]] = {
    "texts": lambda kind: str(kind) in ("string", "large_string", "null"),
    "integers": pa.types.is_integer,
    "numbers": lambda kind: pa.types.is_floating(kind) or pa.types.is_null(kind),
    "true or false": pa.types.is_boolean,
    "lists of integers": lambda kind: pa.types.is_list(kind) and pa.types.is_integer(kind.value_type),
}
STORED_AS = {"texts": pa.string(), "lists of integers": pa.list_(pa.int64())}  # where values may all be missing
ROLLOUT_COLUMNS = {  # the kind of each, and whether it has a value in every row
    "question_index": ("integers", True),
    "question_id": ("texts", True),
    "rollout": ("integers", True),
    "prediction": ("texts", False),
    "correct": ("true or false", False),
    "score": ("numbers", False),
    "answer_logprob": ("numbers", False),
    "answer_margin": ("numbers", False),
    "stop_reason": ("texts", True),
    "answer_text": ("texts", True),
    "answer_ids": ("lists of integers", True),
    "answer_tokens": ("integers", False),
    "latent_steps": ("integers", False),
}
COUNT_COLUMNS = ["sweeps", "commits", "conflicts"]  # of the schedule; absent in older run folders
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
UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, pa.ArrowException)
FORMAT = 2  # of tables; those of 1 do not say which questions and weights they are of
RECORD_FORMAT = 3  # of `run.json`; since 2 it has digests of tables, since 3 one of itself
NUMBER_COLUMNS = ["n", "drawn", "value", "ci_low", "ci_high", "questions", "format"]
REQUIRED_COLUMNS = ["n", "drawn", "metric", "questions", "format"]  # have a value in every row
RUN_COLUMNS = METRIC_COLUMNS[: METRIC_COLUMNS.index("n")]
JOB_NAME = re.compile(r"^  job:\n(?:    .*\n)*?    name: (\w+)$", re.MULTILINE)  # in `.hydra/hydra.yaml`
WITHOUT_RUN = ("annotate", "train_reasoner", "train_rm")
UNKNOWN = "unknown"  # how the digest of a run's questions begins that does not say which they are
DIGEST_COLUMNS = ["questions_digest", "weights_digest"]  # since format 2
# what makes rows belong to one curve: names, settings, and the question set and weights behind the names
PLAIN_BUDGETS = ("ladder", "fixed")  # of one run, they report the same figures
CURVE_COLUMNS = [name for name in RUN_COLUMNS if name not in ("run_id", "aggregator", "seed")]
SEED_COLUMNS = ["seeds", "seed_sd"]  # beside the others in a table of means over seeds


def write_rollouts(folder: Path, rollouts: pd.DataFrame) -> None:
    """Write `rollouts.parquet`."""
    with whole_file(folder / ROLLOUTS) as path:
        columns = [*ROLLOUT_COLUMNS, *(name for name in COUNT_COLUMNS if name in rollouts)]
        schema = pa.Schema.from_pandas(rollouts.iloc[:0][columns], preserve_index=False)
        for place, (name, (kind, _)) in enumerate(ROLLOUT_COLUMNS.items()):
            if kind in STORED_AS:
                schema = schema.set(place, pa.field(name, STORED_AS[kind]))
        with pq.ParquetWriter(path, schema, compression="snappy") as writer:
            for start in range(0, len(rollouts), ROWS_AT_ONCE):  # all rows once more would be large
                part = rollouts.iloc[start : start + ROWS_AT_ONCE][columns]
                writer.write_table(pa.Table.from_pandas(part, schema, preserve_index=False))


def read_rollouts(folder: Path) -> pd.DataFrame:
    """The `rollouts.parquet` of a run folder, without `question_index`.

    Raises:
        UsageError: it is missing, damaged or of another run.
    """
    try:
        there = pq.read_schema(folder / ROLLOUTS).names
        own = [name for name in ROLLOUT_COLUMNS if name != "question_index"]  # which early runs do not have
        table = pq.read_table(folder / ROLLOUTS, columns=[*own, *(name for name in COUNT_COLUMNS if name in there)])
        missing = [name for name in own if name not in table.column_names]
        if missing or not len(table):
            raise ValueError(f"it has no {f'column {missing[0]}' if missing else 'rows'}")
        for name in own:
            kind, required = ROLLOUT_COLUMNS[name]
            if not KINDS[kind](table[name].type):
                raise ValueError(f"column {name} must contain {kind}")
            if required and table[name].null_count:
                raise ValueError(f"column {name} lacks a value")
        if table["correct"].null_count not in (0, len(table)):  # null in all rows without gold answers
            raise ValueError("column correct lacks a value")
        rollouts = table.to_pandas()
    except UNREADABLE as error:
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
    except UNREADABLE as error:
        raise UsageError(f"{folder / BUDGET}: cannot be read ({str(error).splitlines()[0]})") from error
    return budget


class LatentsFile:
    """`latents.safetensors` in the making: one tensor `latents_RTD`, whose rows come in any order.

    It gets its name when the block ends well; rows with fewer steps end in zeros.
    """

    def __init__(self, path: Path, wanted: pd.DataFrame, shape_TD: tuple[int, int], dtype: str) -> None:
        """Begin a file.

        Args:
            path: of the file.
            wanted: its rows (columns `row_key`, `rollout`), those of a question side by side.
            shape_TD: T and D.
            dtype: `float32`, `bfloat16` or `float16`.
        """
        self._shape, self._dtype = (len(wanted), *shape_TD), dtype
        self._first: dict[str, int] = {}  # by row key: the row of rollout 0
        row = 0
        for key, numbers in runs_of(wanted):
            self._first.setdefault(key, row - numbers.start)
            row += len(numbers)
        self._file = whole_file(path)

    def __enter__(self) -> LatentsFile:
        number = np.dtype(f"<{'u2' if self._dtype != 'float32' else 'f4'}")
        size = int(np.prod(self._shape)) * number.itemsize
        about = {"dtype": SAFETENSORS_DTYPES[self._dtype], "shape": self._shape, "data_offsets": [0, size]}
        header = json.dumps({"latents_RTD": about}).encode()
        header += b" " * (-len(header) % 8)
        path = self._file.__enter__()
        path.write_bytes(len(header).to_bytes(8, "little") + header)
        with path.open("r+b") as file:
            file.truncate(8 + len(header) + size)
        self._latents_RTD: Any = np.zeros(self._shape, dtype=number)
        if size:
            self._latents_RTD = np.memmap(path, number, "r+", 8 + len(header), self._shape)
        return self

    def __exit__(self, *error: Any) -> None:
        del self._latents_RTD
        self._file.__exit__(*error)

    def put(self, places: Sequence[tuple[str, int]], latents_RTD: Tensor) -> None:
        """Write the latents (on the CPU, in the file's dtype) of some rollouts, each a (row key, rollout)."""
        import torch

        rows = [self._first[key] + number for key, number in places]
        bits_RTD = latents_RTD if self._dtype == "float32" else latents_RTD.view(torch.uint16)
        self._latents_RTD[rows] = bits_RTD.numpy()


class KeptLatents:
    """The latents of a run folder, read as they are asked for.

    Raises:
        UsageError: the file is damaged or of another run, or has another number of rows.
    """

    def __init__(self, folder: Path, rows: int) -> None:
        """Open `latents.safetensors`, which should have so many rows."""
        from safetensors import SafetensorError, safe_open

        path = folder / LATENTS
        try:
            self._latents_RTD = safe_open(path, framework="pt").get_slice("latents_RTD")
        except (OSError, KeyError, SafetensorError) as error:
            raise UsageError(f"{path}: cannot be read ({error})") from error
        check_file(folder, LATENTS)
        if (found := self._latents_RTD.get_shape()[0]) != rows:
            raise UsageError(f"{path}: {found} rows, but {rows} in {ROLLOUTS}")

    def rows(self, first: int, count: int) -> Tensor:
        """The latents (count, T, D) of some rows."""
        return self._latents_RTD[first : first + count]


def write_scores(folder: Path, rollouts: pd.DataFrame, step_scores: Sequence[Float32]) -> None:
    """Write `scores.parquet`: each rollout's score and the step scores behind it."""
    table = rollouts[["question_id", "rollout", "score"]].assign(step_scores=pd.Series(list(step_scores)))
    with whole_file(folder / SCORES) as path:
        table.to_parquet(path, index=False)


def write_metrics(path: Path, metrics: pd.DataFrame) -> None:
    """Write a metrics table (or one of means over seeds); missing figures are empty cells."""
    columns = METRIC_COLUMNS + [name for name in SEED_COLUMNS if name in metrics]
    metrics = metrics.assign(format=metrics["format"].fillna(FORMAT).astype(int))
    write_csv(path, metrics[columns], index=False, float_format="%.10g")


def read_metrics(path: Path) -> pd.DataFrame:
    """Read a metrics table.

    One of format 1 has empty cells in `DIGEST_COLUMNS`: its questions and weights are not known.

    Raises:
        UsageError: it is not one, is cut off, or is of a later format.
    """
    try:
        content = path.read_bytes()
        frame = pd.read_csv(
            BytesIO(content),
            dtype=dict.fromkeys(RUN_COLUMNS, str),
            keep_default_na=False,
            na_values={name: [""] for name in METRIC_COLUMNS + SEED_COLUMNS if name not in RUN_COLUMNS},
        )
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read as a metrics table ({error})") from error
    if "format" not in frame.columns:
        frame = frame.assign(**dict.fromkeys(DIGEST_COLUMNS, ""), format=1)
    missing = [name for name in METRIC_COLUMNS if name not in frame.columns]
    if missing:
        raise UsageError(f"{path}: not a metrics table: columns missing: {', '.join(missing[:5])}")
    if frame.empty or not content.endswith((b"\n", b"\r")):  # the rest of a last number would not be missed
        raise UsageError(f"{path}: {'has no rows' if frame.empty else 'is truncated: the last line is incomplete'}")
    for name in NUMBER_COLUMNS:
        if not is_numeric_dtype(frame[name]):
            raise UsageError(f"{path}: not a metrics table: column {name} must contain numbers")
    for name in ("n", "drawn", "questions"):
        counts = frame[name].dropna()
        if not (np.isfinite(counts) & (counts >= 1) & (counts % 1 == 0) & (counts < 1 << 53)).all():
            raise UsageError(f"{path}: not a metrics table: column {name} must contain integers, 1 or more")
    for name in REQUIRED_COLUMNS:
        if frame[name].isna().any():
            raise UsageError(f"{path}: not a metrics table, its row {frame[name].isna().argmax() + 1} has no {name}")
    if (found := frame["format"].max()) > FORMAT:
        raise UsageError(f"{path}: format {found:g}, this version reads those up to {FORMAT}")
    return plain_cells(frame)[METRIC_COLUMNS + [name for name in frame.columns if name not in METRIC_COLUMNS]]


def has_curve(metrics: pd.DataFrame) -> bool:
    """Whether a table has accuracy or coverage at several n, or agreement where there are no gold answers."""
    return metrics.loc[metrics["metric"].isin(figures_drawn(metrics)), "n"].nunique() > 1


def figures_drawn(metrics: pd.DataFrame) -> list[str]:
    """The metrics that a figure shows; agreement only where there is neither accuracy nor coverage."""
    judged = metrics["metric"].isin(["accuracy", "coverage"]) & metrics["value"].notna()
    return ["coverage", "accuracy"] if judged.any() else ["agreement"]


def tell_apart(metrics: pd.DataFrame, origin: str | pd.Series) -> pd.DataFrame:
    """A table whose rows of unknown questions and weights belong together only if they are of one origin."""
    known = metrics["questions_digest"] != ""
    return metrics.assign(questions_digest=metrics["questions_digest"].where(known, f"{UNKNOWN}, of " + origin))


def name_once(metrics: pd.DataFrame) -> pd.DataFrame:
    """A table in which equal weights and equal question sets have one name: files are moved, linked and copied."""
    named = metrics.copy()
    for digest, same, names in (
        ("weights_digest", ["model", "weights_digest"], ("checkpoint", "scorer")),
        ("questions_digest", ["questions_digest"], ("task", "split")),
    ):
        known = (metrics[digest] != "") & ~metrics[digest].str.startswith(UNKNOWN)
        for name in names:
            named[name] = metrics[name].mask(known, metrics.groupby(same)[name].transform("first"))
    return named


def sampler_label(columns: Mapping[str, str] | pd.Series) -> str:
    """A sampler with its value, as in `gaussian sigma=0.4`, from columns of a table; what they lack is left out."""
    text, name, value = (str(columns.get(key, "")) for key in ("sampler", "sampler_param", "sampler_value"))
    return f"{text} {name}={value}".strip() if name and value else text


def digest_label(column: str, digest: str) -> str:
    """How people are shown one of `DIGEST_COLUMNS`, as in `questions 1a2b3c4d`."""
    short = digest if digest.startswith(UNKNOWN) else "+".join(part[:8] for part in digest.split("+"))
    return f"{column.removesuffix('_digest')} {short or UNKNOWN}"


def read_run_metrics(folder: Path) -> pd.DataFrame:
    """The metrics table of a run folder; one of format 1 is of questions and weights that no other run has."""
    metrics = read_metrics(folder / METRICS)
    check_file(folder, METRICS)
    return tell_apart(metrics, metrics["run_id"])


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
    record = _checked_record(folder / RUN_JSON)
    if not isinstance(files := record.get("files"), dict):  # of format 1
        return
    path = folder / name
    found = file_digest(path) if path.is_file() else None
    if found != files.get(name):
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
    record = _checked_record(path)
    if record.get("format", 1) < RECORD_FORMAT:
        _warn_without_digest(path, record.get("format", 1))
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


def _checked_record(path: Path) -> dict[str, Any]:
    """A `run.json` without its digest, which is checked; raises UsageError."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: cannot be read ({error}); draw that run again with ltts run") from error
    record = record if isinstance(record, dict) else {}
    digest, found = record.pop("digest", None), record.get("format", 1)
    if not isinstance(found, int) or found > RECORD_FORMAT:
        raise UsageError(f"{path}: format {found}, this version reads those up to {RECORD_FORMAT}")
    if digest != settings_digest(record) and not (digest is None and found < RECORD_FORMAT):
        raise UsageError(f"{path}: is damaged, its content is not what was written; draw that run again with ltts run")
    return record


@cache
def _warn_without_digest(path: Path, found: int) -> None:
    log.warning("%s: format %d has no digest of the file, so damage of it would not be noticed", path, found)


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
    found = [hydra.parent for hydra in path.rglob(".hydra") if hydra.is_dir() and _command(hydra) not in WITHOUT_RUN]
    require(key, path, bool(found), "neither a run folder nor a folder of runs")
    return sorted(found, key=lambda folder: [(not p.isdigit(), int(p) if p.isdigit() else 0, p) for p in folder.parts])


def _command(hydra: Path) -> str | None:
    """The command that a `.hydra` folder is of; None where that cannot be read."""
    try:
        found = JOB_NAME.search((hydra / "hydra.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return None if found is None else found[1]


def last_run() -> Path:
    """The folder of the run or sweep in this folder whose table was written last; questions to `ltts ask` are none.

    Raises:
        UsageError: there is none.
    """
    tables = [table for name in OUTPUT_FOLDERS for table in Path(name).glob(f"*/*/**/{METRICS}")]
    tables = [table for table in tables if table.parts[1] != "ask"]
    if not tables:
        raise UsageError(
            f"no run in the folders {' and '.join(OUTPUT_FOLDERS)} of this one; name a run folder or a table"
        )
    return Path(*max(tables, key=lambda table: table.stat().st_mtime).parts[:3])


def read_tables(folders: Iterable[Path]) -> dict[Path, pd.DataFrame]:
    """The metrics tables of the complete run folders among some.

    Raises:
        UsageError: a table is damaged, or the one that a run had is missing.
    """
    tables = {}
    for folder in filter(is_complete, folders):
        check_file(folder, METRICS)
        if (folder / METRICS).is_file():
            tables[folder] = read_run_metrics(folder)
    return tables


def join_tables(tables: Iterable[pd.DataFrame]) -> pd.DataFrame:
    """The metrics of several runs in one table without repeated rows."""
    joined = name_once(pd.concat(tables, ignore_index=True))
    return joined.drop_duplicates(["run_id", "aggregator", "n", "drawn", "metric"], ignore_index=True)
