"""Synthetic annotation folders: latents of right and wrong rollouts are shifted in opposite directions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from latent_tts.model.coconut import Coconut
from latent_tts.results.annotations import AnnotationFolder
from latent_tts.types import LabelledQuestion, UnmixedQuestion, written_ids

N, T = 4, 3


def adapter_of(checkpoint: Path) -> Coconut:
    return Coconut(name="tiny", checkpoint=str(checkpoint), latents=T, recommended={})


def width_of(adapter: Coconut) -> int:
    return adapter.config.get("n_embd") or adapter.config["hidden_size"]


def settings_of(adapter: Coconut) -> dict[str, Any]:
    return {
        "reasoner": adapter.digest,
        "reasoner_name": adapter.name,
        "sampler": {"name": "dropout", "rate": 0.1},
        "n": N,
        "latents": T,
        "width": width_of(adapter),
        "latent_id": adapter.latent_id,
    }


def entry(index: int, adapter: Coconut, seed: int = 0, n: int = N, steps: list[int] | None = None) -> LabelledQuestion:
    """A question with right and wrong rollouts, whose labels approach the outcome step by step."""
    random = np.random.default_rng([seed, index])
    width = width_of(adapter)
    correct_N = np.arange(n) < random.integers(1, n)
    random.shuffle(correct_N)
    direction_D = np.where(np.arange(width) % 2, 1.0, -1.0)
    sign_N = np.where(correct_N, 1.0, -1.0)
    latents_NTD = random.normal(size=(n, T, width)) + 0.7 * sign_N[:, None, None] * direction_D
    labels_NT = 0.5 + 0.5 * sign_N[:, None] * np.arange(1, T + 1) / T
    for rollout, count in enumerate(steps or []):
        latents_NTD[rollout, count:], labels_NT[rollout, count:] = 0.0, np.nan
    prompt = [*(5 + random.integers(0, 90, size=4 + index % 5)).tolist(), adapter.start_id]
    ids_NL = written_ids(prompt, steps or [T] * n, adapter.latent_id, adapter.thinking_end_ids, adapter.eos_id)
    return LabelledQuestion(
        f"q{index}", index, ids_NL, latents_NTD.astype(np.float32), labels_NT.astype(np.float32), correct_N
    )


def write(path: Path, adapter: Coconut, questions: int, seed: int = 0, **changed: Any) -> Path:
    """A finished folder: `questions` usable questions in shards of 8, one with all right and one with all wrong."""
    folder = AnnotationFolder(path, settings_of(adapter) | changed)
    entries = [entry(index, adapter, seed) for index in range(questions)]
    for start in range(0, questions, 8):
        folder.add(entries[start : start + 8])
    folder.add(
        [UnmixedQuestion("right", questions, "all_correct", N), UnmixedQuestion("wrong", questions + 1, "all_wrong", N)]
    )
    folder.finish()
    return path
