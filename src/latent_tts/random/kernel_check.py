"""Whether a Triton kernel may be used: it compiles, and gives what torch's operators give."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from functools import cache
from importlib.util import find_spec

log = logging.getLogger(__name__)


@cache
def is_usable(kernel: str, agrees: Callable[..., bool], *where: Hashable) -> bool:
    """Try a kernel, once per place, since it takes a while; where it fails or differs that is said.

    Args:
        kernel: what it does, for people.
        agrees: runs it beside the operators, given `where`; it may raise anything.
        *where: the device and so on.
    """
    why = "its values differ from those of torch"
    try:
        if find_spec("triton") is None:
            why = "it is not installed"
        elif agrees(*where):
            return True
    except Exception as error:  # a compiler, a driver or a missing C compiler may raise anything
        why = f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"
    shown = ", ".join(map(str, where))
    log.warning("Triton's %s is not used on %s (%s); torch's operators are slower", kernel, shown, why)
    return False
