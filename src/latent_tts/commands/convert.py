"""`ltts convert SRC DST`: read a pickled checkpoint once (weights only), write it as safetensors."""

from __future__ import annotations

import shutil
from pathlib import Path

from omegaconf import DictConfig

from latent_tts import checkpoint
from latent_tts.errors import UsageError, bad_value

COPIED = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def main(cfg: DictConfig) -> None:
    """Convert and print the new folder.

    Raises:
        UsageError: there is no pickle, it holds more than tensors, or the new folder is in use.
    """
    src, dst = Path(cfg.src).expanduser(), Path(cfg.dst).expanduser()
    pickle = find_pickle(src)
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise bad_value("dst", dst, "a new or empty folder")
    folder = pickle.parent
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise bad_value("src", src, f"{folder} lacks {name}, which a checkpoint folder needs beside the weights")
    checkpoint.pickle_to_safetensors(pickle, dst)
    for name in COPIED:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, dst / name)
    print(dst)


def find_pickle(src: Path) -> Path:
    """The pickle at a path, or the one in a folder."""
    if src.is_file():
        return src
    if not src.is_dir():
        raise bad_value("src", src, "no such file or folder")
    found = sorted({path for pattern in checkpoint.PICKLES for path in src.glob(pattern)})
    if len(found) != 1:
        raise UsageError(f"src={src}: {len(found)} pickles ({', '.join(p.name for p in found[:4])}); name one file")
    return found[0]
