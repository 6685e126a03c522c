"""The training data of LatentRM: the questions of an annotation folder, and batches of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from latent_tts.checkpoint.adapter import CheckpointAdapter
from latent_tts.engine.cost import Shape
from latent_tts.errors import UsageError, require
from latent_tts.results.annotations import AnnotationFolder
from latent_tts.results.files import settings_digest

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)


class MixedQuestions:
    """The questions of an annotation folder with both right and wrong rollouts, read from disk one by one.

    Attributes:
        unmixed: numbers of dropped questions, by `all_correct` and `all_wrong`; None for official shards, which do not
            contain them.
        chance: mean share of right rollouts, the selection accuracy of a random choice.
    """

    def __init__(self, folder: AnnotationFolder, adapter: CheckpointAdapter, latent_id: int, key: str) -> None:
        """Check the shapes of every shard and select the questions.

        Raises:
            UsageError: a shard does not fit, no question has both right and wrong rollouts, or a prompt is too long.
        """
        rows = folder.index()
        self.rows = [row for row in rows if row["kept"] and 0 < row["share_correct"] < 1]
        shares = [row["share_correct"] for row in rows]
        self.unmixed = None if folder.official else {"all_correct": shares.count(1.0), "all_wrong": shares.count(0.0)}
        require(
            key,
            folder.path,
            max((row["rollouts"] for row in rows), default=2) != 1,
            "has one rollout per question; a LatentRM learns by comparing several (annotate with n=2 or more)",
        )
        require(
            key, folder.path, bool(self.rows), f"none of its {len(rows)} questions has both right and wrong rollouts"
        )
        self.folder, self.latent_id = folder, latent_id
        # official texts are padded on the left; in ours, a prompt may begin with the end token
        self.pad_id = adapter.eos_id if folder.official else None
        self.chance = float(np.mean([row["share_correct"] for row in self.rows]))
        self.rollouts = max(row["rollouts"] for row in self.rows)
        self.positions = adapter.positions
        _ = self[0]

    def accuracy_of_all(self, accuracy: float) -> float | None:
        """Selection accuracy including questions whose rollouts are all right or all wrong; None if unknown."""
        if self.unmixed is None:
            return None
        everything = len(self) + sum(self.unmixed.values())
        return (accuracy * len(self) + self.unmixed["all_correct"]) / everything

    @property
    def identity(self) -> str:
        """A digest of the folder's settings and the questions."""
        return settings_digest({"settings": self.folder.settings, "questions": self.rows})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> dict[str, np.ndarray]:
        """Prompt ids, latents (N, T, D), labels (N, T) and outcomes (N) of one question."""
        entry = self.folder.entry(self.rows[place])
        prompt = entry.prompt_ids(self.latent_id, self.pad_id)
        if len(prompt) + entry.latents_NTD.shape[1] > self.positions:
            raise UsageError(
                f"{self.folder.path}: question {entry.question_id} has {len(prompt)} prompt tokens and "
                f"{entry.latents_NTD.shape[1]} latents; the reasoner has {self.positions} positions"
            )
        return {
            "prompt": np.array(prompt),
            "latents_NTD": entry.latents_NTD,
            "labels_NT": entry.labels_NT,
            "correct_N": entry.corrects_N,
        }


def open_questions(path: Path, adapter: CheckpointAdapter, named: Mapping[str, Any], key: str) -> MixedQuestions:
    """Open the usable questions of an annotation folder; logs how many were dropped.

    Args:
        path: the folder.
        adapter: that of the reasoner for which LatentRM is trained.
        named: what its rollouts depend on besides the weights, by the names of the model's options.
        key: config key of the folder, for errors.

    Raises:
        UsageError: the folder belongs to another reasoner, a shard is not usable, or no question has both right and
            wrong rollouts.
    """
    folder = AnnotationFolder(path, key=key)
    found = folder.settings.get("reasoner")
    if folder.official:
        log.warning("%s=%s: official shards do not name their reasoner, so it is not checked", key, path)
    else:
        of, given = f"{folder.settings.get('reasoner_name')} ({found})", f"{adapter.name} ({adapter.digest})"
        require(key, path, found == adapter.digest, f"annotated with the reasoner {of}; model.checkpoint is {given}")
    made = folder.settings | folder.settings.get("fields", {})
    for name in (name for name in named if name in made):
        wrong = f"its rollouts were made with model.{name}={made[name]}, not {named[name]}; name it"
        require(key, path, made[name] == named[name], wrong)
    if not folder.complete:
        log.warning(
            "%s=%s: incomplete, because `ltts annotate` has not finished; the finished questions are used", key, path
        )
    latent_id = folder.settings.get("latent_id", getattr(adapter, "latent_id", None))
    require(key, path, latent_id is not None, f"neither its settings nor model={adapter.name} has a latent_id")
    folder.width = Shape.from_config(adapter.sizes).width
    mixed = MixedQuestions(folder, adapter, latent_id, key)
    dropped = ""
    if mixed.unmixed is not None:
        counts = "{all_correct} with all right, {all_wrong} with all wrong".format_map(mixed.unmixed)
        dropped = f" with right and wrong rollouts; dropped: {counts}"
    log.info("%s: %d questions%s", key, len(mixed), dropped)
    return mixed


def collate(items: Sequence[Mapping[str, np.ndarray]]) -> dict[str, Tensor]:
    """Stack questions into a batch, with prompts padded on the right (imports torch).

    Rollouts and steps that a question does not have get label NaN, latent 0 and outcome False.

    Args:
        items: items of `MixedQuestions`.
    """
    import torch

    def stacked(name: str, padding: float = 0) -> Tensor:
        arrays = [item[name] for item in items]
        shape = np.max([array.shape for array in arrays], axis=0)
        rooms = [list(zip(np.zeros_like(shape), shape - array.shape, strict=True)) for array in arrays]
        padded = [np.pad(array, room, constant_values=padding) for array, room in zip(arrays, rooms, strict=True)]
        return torch.from_numpy(np.stack(padded))

    return {
        "prompt_QL": stacked("prompt"),
        "lengths_Q": torch.tensor([len(item["prompt"]) for item in items]),
        "latents_QNTD": stacked("latents_NTD"),
        "labels_QNT": stacked("labels_NT", np.nan),
        "correct_QN": stacked("correct_N"),
    }
