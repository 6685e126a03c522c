"""`ltts convert SRC DST`: rewrite a checkpoint of a training code, or a pickle, as a folder that `ltts run` reads."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from latent_tts.checkpoint.convert.conversion import convert_checkpoint
from latent_tts.errors import check_fields


def main(cfg: DictConfig) -> None:
    """Convert and print the new folder.

    Raises:
        UsageError: there are no weights, a config or tokenizer is missing, or the new folder is in use.
    """
    check_fields("", cfg, lora_alpha="a positive number", latents="an integer, 0 or more, or null")
    dst = Path(cfg.dst).expanduser()
    existed = dst.exists()
    try:
        convert_checkpoint(
            Path(cfg.src).expanduser(),
            dst,
            tokenizer=Path(cfg.tokenizer).expanduser() if cfg.tokenizer else None,
            config=cfg.config,
            base=cfg.base,
            lora_alpha=cfg.lora_alpha,
            latents=cfg.latents,
        )
    except KeyboardInterrupt:
        if dst.exists() and not existed:
            raise KeyboardInterrupt(f"remove {dst}, which is not complete, and re-run the command") from None
        raise
    print(dst)
