"""Calls of third-party code in a process that can be killed.

The first call starts the process, which serves all runs of the command. It imports the code once and answers calls in
a forked child, so that killing a call costs only milliseconds.

Time limits are in processor seconds, so that a busy machine does not change results; a slow processor may still give up
a call that a fast one answers. Calls that were given up are counted (`Guard.given_up`),
the first few are logged, and all stay given up for the rest of the run.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from multiprocessing.connection import Connection, Pipe
from typing import Any

from latent_tts.errors import RunError

log = logging.getLogger(__name__)

SECONDS = 5.0  # limit of one call
SECONDS_PER_RUN = 60.0  # limit of all calls of a run; each call adds SECONDS_PER_CALL
SECONDS_PER_CALL = 0.1
MAX_NAMED = 3  # calls given up that are logged one by one
MEMORY = 4 << 30  # bytes of address space
START_SECONDS = 120.0  # limit of the start, which imports sympy or transformers
PATIENCE, MIN_PATIENCE = 20.0, 30.0  # wall-clock limit: max(PATIENCE * limit, MIN_PATIENCE) seconds
LOST = {"lost": True}
START = (
    "import json, sys; sys.path[:], *arguments = json.loads(sys.argv[1]); "
    "from latent_tts.text import guard; guard.serve(*arguments)"
)


class Guard:
    """The calls of a run, with a time limit for each and for all together.

    Attributes:
        module: the module whose functions are called; they take texts and return JSON-able values.
        given_up: the calls that had no result within their limit.
        seconds: time of all calls so far.
    """

    def __init__(self, module: str) -> None:
        self.module = module
        self.given_up: set[tuple[str, ...]] = set()
        self.seconds = 0.0
        self._allowed = SECONDS_PER_RUN

    def call(self, function: str, *texts: str, otherwise: Any) -> Any:
        """The result of a function of the module; `otherwise` if it takes too long or crashes its process.

        Raises:
            RunError: the process cannot be started.
        """
        key, process = (function, *texts), process_of(self.module)
        if key in self.given_up:
            return otherwise
        self._allowed += SECONDS_PER_CALL * (key not in process.results)
        limit = max(0.0, min(SECONDS, self._allowed - self.seconds))
        reply = process.ask(key, limit)
        self.seconds += reply.get("seconds", limit)
        if "result" in reply:
            return reply["result"]
        self.given_up.add(key)
        if len(self.given_up) <= MAX_NAMED:
            log.warning(
                "%s: no result within %.3g s; counted as unreadable or wrong%s",
                " and ".join(texts), limit, "; further ones are not logged" if len(self.given_up) == MAX_NAMED else "",
            )  # fmt: skip
        return otherwise


class _Process:
    """The process of a module.

    Attributes:
        results: of the calls so far.
    """

    def __init__(self, module: str) -> None:
        self.module = module
        self.owner = os.getpid()
        self.results: dict[tuple[str, ...], Any] = {}
        self._lock = threading.Lock()
        self._running: subprocess.Popen[bytes] | None = None

    def ask(self, key: tuple[str, ...], limit: float) -> dict[str, Any]:
        """The reply to a call: its `result` and `seconds`; `LOST` if there is none within `limit` seconds.

        Raises:
            RunError: the process cannot be started.
        """
        with self._lock:
            if key in self.results:
                return {"result": self.results[key], "seconds": 0.0}
            if limit <= 0:
                return LOST
            if self._running is None or self._running.poll() is not None:
                self._start()
            try:
                self._pipe.send_bytes(json.dumps({"call": key, "limit": limit}).encode())
                if not self._pipe.poll(max(MIN_PATIENCE, PATIENCE * limit)):
                    raise TimeoutError
                reply = json.loads(self._pipe.recv_bytes())
            except (OSError, EOFError):  # the process hangs or was killed
                self.stop()
                return LOST
            if "result" in reply:
                self.results[key] = reply["result"]
            return reply

    def _start(self) -> None:
        self.stop()
        self._pipe, other_end = Pipe()
        with tempfile.TemporaryFile() as output:
            self._running = subprocess.Popen(
                [sys.executable, "-c", START, json.dumps([sys.path, self.module, other_end.fileno()])],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, pass_fds=[other_end.fileno()],
                env={**os.environ, "PYTHONHASHSEED": "0"},  # results of sympy depend on the order of sets
                start_new_session=True,
            )  # fmt: skip
            other_end.close()
            try:
                ready = self._pipe.poll(START_SECONDS) and self._pipe.recv_bytes()
            except EOFError:
                ready = None
            if not ready:
                self.stop()
                output.seek(0)
                reason = output.read().decode(errors="replace").strip().splitlines() or ["no reply"]
                raise RunError(f"cannot start the process for {self.module}: {reason[-1]}")

    def stop(self) -> None:
        """Kill the process, if there is one, and its forks."""
        if self._running is None or os.getpid() != self.owner:
            return
        with contextlib.suppress(OSError):
            os.killpg(self._running.pid, signal.SIGKILL)
        self._running.wait()
        self._running = None
        self._pipe.close()


_processes: dict[str, _Process] = {}


def process_of(module: str) -> _Process:
    """The process in which the functions of a module run; it starts with the first call."""
    found = _processes.get(module)
    if found is None or found.owner != os.getpid():  # a fork of this process needs its own pipe
        found = _processes[module] = _Process(module)
        atexit.register(found.stop)
    return found


def serve(module: str, descriptor: int) -> None:
    """Answer calls from a pipe until its other end is closed; the main function of the process."""
    pipe = Connection(descriptor)
    functions = importlib.import_module(module)
    functions.warm_up()
    with contextlib.suppress(ValueError, OSError):  # not every system has such limits
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY if hard < 0 else min(MEMORY, hard), hard))
    pipe.send_bytes(b"ready")
    while (child := os.fork()) and os.waitpid(child, 0)[1] != 0:
        pipe.send_bytes(json.dumps(LOST).encode())
    while child == 0:  # the fork, until it is killed
        try:
            request = json.loads(pipe.recv_bytes())
        except EOFError:
            os._exit(0)
        function, *texts = request["call"]
        started = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, request["limit"])  # the signal kills the fork even inside C code
        result = getattr(functions, function)(*texts)
        signal.setitimer(signal.ITIMER_PROF, 0)
        reply = {"result": result, "seconds": time.process_time() - started}
        pipe.send_bytes(json.dumps(reply).encode())
