"""Draft heads as files: what `ltts train-draft` writes and `schedule.guess=draft` reads. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from latent_tts.errors import bad_value, require
from latent_tts.types import file_digest

KEY = "schedule.draft"
RECORD = "latent_tts.draft"  # in the file's metadata


@dataclass(frozen=True)
class DraftRecord:
    """What a draft head's file says of itself.

    Attributes:
        reasoner: digest of the reasoner whose latents it predicts.
        latents: T of that reasoner.
        width: D.
    """

    reasoner: str
    latents: int
    width: int

    def flops(self, prompt: int) -> float:
        """Operations of a prediction after a prompt of so many tokens."""
        predicted, read = self.latents - 1, prompt + 1
        products = 15 * predicted + 2 * read  # two attentions, MLP and output; keys and values of what is read
        return 2 * products * self.width**2 + 4 * predicted * (predicted + read) * self.width

    @property
    def metadata(self) -> dict[str, str]:
        """The file's metadata."""
        return {RECORD: json.dumps(asdict(self))}


@dataclass(frozen=True)
class DraftFile:
    """A draft head's file, checked.

    Attributes:
        path: where it is.
        digest: of its bytes.
        record: what it says of itself.
    """

    path: Path
    digest: str
    record: DraftRecord


def find_draft(path: str, reasoner: str, latents: int) -> DraftFile:
    """The draft head at a path.

    Args:
        path: of its file.
        reasoner: digest of the model whose latents it is to predict.
        latents: T of that model.

    Raises:
        UsageError: there is none, or it is another model's.
    """
    file = Path(path).expanduser()
    try:
        with safe_open(file, framework="np") as opened:
            content = json.loads((opened.metadata() or {})[RECORD])
        record = DraftRecord(str(content["reasoner"]), int(content["latents"]), int(content["width"]))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        why = "no file" if not file.is_file() else f"no draft head ({error})"
        raise bad_value(KEY, path, f"{why}; ltts train-draft writes one") from error
    require(KEY, path, record.reasoner == reasoner, "was trained for other weights than those of the model")
    require(KEY, path, record.latents == latents, f"was trained for model.latents={record.latents}, not {latents}")
    file = file.resolve()  # a worker may have another working directory
    return DraftFile(file, file_digest(file), record)
