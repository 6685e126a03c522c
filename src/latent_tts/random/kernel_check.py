"""Whether a Triton kernel may be used: it compiles, and gives what torch's operators give."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib.util import find_spec

log = logging.getLogger(__name__)


def is_usable(kernel: str, where: str, agrees: Callable[[], bool]) -> bool:
    """Try a kernel; where it fails or differs that is said. Ask once, since it takes a while.

    Args:
        kernel: what it does, for people.
        where: the device and so on.
        agrees: runs it beside the operators; it may raise anything.
    """
    if find_spec("triton") is None:
        return False
    why = "its values differ from those of torch"
    try:
        if agrees():
            return True
    except Exception as error:  # a compiler, a driver or a missing C compiler may raise anything
        why = f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"
    log.warning("Triton's %s is not used on %s (%s); torch's operators are slower", kernel, where, why)
    return False
