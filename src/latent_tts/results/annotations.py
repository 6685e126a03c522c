"""The annotation folder: rollouts of training questions with step-wise labels, what `train-rm` learns from.

Shards are in the layout of the official annotation, so either project reads the other's:

    {k}_on0.safetensors    {index}.input_ids (N, L) int64      prompt, latent ids, end-of-thinking ids
                           {index}.latent_embeds (N, T, D)     the vectors that were fed back; float32
                           {index}.estimations (N, T) float32  labels in [0, 1], -100 where a rollout has no such step
                           {index}.corrects (N) bool           whether the rollout's own answer is right
                           a question without a mixed outcome leaves only {index}.input_ids, a scalar 0

The metadata of a shard hold the rows of its questions, with the gold answers that the labels depend on.
`annotations.json` holds the settings that made the folder and the digests of its shards; it is written after each
shard, and a shard that it does not list is not there. A reader refuses a damaged shard; a writer sets it aside, and its
questions are labelled again. `index.parquet` has the rows of all questions, without the gold answers, at the end.
`train-rm` reads of the settings `reasoner` (digest), `reasoner_name`, `sampler`, `latent_id`; every shard has to fit
`width`.

Source: src/annotate_data.py and src/dataset.py of ModalityDance/LatentTTS at 6657f20.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from functools import cached_property, lru_cache
from itertools import count
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from latent_tts.errors import RunError, UsageError, bad_value, require
from latent_tts.results.files import read_record, set_aside, whole_file, write_record
from latent_tts.types import LabelledQuestion, UnmixedQuestion, UnmixedReason, file_digest

log = logging.getLogger(__name__)
FORMAT = 5
SETTINGS, INDEX, COMPUTATION = "annotations.json", "index.parquet", "computation"
QUESTIONS = "questions"  # in the metadata of a shard
OTHER_SETTINGS = "was made with other settings"
MAX_OPEN = 64  # shards kept open
TENSORS = ("input_ids", "latent_embeds", "estimations", "corrects")
NO_STEP = -100.0  # the label, on disk, of a step that a rollout does not have
SHARD_NAME = re.compile(r"\d+_on\d+\.safetensors")
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


class AnnotationFolder:
    """A folder of annotations, to write (one writer at a time) or to read.

    Attributes:
        path: the folder.
        settings: what made it, `format` included, without the path of the questions' file; empty for a folder of
            official shards.
        complete, rows: whether `finish` was called; most rows of a batch of the last run, None if not known.
        official: there is no `annotations.json`: question ids are the indices as text.
        width: of every latent, from the settings; a reader of official shards may set it before it reads.
        task_path: where the file of the questions is now; None if there is none.
    """

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
        self.path, self._key, self._answers, self._writes = path, key, answers or {}, settings is not None
        self._opened = lru_cache(MAX_OPEN)(self._open)
        require(key, path, not path.exists() or path.is_dir(), "must be a folder, this is a file")
        require(key, path, self._writes or path.is_dir(), "no such folder; `ltts annotate` makes one")
        wanted, self.task_path = ({}, None) if settings is None else _without_path(settings)
        found = [each.name for each in path.glob("*.safetensors") if SHARD_NAME.fullmatch(each.name)]
        self.official = not (path / SETTINGS).is_file()
        record = {} if self.official else self._read_record()
        self.settings, self.complete = record.get("settings", wanted), record.get("complete", not self._writes)
        self.width, self.rows = self.settings.get("width"), record.get("rows")
        in_order = sorted(found, key=lambda name: tuple(map(int, re.findall(r"\d+", name))))
        self._digests: dict[str, str | None] = record.get("shards", dict.fromkeys(in_order))
        if not self._writes:
            self.task_path = record.get("task_path")
            require(key, path, bool(self._digests), "an empty folder: no shards of annotations (K_on0.safetensors)")
            return
        require(key, path, not (self.official and found), f"holds shards but no {SETTINGS}; choose another folder")
        self.official = False
        for name in {**wanted, **self.settings}:
            if name != COMPUTATION:  # known once the reasoner is loaded
                self._require_same(OTHER_SETTINGS, name, self.settings.get(name), wanted.get(name))
        self._require_same_questions()
        path.mkdir(parents=True, exist_ok=True)
        self._write_record()

    @property
    def task(self) -> dict[str, Any] | None:
        """The task of its questions, with the path that their file has now; None if it is not known."""
        task = self.settings.get("task")
        return task if task is None or self.task_path is None else task | {"path": self.task_path}

    def made_with(self, settings: Mapping[str, Any]) -> bool:
        """Whether these are its settings, however the reasoner was computed."""
        own = {name: value for name, value in self.settings.items() if name != COMPUTATION}
        return own == _without_path(settings)[0]

    def settle_computation(self, way: Mapping[str, str]) -> None:
        """Record how the reasoner is computed; to be called before `add`, once the reasoner is loaded.

        Raises:
            UsageError: the existing labels were made with a reasoner that is computed in another way.
        """
        there = self.settings.setdefault(COMPUTATION, dict(way))
        self._require_same(OTHER_SETTINGS, COMPUTATION, there, dict(way))
        self._write_record()

    def present(self) -> set[str]:
        """Ids of the questions that are done, kept or dropped."""
        return set(self._rows)

    def add(self, entries: Sequence[LabelledQuestion | UnmixedQuestion]) -> None:
        """Write one shard, and its digest into the record.

        Raises:
            ValueError: arrays that do not fit each other or the folder's settings.
            RunError: latents that are not finite.
        """
        from safetensors.numpy import save_file

        shard = next(name for number in count() if (name := f"{number}_on0.safetensors") not in self._digests)
        tensors, rows = {}, []
        for entry in entries:
            row: dict[str, Any] = {
                "question_id": entry.question_id, "index": entry.index, "shard": shard,
                "answer": self._answers.get(entry.question_id), "kept": isinstance(entry, LabelledQuestion),
            }  # fmt: skip
            if isinstance(entry, UnmixedQuestion):
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
                share = float(entry.corrects_N.mean())
                row |= {"rollouts": len(entry.corrects_N), "reason": None, "share_correct": share}
            rows.append(row)
        with whole_file(self.path / shard) as partial:
            save_file(tensors, partial, metadata={QUESTIONS: json.dumps(rows)})
        self._rows.update((row["question_id"], row) for row in rows)
        self._digests[shard], self.complete = file_digest(self.path / shard), False
        self._write_record()

    def finish(self) -> dict[str, int]:
        """Write the index and mark the folder complete; returns how many questions were kept, and dropped by reason."""
        with whole_file(self.path / INDEX) as partial:
            pq.write_table(pa.Table.from_pylist(self.index(), schema=INDEX_SCHEMA), partial.absolute())
        self.complete = True
        self._write_record()
        return self.counts()

    def counts(self) -> dict[str, int]:
        """How many questions were `kept`, and how many dropped, by reason (`unknown` in official shards)."""
        reasons = Counter(row["reason"] for row in self._rows.values())
        names = ["unknown"] if self.official else get_args(UnmixedReason)
        return {"kept": reasons[None], **{name: reasons[name] for name in names}}

    def index(self) -> list[dict[str, Any]]:
        """The rows (columns of `INDEX_SCHEMA`) of the questions by ascending index; the last shard wins.

        Raises:
            UsageError: a shard is missing, damaged, or holds tensors whose shapes do not fit the settings.
        """
        return sorted(self._rows.values(), key=lambda row: row["index"])

    def read(self) -> Iterator[LabelledQuestion]:
        """The kept questions by ascending index; raises what `entry` raises."""
        return (self.entry(row) for row in self.index() if row["kept"])

    def entry(self, row: Mapping[str, Any]) -> LabelledQuestion:
        """One kept question by its row of the index.

        Raises:
            UsageError: its shard holds tensors that numpy cannot read, or numbers that cannot be.
        """
        shard, index = self._opened(row["shard"]), row["index"]
        try:
            ids, latents, labels, corrects = (shard.get_tensor(f"{index}.{name}") for name in TENSORS)
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

    @cached_property
    def _rows(self) -> dict[str, dict[str, Any]]:
        """The rows of all questions by their ids. A writer sets damaged shards aside, so that theirs are missing."""
        rows = {}
        for shard, digest in list(self._digests.items()):
            path = self.path / shard
            if digest is None or (path.is_file() and file_digest(path) == digest):
                rows |= {row["question_id"]: row for row in self._rows_of(shard)}
                continue
            state = "damaged" if path.is_file() else "missing"
            again = "`ltts annotate` with this folder as its output labels its questions again"
            require(self._key, path, self._writes, f"is {state}; {again}")
            log.warning("%s is %s: its questions are labelled again", path, state)
            set_aside(path)
            del self._digests[shard]
            self.complete = False
        return rows

    def _rows_of(self, shard: str) -> Iterator[dict[str, Any]]:
        opened = self._opened(shard)
        names, metadata = set(opened.keys()), opened.metadata() or {}
        if self.official:
            own = f"lacks {SETTINGS}, which was written with {shard}; restore it"
            require(self._key, self.path, QUESTIONS not in metadata, own)
            rows = _official_rows(opened, names, shard)
        else:
            rows = json.loads(metadata[QUESTIONS])
        for row in rows:
            if row["kept"]:
                own_names = [f"{row['index']}.{name}" for name in TENSORS]
                if missing := [name for name in own_names if name not in names]:
                    raise self._misfit(row, f"lacks the tensor {missing[0]}")
                ids, latents, labels, corrects = (tuple(opened.get_slice(name).get_shape()) for name in own_names)
                if self.official and len(latents) == 3 and (len(ids) == 1 or ids[:1] == (1,)):
                    ids = (latents[0], ids[-1])
                if wrong := _wrong_shapes([ids, latents, labels, corrects], self.width):
                    raise self._misfit(row, wrong)
            yield row

    def _misfit(self, row: Mapping[str, Any], wrong: str) -> UsageError:
        return bad_value(self._key, self.path / row["shard"], f"question {row['question_id']}: {wrong}")

    def _open(self, shard: str) -> Any:
        from safetensors import SafetensorError, safe_open

        try:
            return safe_open(self.path / shard, framework="np")
        except (SafetensorError, OSError) as error:
            raise bad_value(self._key, self.path / shard, f"cut off, or not safetensors ({error})") from error

    def _read_record(self) -> dict[str, Any]:
        path, record = self.path / SETTINGS, read_record(self.path / SETTINGS) or {}
        another = "is damaged, or not the record of annotations; restore it, or annotate into another folder"
        require(self._key, path, "settings" in record, another)
        found = record["settings"].get("format")
        another = f"format {found}, written by another version: annotate into another folder"
        require(self._key, path, found == FORMAT, another)
        return record

    def _write_record(self) -> None:
        names = ("settings", "complete", "rows", "task_path")
        record = {name: getattr(self, name) for name in names}
        write_record(self.path / SETTINGS, record | {"shards": self._digests})

    def _require_same(self, what: str, name: str, there: object, now: object) -> None:
        if there != now:
            raise UsageError(
                f"{self._key}={self.path}: {what}; choose another folder or remove it\n"
                f"{name}: {json.dumps(there)} there, {json.dumps(now)} now"
            )

    def _require_same_questions(self) -> None:
        ids = list(self._answers)
        for row in self._rows.values():
            question, index = row["question_id"], row["index"]
            if index < len(ids):
                self._require_same("was made with other questions", f"question {index + 1}", question, ids[index])
            if question in self._answers:
                what = f"question {question} was labelled by another gold answer"
                self._require_same(what, "answer", row["answer"], self._answers[question])


def _official_rows(opened: Any, names: Set[str], shard: str) -> Iterator[dict[str, Any]]:
    for name in sorted(names):
        index, _, part = name.rpartition(".")
        if part != "input_ids" or not index.isdigit():
            continue
        kept = {f"{index}.estimations", f"{index}.corrects"} <= names
        corrects = opened.get_tensor(f"{index}.corrects") if kept else np.zeros(0)
        yield {
            "question_id": index, "index": int(index), "shard": shard, "kept": kept,
            "rollouts": corrects.size, "reason": None if kept else "unknown",
            "share_correct": float(corrects.mean()) if kept else None,
        }  # fmt: skip


def _without_path(settings: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
    """Settings without the path of the task's file, and that path: the questions themselves say which they are."""
    own: dict[str, Any] = json.loads(json.dumps({"format": FORMAT, **settings}))
    return own, (own.get("task") or {}).pop("path", None)


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
