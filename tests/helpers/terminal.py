"""What a program writes on a terminal of some width."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading

RESIZE = """
import fcntl, struct, sys, termios
def resize(columns):
    fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
"""
STYLE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def on_terminal(code: str, *arguments: str, encoding: str = "utf-8", columns: int = 80) -> str:
    """What Python code writes on a pseudo-terminal, styles included; it may call `resize(columns)`."""
    reading, writing = pty.openpty()
    fcntl.ioctl(writing, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    written = bytearray()

    def read() -> None:
        while True:
            try:
                piece = os.read(reading, 1 << 16)
            except OSError:  # the other end was closed
                return
            if not piece:
                return
            written.extend(piece)

    reader = threading.Thread(target=read)
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")}
    environment |= {"PYTHONIOENCODING": encoding, "TERM": "xterm-256color"}
    line = [sys.executable, "-c", RESIZE + code, *arguments]
    process = subprocess.Popen(line, stdin=writing, stdout=writing, stderr=writing, env=environment)
    os.close(writing)
    reader.start()
    code_of_exit = process.wait()
    reader.join()
    os.close(reading)
    text = written.decode(encoding).replace("\r\n", "\n")
    assert code_of_exit == 0, text[-2000:]
    return text
