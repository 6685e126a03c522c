"""The annotation folder: rollouts of training questions with step-wise labels, what `train-rm` learns from.

Shards are in the layout of the official annotation, so either project reads the other's:

    {k}_on0.safetensors    {index}.input_ids (N, L) int64      prompt, latent ids, end-of-thinking ids
                           {index}.latent_embeds (N, T, D)     the vectors that were fed back; float32
                           {index}.estimations (N, T) float32  labels in [0, 1], -100 where a rollout has no such step
                           {index}.corrects (N) bool           whether the rollout's own answer is right
                           a question without a mixed outcome leaves only {index}.input_ids, a scalar 0

Beside each shard lies `{k}_on0-DIGEST.parquet`, its part of the index, with the gold answers that the labels depend on
and the digest of the shard; its own digest is in its name. It is written after the shard: a shard without one is not
there. A reader refuses a damaged shard or part; a writer sets both aside, and their questions are labelled again.
`annotations.json` holds the settings that made the folder; `index.parquet` joins the parts, without the gold answers,
at the end.
`train-rm` reads of them `reasoner` (digest), `reasoner_name`, `sampler`, `latent_id`; every shard has to fit `width`.

Source: src/annotate_data.py and src/dataset.py of ModalityDance/LatentTTS at 6657f20.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from latent_tts.errors import RunError, UsageError, bad_value, require
from latent_tts.results.files import bytes_digest, digest_in_name, set_aside, settings_digest, whole_file, write_text
from latent_tts.results.parts import parquet_table
from latent_tts.types import LabelledQuestion, UnmixedQuestion, UnmixedReason, file_digest

log = logging.getLogger(__name__)
# parts of format 1 have no gold answers, those of 2 no digests, settings of 3 do not say how the reasoner was computed,
# so a writer does not resume them
FORMAT, READABLE = 4, (1, 2, 3, 4)
DAMAGED = "is damaged; `ltts annotate` with this folder as its output labels its questions again"
MISSING = "is missing; `ltts annotate` with this folder as its output labels its questions again"
SETTINGS, INDEX, COMPUTATION = "annotations.json", "index.parquet", "computation"
MAX_OPEN = 64  # shards kept open
TENSORS = ("input_ids", "latent_embeds", "estimations", "corrects")
NO_STEP = -100.0  # the label, on disk, of a step that a rollout does not have
SHARD_NAME = re.compile(r"(\d+)_on(\d+)\.safetensors")
INDEX_SCHEMA = pa.schema(
    [
        ("question_id", pa.string()),
        ("index", pa.int64()),
        ("shard", pa.string()),
        ("rollouts", pa.int32()),
        ("kept", pa.bool_()),
        ("reason", pa.string()),  # why it was dropped, null where it was kept
        ("share_correct", pa.float64()),
    ]
)
PART_SCHEMA = INDEX_SCHEMA.append(pa.field("answer", pa.string())).append(pa.field("digest", pa.string()))


class AnnotationFolder:
    """A folder of annotations, to write (one writer at a time) or to read.

    Attributes:
        path: the folder.
        settings: what made it, `format` included; empty for a folder of official shards.
        complete, rows: whether `finish` was called; most rows of a batch of the last run, None if not known.
        official: there is no `annotations.json`: question ids are the indices as text.
        width: of every latent, from the settings; a reader of official shards may set it.
        task_path: where the file of the questions is now, if not where the settings say.
    """

    rows: int | None = None

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, Any] | None = None,
        answers: Mapping[str, str] | None = None,
        key: str = "annotations",
    ) -> None:
        """Open a folder.

        Args:
            path: the folder; a writer makes it.
            settings: everything JSON-able that determines the annotations; None opens the folder to read.
            answers: gold answer of each question that is to be there, by its id; to write.
            key: the config key that errors name.

        Raises:
            UsageError: it was made with other settings or gold answers, is no annotation folder, or holds none.
        """
        self.path, self._key, self._answers = path, key, answers or {}
        self._opened: dict[Path, tuple[Any, set[str]]] = {}
        self._digests: dict[str, str] = {}  # of shards, as the index has them
        self._whole: set[Path] = set()  # shards whose digests were checked
        require(key, path, not path.exists() or path.is_dir(), "must be a folder, this is a file")
        self.official = not (path / SETTINGS).is_file()
        if self.official and self._parts():
            raise bad_value(key, path, f"lacks {SETTINGS}, which was written with {self._parts()[0].name}; restore it")
        if settings is None:
            require(key, path, path.is_dir(), "no such folder; `ltts annotate` makes one")
            record = {"settings": {}, "complete": True} if self.official else self._read_settings()
            if lost := self._lost_parts(record):
                raise bad_value(key, path / lost, "is no part of this folder" if (path / lost).is_file() else MISSING)
            require(key, path, bool(self._shards()), "an empty folder: no shards of annotations (K_on0.safetensors)")
            self.settings, self.complete = record["settings"], bool(record["complete"])
            self.width: int | None = self.settings.get("width")
            self.task_path: str | None = record.get("task_path")
            return
        self.settings, self.complete = json.loads(json.dumps({"format": FORMAT, **settings})), False
        self.width, self.task_path = self.settings.get("width"), None
        if self.official:
            require(key, path, not self._shards(), f"holds shards but no {SETTINGS}; choose another folder")
            path.mkdir(parents=True, exist_ok=True)
            self._write_settings()
            self.official = False
        else:
            record = self._read_settings()
            self._refuse_other_settings(record["settings"], _at_place_of(self.settings, record["settings"]))
            self.task_path = _task_path(self.settings)
            self.settings = record["settings"]
            self.complete, self.rows = bool(record["complete"]), record["rows"]
            if lost := self._lost_parts(record):
                log.warning("%s: parts are missing, such as %s; their questions are labelled again", path, lost)
                self._write_settings()
            self._set_damaged_aside()
            self._refuse_other_questions()
        parts = {_shard_of(part) for part in self._parts()}
        for shard in self._shards():  # stopped between a shard and its part of the index
            if shard.name not in parts:
                shard.unlink()

    @property
    def task(self) -> dict[str, Any] | None:
        """The task of its questions, with the path that their file has now; None if it is not known."""
        task = self.settings.get("task")
        return task if task is None or self.task_path is None else task | {"path": self.task_path}

    def made_with(self, settings: Mapping[str, Any]) -> bool:
        """Whether these are its settings, however the reasoner was computed."""
        own = {name: value for name, value in self.settings.items() if name != COMPUTATION}
        return own == _at_place_of(settings, own)

    def settle_computation(self, way: Mapping[str, str]) -> None:
        """Record how the reasoner is computed; to be called before `add`, once the reasoner is loaded.

        Raises:
            UsageError: the existing labels were made with a reasoner that is computed in another way.
        """
        if COMPUTATION in self.settings:
            self._refuse_other_settings(self.settings, {**self.settings, COMPUTATION: dict(way)})
            return
        self.settings[COMPUTATION] = dict(way)
        self._write_settings(complete=self.complete)

    def present(self) -> set[str]:
        """Ids of the questions that are done, kept or dropped."""
        return set(self.index()["question_id"].to_pylist())

    def add(self, entries: Sequence[LabelledQuestion | UnmixedQuestion]) -> None:
        """Write one shard and its part of the index.

        Raises:
            ValueError: arrays that do not fit each other or the folder's settings.
            RunError: latents that are not finite.
        """
        from safetensors.numpy import save_file

        if not entries:
            return
        if self.complete:  # more questions than the run that finished it had
            self._write_settings()
        places = [int(match[1]) for shard in self._shards() if (match := SHARD_NAME.fullmatch(shard.name))]
        shard = self.path / f"{max(places, default=-1) + 1}_on0.safetensors"
        tensors, rows = {}, []
        for entry in entries:
            row: dict[str, Any] = {
                "question_id": entry.question_id, "index": entry.index, "shard": shard.name,
                "answer": self._answers.get(entry.question_id), "kept": isinstance(entry, LabelledQuestion),
            }  # fmt: skip
            if isinstance(entry, UnmixedQuestion):
                if entry.reason not in get_args(UnmixedReason):
                    raise ValueError(f"question {entry.question_id}: no such reason {entry.reason!r}")
                tensors[f"{entry.index}.input_ids"] = np.array(0, dtype=np.int64)
                share = float(entry.reason == "all_correct")
                row |= {"rollouts": entry.rollouts, "reason": entry.reason, "share_correct": share}
            else:
                labels_NT = np.where(np.isnan(entry.labels_NT), NO_STEP, entry.labels_NT)
                arrays = (entry.input_ids_NL, entry.latents_NTD, labels_NT, entry.corrects_N)
                if wrong := _wrong_shapes([a.shape for a in arrays], self.width):
                    raise ValueError(f"question {entry.question_id}: {wrong}")
                if wrong := _wrong_values(entry):
                    raise RunError(f"labelling failed: question {entry.question_id}: {wrong}")
                kinds = (np.int64, np.float32, np.float32, np.bool_)
                for name, array, kind in zip(TENSORS, arrays, kinds, strict=True):
                    tensors[f"{entry.index}.{name}"] = np.ascontiguousarray(array, dtype=kind)
                row |= {"rollouts": len(entry.corrects_N), "share_correct": float(entry.corrects_N.mean())}
            rows.append(row)
        with whole_file(shard) as partial:
            save_file(tensors, partial, metadata={"settings": settings_digest(self.settings)})
        digest = file_digest(shard)
        part = pa.Table.from_pylist([row | {"digest": digest} for row in rows], schema=PART_SCHEMA)
        with whole_file(shard.with_suffix(".parquet"), add_digest=True) as partial:
            pq.write_table(part, partial.absolute())

    def finish(self) -> dict[str, int]:
        """Join the index and mark the folder complete; returns how many questions were kept, and dropped by reason."""
        counts = self.counts()
        with whole_file(self.path / INDEX) as partial:
            pq.write_table(self.index(), partial.absolute())
        self._write_settings(counts, complete=True)
        return counts

    def counts(self) -> dict[str, int]:
        """How many questions were `kept`, and how many dropped, by reason (`unknown` in official shards)."""
        reasons = Counter(self.index()["reason"].to_pylist())
        names = ["unknown"] if self.official else get_args(UnmixedReason)
        return {"kept": reasons[None], **{name: reasons[name] for name in names}}

    def index(self) -> pa.Table:
        """The index (columns of `INDEX_SCHEMA`) by ascending index, a row per question; the last shard wins.

        Raises:
            UsageError: a part cannot be read, or names a shard that does not exist.
        """
        rows = self._official_rows() if self.official else self._part_rows()
        by_id = {row["question_id"]: row for row in rows}
        return pa.Table.from_pylist(sorted(by_id.values(), key=lambda row: row["index"]), schema=INDEX_SCHEMA)

    def read(self) -> Iterator[LabelledQuestion]:
        """The kept questions by ascending index; raises what `entry` raises."""
        for row in self.index().to_pylist():
            if row["kept"]:
                yield self.entry(row)

    def entry(self, row: Mapping[str, Any]) -> LabelledQuestion:
        """One kept question by its row of the index.

        Raises:
            UsageError: its shard is cut off, of another run, or holds tensors that do not fit.
        """
        shard, index, names = self._fitting(row)
        try:
            ids, latents, labels, corrects = (shard.get_tensor(name) for name in names)
        except Exception as error:  # the Rust side raises its own kinds, TypeError for bfloat16 among them
            raise bad_value(self._key, self.path / row["shard"], f"cannot be read as numpy arrays ({error})") from error
        if ids.ndim < 2 or (ids.ndim == 2 and len(ids) == 1):  # the official layout also allows one row for all
            ids = np.tile(ids.reshape(1, -1), (len(latents), 1))
        labels = np.where(labels == NO_STEP, np.nan, labels)
        latents, labels = latents.astype(np.float32), labels.astype(np.float32)
        entry = LabelledQuestion(
            row["question_id"], index, ids.astype(np.int64), latents, labels, corrects.astype(np.bool_)
        )
        if wrong := _wrong_values(entry):
            raise self._misfit(row, wrong)
        return entry

    def check(self) -> None:
        """Hold every kept question's tensors against the settings by their shapes, without reading them.

        Raises:
            UsageError: as `entry`.
        """
        for row in self.index().to_pylist():
            if row["kept"]:
                self._fitting(row)

    def _fitting(self, row: Mapping[str, Any]) -> tuple[Any, int, list[str]]:
        """The opened shard of a row, its index there, and the names of its tensors, whose shapes fit."""
        path, index = self.path / row["shard"], row["index"]
        if path not in self._opened:
            if len(self._opened) >= MAX_OPEN:
                self._opened.pop(next(iter(self._opened)))
            opened = self._open(path)
            self._opened[path] = opened, set(opened.keys())
        opened, known = self._opened[path]
        names = [f"{index}.{part}" for part in TENSORS]
        if missing := [name for name in names if name not in known]:
            raise self._misfit(row, f"lacks the tensor {missing[0]}")
        ids, latents, labels, corrects = (tuple(opened.get_slice(name).get_shape()) for name in names)
        if self.official and len(latents) == 3 and (len(ids) == 1 or ids[:1] == (1,)):
            ids = (latents[0], ids[-1])
        if wrong := _wrong_shapes([ids, latents, labels, corrects], self.width):
            raise self._misfit(row, wrong)
        return opened, index, names

    def _misfit(self, row: Mapping[str, Any], wrong: str) -> UsageError:
        return bad_value(self._key, self.path / row["shard"], f"question {row['question_id']}: {wrong}")

    def _parts(self) -> list[Path]:
        return sorted(self.path.glob("*_on*.parquet"), key=_place)

    def _part_rows(self) -> Iterator[dict[str, Any]]:
        for part in self._parts():
            for row in self._read_part(part):
                require(
                    self._key,
                    part,
                    bool(SHARD_NAME.fullmatch(str(row["shard"]))),
                    f"names {row['shard']!r}, which is no shard's name",
                )
                require(
                    self._key,
                    self.path,
                    (self.path / row["shard"]).is_file(),
                    f"the index names {row['shard']}, which does not exist",
                )
                if row["digest"] is not None:
                    self._digests.setdefault(row["shard"], row["digest"])
                yield row

    def _read_part(self, part: Path) -> list[dict[str, Any]]:
        """The rows of a part; a column that an earlier format lacks is empty."""
        try:
            content = part.read_bytes()
            require(
                self._key, part, self.settings["format"] < 3 or bytes_digest(content) == digest_in_name(part), DAMAGED
            )
            return parquet_table(content, schema=PART_SCHEMA).to_pylist()
        except (OSError, pa.ArrowException) as error:
            raise bad_value(self._key, part, f"cannot be read ({str(error).splitlines()[0]})") from error

    def _set_damaged_aside(self) -> None:
        """Rename parts and shards that are not what was written, so that their questions count as missing."""
        for part in self._parts():
            shard = self.path / _shard_of(part)
            try:
                whole = file_digest(shard) == self._read_part(part)[0]["digest"]
            except (OSError, UsageError):
                whole = False
            if whole:
                continue
            log.warning("%s or its part of the index is damaged: both are set aside, as *.damaged", shard)
            for path in (part, shard):
                set_aside(path)
            self._write_settings()

    def _official_rows(self) -> Iterator[dict[str, Any]]:
        for shard in self._shards():
            opened = self._open(shard)
            names = set(opened.keys())
            for name in sorted(names):
                index, _, part = name.rpartition(".")
                if part != "input_ids" or not index.isdigit():
                    continue
                kept = {f"{index}.estimations", f"{index}.corrects"} <= names
                corrects = opened.get_tensor(f"{index}.corrects") if kept else np.zeros(0)
                yield {
                    "question_id": index, "index": int(index), "shard": shard.name, "kept": kept,
                    "rollouts": corrects.size, "reason": None if kept else "unknown",
                    "share_correct": float(corrects.mean()) if kept else None,
                }  # fmt: skip

    def _open(self, shard: Path) -> Any:
        from safetensors import SafetensorError, safe_open

        if shard.name in self._digests and shard not in self._whole:
            require(self._key, shard, file_digest(shard) == self._digests[shard.name], DAMAGED)
            self._whole.add(shard)
        try:
            opened = safe_open(shard, framework="np")
            opened.__enter__()
        except (SafetensorError, OSError) as error:
            raise bad_value(self._key, shard, f"cut off, or not safetensors ({error})") from error
        require(
            self._key,
            shard,
            bool(self.official) or (opened.metadata() or {}).get("settings") == settings_digest(self.settings),
            f"a shard of another run: its settings are not those of {SETTINGS}",
        )
        return opened

    def _shards(self) -> list[Path]:
        found = self.path.glob("*.safetensors") if self.path.is_dir() else []
        return sorted((path for path in found if SHARD_NAME.fullmatch(path.name)), key=_place)

    def _read_settings(self) -> dict[str, Any]:
        path = self.path / SETTINGS
        try:
            record = json.loads(path.read_text())
            if not isinstance(record["settings"], dict):
                raise ValueError("settings is not an object")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise bad_value(self._key, path, f"is not the record of annotations ({error})") from error
        if (found := record["settings"].get("format")) not in READABLE:
            raise bad_value(self._key, path, f"format {found}, this version reads {READABLE[0]} to {FORMAT}")
        is_whole = record.pop("digest", None) in (None, settings_digest(record))  # earlier versions wrote none
        require(self._key, path, is_whole, "is damaged; restore it, or annotate into another folder")
        return {"complete": False, "rows": None, "parts": None, **record}

    def _write_settings(self, counts: Mapping[str, int] | None = None, *, complete: bool = False) -> None:
        self.complete = complete
        record = {
            "settings": self.settings, "complete": complete, "rows": self.rows, "counts": counts or {},
            "task_path": self.task_path,
            "parts": [part.name for part in self._parts()] if complete else None,
        }  # fmt: skip
        content = record | {"digest": settings_digest(record)}
        write_text(self.path / SETTINGS, json.dumps(content, indent=1) + "\n")

    def _lost_parts(self, record: Mapping[str, Any]) -> str | None:
        """A part that a finished folder lacks, or has though it is none of its own; None if there is no such part."""
        if not record["complete"] or record.get("parts") is None:
            return None
        return min(set(record["parts"]) ^ {part.name for part in self._parts()}, default=None)

    def _refuse_other_settings(self, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        for name in [*wanted, *found]:
            ours, theirs = wanted.get(name), found.get(name)
            if ours != theirs and (name in wanted or name != COMPUTATION):  # known only once the reasoner is loaded
                raise UsageError(
                    f"{self._key}={self.path}: was made with other settings; choose another folder or remove it\n"
                    f"{name}: {json.dumps(theirs)} there, {json.dumps(ours)} now"
                )

    def _refuse_other_questions(self) -> None:
        ids = list(self._answers)
        for row in self._part_rows():
            if row["index"] < len(ids) and ids[row["index"]] != row["question_id"]:
                raise UsageError(
                    f"{self._key}={self.path}: was made with other questions; choose another folder or remove it\n"
                    f"question {row['index'] + 1}: {row['question_id']} there, {ids[row['index']]} now"
                )
            ours, theirs = self._answers.get(row["question_id"]), row["answer"]
            if ours is not None and ours != theirs:
                raise UsageError(
                    f"{self._key}={self.path}: question {row['question_id']} was labelled by another gold answer; "
                    f"choose another folder or remove it\nanswer: {json.dumps(theirs)} there, {json.dumps(ours)} now"
                )


def _task_path(settings: Mapping[str, Any]) -> str | None:
    task = settings.get("task")
    return task.get("path") if isinstance(task, Mapping) else None


def _at_place_of(settings: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that name the task's file as others do: which questions it has is told from the questions."""
    if None in (_task_path(settings), there := _task_path(found)):
        return dict(settings)
    return {**settings, "task": {**settings["task"], "path": there}}


def _wrong_shapes(shapes: Sequence[tuple[int, ...]], wanted: int | None) -> str | None:
    """What is wrong with the shapes of an entry's ids, latents, labels and outcomes."""
    ids, latents, labels, corrects = shapes
    if len(latents) != 3 or 0 in latents:
        return f"latent_embeds is {latents}, must be (rollouts, latents, width)"
    n, steps, width = latents
    problems = {
        f"latent_embeds has width {width}, must be {wanted}": wanted not in (None, width),
        f"estimations is {labels}, latent_embeds {latents}": labels != (n, steps),
        f"corrects is {corrects}, for {n} rollouts": corrects != (n,),
        f"input_ids is {ids}, for {n} rollouts": len(ids) != 2 or ids[0] != n,
    }
    return next((problem for problem, is_so in problems.items() if is_so), None)


def _wrong_values(entry: LabelledQuestion) -> str | None:
    """What is wrong with the numbers of an entry."""
    has_step_NT = ~np.isnan(entry.labels_NT)
    in_range_NT = (entry.labels_NT >= 0) & (entry.labels_NT <= 1)
    problems = {
        "latent_embeds is not finite": not np.isfinite(entry.latents_NTD).all(),
        "estimations has a step after one that is missing": (has_step_NT[:, 1:] & ~has_step_NT[:, :-1]).any(),
        "estimations has labels outside of [0, 1]": not in_range_NT[has_step_NT].all(),
    }
    return next((problem for problem, is_so in problems.items() if is_so), None)


def _shard_of(part: Path) -> str:
    """The name of the shard that a part of the index is of."""
    return f"{part.stem.partition('-')[0]}.safetensors"


def _place(path: Path) -> tuple[int, int, str]:
    numbers = re.match(r"(\d+)_on(\d+)", path.name)
    return (int(numbers[1]), int(numbers[2]), path.name) if numbers else (-1, -1, path.name)
