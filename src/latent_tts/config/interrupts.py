"""Ctrl-C while modules are imported: code there may drop the exception."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Sequence
from types import FrameType, ModuleType


class Interrupts:
    """Raises the exception of a Ctrl-C once more at the next import, if the program goes on.

    Imports run callbacks of weak references, whose exceptions Python drops, and code of packages that catches any
    exception. An object of this class is the first of the finders of modules (`sys.meta_path`).

    Attributes:
        pending: whether Ctrl-C was pressed and no import has followed.
    """

    pending = False

    def install(self) -> None:
        """Handle Ctrl-C, unless it is ignored, as in background jobs of a shell."""
        if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            return
        signal.signal(signal.SIGINT, self._interrupt)
        sys.meta_path.insert(0, self)
        sys.unraisablehook = self._report_dropped

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self.pending = True
        raise KeyboardInterrupt

    def _report_dropped(self, dropped: sys.UnraisableHookArgs) -> None:
        if not issubclass(dropped.exc_type, KeyboardInterrupt):
            sys.__unraisablehook__(dropped)

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        """Find nothing; the next finder is asked.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed before, and nothing handles it now.
        """
        is_handled = isinstance(sys.exc_info()[1], KeyboardInterrupt)
        if self.pending and not is_handled and threading.current_thread() is threading.main_thread():
            self.pending = False
            raise KeyboardInterrupt


INTERRUPTS = Interrupts()
