"""What is written on a terminal of some width."""

import fcntl
import os
import pty
import re
import struct
import sys
import termios
import threading
from collections.abc import Callable

import pytest

from latent_tts.results import report

STYLE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
STANDARD = (0, 1, 2)  # the descriptors that rich asks for the width


def on_terminal(write: Callable[[Callable[[int], None]], None], *, encoding: str = "utf-8", columns: int = 80) -> str:
    """What a function writes to standard output and error, as they stand on a pseudo-terminal, styles included.

    Args:
        write: the function; it gets one that changes the terminal's columns.
        encoding: of both streams.
        columns: of the terminal at first.
    """
    reading, writing = pty.openpty()
    written = bytearray()

    def resize(columns: int) -> None:
        fcntl.ioctl(writing, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))

    def read() -> None:
        while True:
            try:
                piece = os.read(reading, 1 << 16)
            except OSError:  # the other end was closed
                return
            written.extend(piece)

    resize(columns)
    reader = threading.Thread(target=read)
    saved = [os.dup(descriptor) for descriptor in STANDARD]
    reader.start()
    report.stderr_console.cache_clear()  # it looks at its stream once
    try:
        with pytest.MonkeyPatch.context() as patch, open(writing, "w", encoding=encoding, closefd=False) as stream:
            for descriptor in STANDARD:
                os.dup2(writing, descriptor)
            patch.setattr(sys, "stdout", stream)
            patch.setattr(sys, "stderr", stream)
            patch.setenv("TERM", "xterm-256color")
            for name in ("COLUMNS", "NO_COLOR"):
                patch.delenv(name, raising=False)
            write(resize)
    finally:
        report.stderr_console.cache_clear()
        for descriptor, before in zip(STANDARD, saved, strict=True):
            os.dup2(before, descriptor)
            os.close(before)
        os.close(writing)
        reader.join()
        os.close(reading)
    return written.decode(encoding).replace("\r\n", "\n")
