"""Calls of third-party code in a process that can be killed.

The first call starts the process, which serves all runs of the command. It imports the code once and answers calls in
a fork, so a call that must be killed costs only milliseconds.

Time limits are in processor seconds, so that a busy machine does not change results; a slow processor may still give up
a call that a fast one answers. Calls that were given up are logged and counted
(`Guard.given_up`), and stay given up for the rest of the run.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import logging
import os
import queue
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any, BinaryIO

from latent_tts.errors import RunError

log = logging.getLogger(__name__)

SECONDS = 5.0  # limit of one call
SECONDS_PER_RUN = 60.0  # limit of all calls of a run; each call adds SECONDS_PER_CALL
SECONDS_PER_CALL = 0.1
MAX_NAMED = 3  # calls given up that are logged one by one
MEMORY = 4 << 30  # bytes of address space
MAX_KEPT = 1 << 17  # results in memory
START_SECONDS = 120.0  # limit of the start, which imports sympy or transformers
PATIENCE, MIN_PATIENCE = 20.0, 30.0  # wall-clock limit: the larger of PATIENCE * limit and these seconds
LOST = {"lost": True}
START = (
    "import json, sys; path, module = json.loads(sys.argv[1]); sys.path[:] = path; "
    "from latent_tts.text import guard; guard.serve(module)"
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
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[Guard], tuple[str]]:
        return Guard, (self.module,)  # a copy starts counting again

    def call(self, function: str, *texts: str, otherwise: Any) -> Any:
        """The result of a function of the module; `otherwise` if it takes too long or crashes its process.

        Raises:
            RunError: the process cannot be started.
        """
        key = (function, *texts)
        with self._lock:
            if key in self.given_up:
                return otherwise
            found, result = _process_of(self.module).known(key)
            if found:
                return result
            self._allowed += SECONDS_PER_CALL
            limit = max(0.0, min(SECONDS, self._allowed - self.seconds))
            if limit > 0:
                reply, seconds = _process_of(self.module).ask(key, limit)
                self.seconds += seconds
                if "result" in reply:
                    return reply["result"]
            self.given_up.add(key)
        if len(self.given_up) <= MAX_NAMED:
            log.warning(
                "%s: no result within %.3g s; counted as unreadable or wrong%s",
                " and ".join(texts), limit, "; further ones are not logged" if len(self.given_up) == MAX_NAMED else "",
            )  # fmt: skip
        return otherwise


def call_once(module: str, function: str, *texts: str, limit: float) -> Any:
    """The result of a function of a module in its process; a call that has no result is an error of the caller.

    Raises:
        TimeoutError: it takes more than `limit` seconds, or crashes its process.
        RunError: the process cannot be started.
    """
    process, key = _process_of(module), (function, *texts)
    found, result = process.known(key)
    if found:
        return result
    reply, _ = process.ask(key, limit)
    if "result" not in reply:
        raise TimeoutError
    return reply["result"]


class _Process:
    """The process of a module, and the results of its functions so far."""

    def __init__(self, module: str) -> None:
        self.module = module
        self.owner = os.getpid()
        self._results: dict[tuple[str, ...], Any] = {}
        self._lock = threading.Lock()
        self._stopped = False
        self._running: subprocess.Popen[bytes] | None = None
        self._replies: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def known(self, key: tuple[str, ...]) -> tuple[bool, Any]:
        """Whether a call was answered before, and its result."""
        return key in self._results, self._results.get(key)

    def ask(self, key: tuple[str, ...], limit: float) -> tuple[dict[str, Any], float]:
        """The reply to a call (`LOST` if there is none), and its seconds, including those of a restart."""
        with self._lock:
            running, extra = self._running, 0.0
            if running is None or running.poll() is not None:
                started, again = time.perf_counter(), running is not None or self._stopped
                running = self._start()
                extra = time.perf_counter() - started if again else 0.0
            while not self._replies.empty():  # left over from a process that was killed
                self._replies.get()
            request = json.dumps({"call": key, "limit": limit}) + "\n"
            try:
                assert running.stdin is not None
                running.stdin.write(request.encode())
                running.stdin.flush()
                line = self._replies.get(timeout=max(MIN_PATIENCE, PATIENCE * limit))
            except (OSError, queue.Empty):
                line = b""
            if not line:  # the process hangs or was killed
                self.stop()
                return LOST, limit + extra
            reply = json.loads(line)
            if "result" in reply:
                if len(self._results) >= MAX_KEPT:
                    self._results.clear()
                self._results[key] = reply["result"]
            return reply, min(limit, reply.get("seconds", limit)) + extra

    def _start(self) -> subprocess.Popen[bytes]:
        self.stop()
        replies = self._replies = queue.SimpleQueue()
        with tempfile.TemporaryFile() as errors:
            running = subprocess.Popen(
                [sys.executable, "-c", START, json.dumps([sys.path, self.module])],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                env={**os.environ, "PYTHONHASHSEED": "0"},  # results of sympy depend on the order of sets
                start_new_session=True,
            )  # fmt: skip
            self._running = running
            assert running.stdout is not None
            threading.Thread(target=_read, args=(running.stdout, replies), daemon=True).start()
            try:
                ready = replies.get(timeout=START_SECONDS)
            except queue.Empty:
                ready = b""
            if not ready:
                self.stop()
                errors.seek(0)
                reason = errors.read().decode(errors="replace").strip().splitlines() or ["no reply"]
                raise RunError(f"cannot start the process for {self.module}: {reason[-1]}")
        return running

    def stop(self) -> None:
        """Kill the process, if there is one, and its forks."""
        running, self._running = self._running, None
        if running is None or os.getpid() != self.owner:
            return
        self._stopped = True
        with contextlib.suppress(OSError):
            os.killpg(running.pid, signal.SIGKILL)
        running.wait()
        assert running.stdin is not None
        with contextlib.suppress(OSError):
            running.stdin.close()


_processes: dict[str, _Process] = {}


def _process_of(module: str) -> _Process:
    found = _processes.get(module)
    if found is None or found.owner != os.getpid():  # a fork of this process needs its own pipes
        found = _processes[module] = _Process(module)
        atexit.register(found.stop)
    return found


def _read(pipe: BinaryIO, replies: queue.SimpleQueue[bytes]) -> None:
    """Put the lines of a pipe into a queue, and an empty line at its end."""
    with pipe:
        for line in pipe:
            replies.put(line)
    replies.put(b"")


def serve(module: str) -> None:
    """Answer calls from stdin on stdout until stdin ends; the main function of the process."""
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # stdout is only for replies
    functions = importlib.import_module(module)
    functions.warm_up()
    with contextlib.suppress(ValueError, OSError):  # not every system has such limits
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY if hard < 0 else min(MEMORY, hard), hard))
    replies.write(b"ready\n")
    requests = os.fdopen(0, "rb", buffering=0)  # unbuffered, so that the next fork reads the next request
    while True:
        child = os.fork()
        if child == 0:
            _answer(functions, requests, replies)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0:
            return
        replies.write(json.dumps(LOST).encode() + b"\n")


def _answer(functions: Any, requests: Any, replies: Any) -> None:
    while line := requests.readline():
        request = json.loads(line)
        function, *texts = request["call"]
        started = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, request["limit"])  # the signal kills the fork even inside C code
        result = getattr(functions, function)(*texts)
        signal.setitimer(signal.ITIMER_PROF, 0)
        reply = {"result": result, "seconds": time.process_time() - started}
        replies.write(json.dumps(reply).encode() + b"\n")
