"""`executor=ray`: workers in processes of their own, on this machine or on those of a Ray cluster."""

from __future__ import annotations

import atexit
import hashlib
import logging
import math
import os
import pickle
import re
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from logging.handlers import BufferingHandler
from typing import Any, ClassVar

import psutil

from latent_tts.errors import LatentTTSError, RunError, bad_value, check_fields, reason, require
from latent_tts.executor import Finished, Work, Worker

log = logging.getLogger(__name__)
CORES_PER_WORKER, MIN_WORKERS = 4, 2
SECONDS_TO_ANSWER = 3.0  # of a cluster's address
SECONDS_TO_PLACE = 300  # the first worker; its process may have to load a slow disk's libraries
SECONDS_FOR_OTHERS = 60  # at least; otherwise as long again as the first one took
SECONDS_TO_RESTART = 120  # some worker, if all have died, on its machine or on another one with room
RAY_STEPS, TINY = 10_000, 1e-6  # Ray counts resources in ten-thousandths
MIN_STORE_BYTES, MAX_STORE_BYTES = 1 << 27, 1 << 31  # of what workers have sent and the driver has not yet written
SHARDS = ("measured", "fixed")
SECONDS_TO_END = 5.0  # without Ray's node
# A Ray of this machine alone listens on its loopback address; the first variable says so on Linux, too.
LOOPBACK_ALONE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}
# stdout is the command's; what Ray prints there is discarded, and so are tracebacks of a second worker that fails
SILENT = {"RAY_DEDUP_LOGS_SKIP_REGEX": ".", "RAY_IGNORE_UNHANDLED_ERRORS": "1"}
NO_TOKEN = ("InvalidAuthToken", "no authentication token was found")
RESUME = "re-run the command to resume"
OUT_OF_MEMORY = (
    "Ray ended the processes of workers because the memory of {where} is nearly full; fewer executor.workers or a "
    "smaller engine.rows need less"
)
# Ray ends the process of a driver whose node is gone, without a word: a shell then says it in its place
ENDED = "error: the command was killed, or ended by Ray because Ray's node is gone; re-run the command to resume"
WATCH = f'read -r end || echo "{ENDED}" >&2'


@dataclass(frozen=True)
class Ray:
    """Workers that are actors of Ray Core.

    Attributes:
        workers: how many; None for one per GPU, or one per `CORES_PER_WORKER` cores where there are none.
        address: of a cluster's head, HOST:PORT; None starts Ray on this machine alone.
        shard: `measured` or `fixed`, see `Executor.fixed`.
        max_restarts: how often Ray starts a dead worker again.
        max_task_retries: how often in a row a worker may die and, once it is started again, gets another shard. The one
            that it had goes to any worker.
    """

    workers: int | None = None
    address: str | None = None
    shard: str = "measured"
    max_restarts: int = 3
    max_task_retries: int = 3

    name: ClassVar[str] = "ray"
    in_process: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_fields(
            "executor", self, workers="a positive integer, or null", shard=SHARDS, max_restarts="an integer, 0 or more",
            max_task_retries="an integer, 0 or more",
        )  # fmt: skip

    @property
    def fixed(self) -> bool:
        """Whether shards are the batches of `executor=local`."""
        return self.shard == "fixed"

    def check(self, device: str) -> None:
        """Check that Ray is installed, that its address answers, and that workers may choose their GPU.

        Raises:
            UsageError: one of these is not so.
        """
        require(
            "executor",
            self.name,
            find_spec("ray") is not None,
            "Ray is not installed: pip install '.[ray]' in the clone",
        )
        require(
            "engine.device",
            device,
            not device.startswith("cuda:"),
            "must be auto, cpu or cuda: executor=ray gives each worker a GPU",
        )
        if self.address is None:
            return
        host, _, port = str(self.address).rpartition(":")
        wanted = bool(host) and port.isdigit()
        require("executor.address", self.address, wanted, "must be HOST:PORT of a Ray cluster's head, or null")
        try:
            socket.create_connection((host, int(port)), SECONDS_TO_ANSWER).close()
        except (OSError, OverflowError) as error:
            allowed = f"no Ray cluster answers there ({error}); `ray start --head` prints the address"
            raise bad_value("executor.address", self.address, allowed) from error

    def open(self, work: Work, device: str) -> RayPool:
        """Start Ray and the workers, unless they are left from earlier work, and send them the work.

        Raises:
            UsageError: Ray or its workers cannot be had.
        """
        return RayPool(_actors(self, on_gpus=device != "cpu"), work, self.max_task_retries)


class RayPool:
    """Actors that have received the work."""

    def __init__(self, actors: dict[Any, bool], work: Work, retries: int) -> None:
        """Send the work.

        Args:
            actors: of the workers, each with whether it is there: not dead and about to be started again; kept up to
                date, and those that are lost are removed.
            work: makes a worker.
            retries: how often in a row a worker may die and gets another shard.
        """
        self._all, self._retries = actors, retries
        self._actors = dict(enumerate(actors))
        self._running: dict[Any, int] = {}  # workers, by reference to the result of a call
        self._deaths = Counter[int]()  # since the last shard that was computed
        self._said: set[str] = set()
        content = pickle.dumps(work)
        folder = os.getcwd()
        self._id = hashlib.sha256(content + os.fsencode(folder)).hexdigest()
        self._content = _ray().put((content, folder))

    @property
    def workers(self) -> Sequence[int]:
        """Those that are there."""
        return [worker for worker, actor in self._actors.items() if self._all[actor]]

    def describe(self) -> list[Any]:
        """What each worker that is there says of itself."""
        found: dict[int, Any] = {}
        for worker in self._actors:
            self._call(worker, "describe")
        while not found or set(self.workers) - found.keys():
            done = self.next_finished()
            if not done.lost:
                found[done.worker] = done.result
        return [found[worker] for worker in sorted(found)]

    def submit(self, worker: int, shard: Any) -> None:
        """Give an idle worker a shard."""
        self._call(worker, "compute", shard)

    def _call(self, worker: int, method: str, *arguments: Any) -> None:
        """Call a worker; one that is not there computes the call once it has been started again."""
        actor = self._actors[worker]
        call = actor.call.options(max_task_retries=0 if self._all[actor] else -1)
        # in a list, so that a worker fetches the work only if it is new to it
        self._running[call.remote(self._id, [self._content], method, *arguments)] = worker

    def next_finished(self) -> Finished:
        """Wait until some worker is done with its shard, has died, or has been started again.

        Raises:
            RunError: no worker is left, or Ray is gone.
        """
        ray = _ray()
        waits = not any(self._all[self._actors[worker]] for worker in self._running.values())
        try:
            # where no machine has room for any, Ray would wait for ever
            done, _ = ray.wait(list(self._running), num_returns=1, timeout=SECONDS_TO_RESTART if waits else None)
        except ray.exceptions.RayError as error:
            raise RunError(f"Ray is gone: {_in_one_line(error)}; {RESUME}") from error
        if not done:
            self._all.clear()  # the next work of the command starts others
            why = f"all have died, and in {SECONDS_TO_RESTART} s no machine started one again"
            raise RunError(f"no worker of executor=ray is left: {why}; {RESUME}")
        worker = self._running.pop(done[0])
        actor = self._actors[worker]
        try:
            result, seconds, warnings = ray.get(done[0])
        except ray.exceptions.RayTaskError as error:  # what the worker raised
            known = isinstance(error.cause, LatentTTSError | RuntimeError | MemoryError)
            raise error.cause from (None if known else error)
        except ray.exceptions.RayError as error:
            self._lose(worker, error)
            return Finished(worker, None, 0.0, lost=True)
        for name, level, text in warnings:
            if text not in self._said:  # by another worker
                logging.getLogger(name).log(level, "%s", text)
                self._said.add(text)
        if self._all[actor]:
            self._deaths[worker] = 0
            return Finished(worker, result, seconds)
        self._all[actor] = True
        return Finished(worker, result, seconds, back=True)

    def _lose(self, worker: int, error: Exception) -> None:
        """Wait until Ray has started a worker that died again, or give it up.

        Raises:
            RunError: no other worker is left.
        """
        actor, why = self._actors[worker], _in_one_line(error)
        self._deaths[worker] += 1
        if self._all[actor] and self._deaths[worker] <= self._retries:
            log.info("executor=ray: worker %d died, others take its shard: %s", worker, why)
            self._all[actor] = False
            self._call(worker, "describe")
            return
        del self._all[self._actors.pop(worker)]
        if not self._actors:
            raise RunError(f"no worker of executor=ray is left: {why}; {RESUME}") from error
        log.warning("executor=ray lost worker %d, %d are left: %s", worker, len(self._actors), why)


class _Actor:
    """A worker's process."""

    def __init__(self, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._warnings = BufferingHandler(sys.maxsize)
        self._warnings.setLevel(logging.WARNING)
        logging.getLogger("latent_tts").addHandler(self._warnings)
        self._id, self._worker, self._where = "", None, f"the worker on {socket.gethostname()}"

    def call(self, work_id: str, content: list[Any], method: str, *arguments: Any) -> tuple[Any, float, list[Any]]:
        """What a method of the worker gives, the seconds that it took, and the warnings that it logged.

        Raises:
            LatentTTSError: the worker raised it or an OSError; it says on which machine.
            RuntimeError: the same.
        """
        try:
            worker = self._ready(work_id, content)
            started = time.perf_counter()
            result = getattr(worker, method)(*arguments)
        except LatentTTSError as error:
            raise type(error)(f"{self._where}: {error}") from error
        except OSError as error:
            file = "" if error.filename is None else f"{error.filename}: "
            raise RunError(f"{self._where}: {file}{error.strerror or error}") from error
        except RuntimeError as error:
            raise RuntimeError(f"{self._where}: {reason(error)}") from error
        warnings = [(each.name, each.levelno, each.getMessage()) for each in self._warnings.buffer]
        self._warnings.flush()
        return result, time.perf_counter() - started, warnings

    def _ready(self, work_id: str, content: list[Any]) -> Worker:
        """The worker for a piece of work; a process that was started again makes it anew."""
        if self._worker is None or self._id != work_id:
            pickled, folder = _ray().get(content[0])
            try:
                os.chdir(folder)  # relative paths are those of the command
            except OSError:
                self._where = f"the worker on {socket.gethostname()}, which does not have the command's folder {folder}"
            try:
                work: Work = pickle.loads(pickled)
            except Exception as error:  # of any class: another version of the code may raise whatever it likes
                raise RunError(f"it does not have the driver's code: {reason(error)}") from error
            self._worker, self._id = work(), work_id
        return self._worker


_started: dict[tuple[Ray, bool], dict[Any, bool]] = {}  # the actors of this process; see `RayPool`


def _ray() -> Any:
    import ray

    return ray


def _actors(executor: Ray, *, on_gpus: bool) -> dict[Any, bool]:
    """The actors of an executor; those of another end."""
    key = executor, on_gpus
    if not _started.get(key):  # or all of them are lost
        if _started:
            _started.clear()
            _ray().shutdown()
        _connect(executor.address)
        _started[key] = dict.fromkeys(_start_actors(executor, on_gpus), True)
    return _started[key]


@cache
def _say_if_ended() -> None:
    """Have another process print a line if this one is killed."""
    watch = subprocess.Popen(["/bin/sh", "-c", WATCH], stdin=subprocess.PIPE, start_new_session=True)
    atexit.register(watch.communicate, b"well\n")


def _connect(address: str | None) -> None:
    _say_if_ended()
    os.environ |= SILENT | (LOOPBACK_ALONE if address is None else {})
    ray = _ray()
    logging.getLogger("ray").setLevel(logging.ERROR)
    common: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
    try:
        if address is None:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            store = min(MAX_STORE_BYTES, max(MIN_STORE_BYTES, psutil.virtual_memory().available // 8))
            # without `local` it would be the cluster of this machine, or of RAY_ADDRESS
            ray.init("local", num_cpus=cores, include_dashboard=False, object_store_memory=store, **common)
        else:
            ray.init(address, **common)
        _end_with_node(ray.get_runtime_context().get_node_id())
    except Exception as error:  # of any class: a node that is slow to start is a plain Exception
        key, value = ("executor", "ray") if address is None else ("executor.address", address)
        why = f"Ray cannot be started ({' '.join(str(error).split())[:200]})"
        said = "".join(traceback.format_exception(error))
        if any(words in said for words in NO_TOKEN):
            why = "the cluster asks for a token; set RAY_AUTH_MODE=token, and have its token on this machine, too"
        if "No node info found" in said:
            why = f"this machine does not belong to the cluster; `ray start --address={address}` adds it"
        raise bad_value(key, value, why) from error


def _end_with_node(node: str) -> None:
    """Watch the process that makes this machine a node of Ray: without it a driver waits for ever, so this one ends."""
    found = psutil.process_iter(["name", "cmdline"])
    # None: that of another user, or of a process that has ended and that nobody has waited for
    lines = ((each, " ".join(each.info["cmdline"] or ())) for each in found if each.info["name"] == "raylet")
    raylet = next((each for each, line in lines if node in line), None)
    if raylet is None:  # it is out of sight, as from within a container
        return

    def watch() -> None:
        raylet.wait()
        time.sleep(SECONDS_TO_END)
        if _ray().is_initialized() and _ray().get_runtime_context().get_node_id() == node:
            os._exit(1)

    threading.Thread(target=watch, name="watch of Ray's node", daemon=True).start()


@dataclass(frozen=True)
class Machine:
    """What Ray may use of a machine."""

    cores: float
    gpus: float = 0.0


@dataclass(frozen=True)
class WorkerPlan:
    """How many workers there are, and what Ray reserves for each.

    Attributes:
        workers: how many.
        cores: whole, or one k-th of a core.
        gpus: 1, one k-th of a GPU, or 0.
    """

    workers: int
    cores: float
    gpus: float

    def fits(self, machines: Sequence[Machine]) -> bool:
        """Whether the machines hold all workers."""
        places = 0
        for machine in machines:
            on_cores = math.floor(machine.cores / self.cores + TINY) if self.cores else self.workers
            # a part is one of a single GPU
            on_gpus = int(machine.gpus) * math.floor(1 / self.gpus + TINY) if self.gpus else self.workers
            places += min(on_cores, on_gpus)
        return places >= self.workers

    @classmethod
    def of(cls, machines: Sequence[Machine], workers: int | None) -> WorkerPlan:
        """The plan with the most cores per worker, all of them on some machine."""
        cores, gpus = (sum(int(getattr(each, name)) for each in machines) for name in ("cores", "gpus"))
        whole = sum(int(each.cores) // CORES_PER_WORKER for each in machines)
        count = workers or gpus or max(MIN_WORKERS, whole)
        per_gpu = math.ceil(count / gpus) if gpus else 0  # workers that share one
        own = _part(per_gpu) if gpus else 0.0
        most = max((int(each.cores) for each in machines), default=0)
        shares = [*(float(each) for each in range(most, 0, -1)), *map(_part, range(2, count + 1))] if cores else []
        plans = (cls(count, share, own) for share in shares)
        return next((plan for plan in plans if plan.fits(machines)), cls(count, 0.0, own))


def _part(count: int) -> float:
    """One of `count` parts of a core or GPU; Ray counts in steps, and all of them together must not be more than 1."""
    return math.floor(RAY_STEPS / count) / RAY_STEPS


def _start_actors(executor: Ray, on_gpus: bool) -> list[Any]:
    ray = _ray()
    there = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    machines = [Machine(each.get("CPU", 0.0), each.get("GPU", 0.0) if on_gpus else 0.0) for each in there]
    plan = WorkerPlan.of(machines, executor.workers)
    kind = ray.remote(_Actor).options(
        num_cpus=plan.cores, num_gpus=plan.gpus, max_restarts=executor.max_restarts, max_task_retries=0
    )
    started = [kind.remote(max(1, int(plan.cores))) for _ in range(plan.workers)]
    actors, began = {actor.__ray_ready__.remote(): actor for actor in started}, time.monotonic()
    placed, missing = ray.wait(list(actors), num_returns=1, timeout=SECONDS_TO_PLACE)
    if placed and missing:
        seconds = max(SECONDS_FOR_OTHERS, time.monotonic() - began)
        placed, missing = ray.wait(list(actors), num_returns=len(actors), timeout=seconds)
    for sign in missing:
        ray.kill(actors[sign])
    each = f"each takes {plan.cores:g} cores and {plan.gpus:g} GPUs, and the rest of the cluster is in use"
    if not placed:
        allowed = f"no worker started in {SECONDS_TO_PLACE} s: {each}"
        raise bad_value("executor.workers", executor.workers, allowed)
    try:
        ray.get(placed)
    except ray.exceptions.RayError as error:  # a machine cannot run this package
        key, value = ("executor", "ray") if executor.address is None else ("executor.address", executor.address)
        raise bad_value(key, value, _in_one_line(error)) from error
    if missing:
        log.warning("executor=ray goes on with %d of %d workers: %s", len(placed), len(actors), each)
    return [actors[sign] for sign in placed]


def _in_one_line(error: Exception) -> str:
    """The first paragraph of what Ray says, without a full stop; in words where what it means is known."""
    text = str(error)
    machine = re.search(r"(?:IP: |ip=)([^,)\s]+)", text)
    where = machine[1] if machine else "a machine"
    if "running low on memory" in text:
        return OUT_OF_MEMORY.format(where=where)
    if "its creation task" in text:
        return f"the worker on {where} cannot start: {text.strip().splitlines()[-1]}"
    return " ".join(text.split("\n\n")[0].split()).removesuffix(".")
