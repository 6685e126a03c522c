"""What a result depends on besides its config: versions, commit, machine."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path


@cache
def versions(*, quantized: bool) -> Mapping[str, str]:
    """Versions of what a result depends on, and the commit where there is one, as they were at the first call."""
    optional = {"math-verify": find_spec("math_verify") is not None, "torchao": quantized}
    names = [
        "latent-tts", "torch", "transformers", "tokenizers", "numpy", "pandas", "hydra-core",
        *(name for name, is_used in optional.items() if is_used),
    ]  # fmt: skip
    return {
        "python": platform.python_version(),
        # a checkout can run without being installed
        **{name: next((each.version for each in distributions(name=name)), "not installed") for name in names},
        **commit(),
    }


def machine() -> dict[str, str]:
    """The system, the processor, and the GPUs with their libraries where torch has been in use and found some."""
    found = {"system": platform.platform(), "processor": platform.processor() or platform.machine()}
    if "torch" in sys.modules:
        from latent_tts.engine.device import gpu_versions

        found |= gpu_versions()
    return found


def commit() -> dict[str, str]:
    """The commit of a source checkout (`-dirty` if it has changes); nothing for an installed package."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return {}
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=root, capture_output=True, text=True, check=False
    )
    return {"commit": done.stdout.strip()} if done.returncode == 0 else {}
