"""Where the workers of `executor=ray` are placed, and what it does when Ray fails; Ray itself is simulated."""

import pickle
import subprocess
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latent_tts.errors import RunError, UsageError
from latent_tts.executor import ray as executor
from latent_tts.executor.ray import Machine, Ray, RayPool, WorkerPlan
from latent_tts.pipeline.dispatch import ShardQueue, Unit, results_of


@pytest.mark.parametrize(
    ("machines", "workers", "plan"),
    [
        ([Machine(8)], None, WorkerPlan(2, 4, 0)),
        ([Machine(2)], None, WorkerPlan(2, 1, 0)),
        ([Machine(6), Machine(6)], None, WorkerPlan(2, 6, 0)),
        ([Machine(6), Machine(6)], 3, WorkerPlan(3, 3, 0)),
        ([Machine(2)], 8, WorkerPlan(8, 0.25, 0)),
        ([Machine(16, 2)], None, WorkerPlan(2, 8, 1)),
        ([Machine(16, 2)], 3, WorkerPlan(3, 5, 0.5)),
        ([Machine(16, 3)], 2, WorkerPlan(2, 8, 1)),
        ([Machine(8, 1), Machine(2, 2)], None, WorkerPlan(3, 1, 1)),
        ([Machine(4, 1)], 3, WorkerPlan(3, 1, 0.3333)),
        ([Machine(0, 1)], None, WorkerPlan(1, 0, 1)),
    ],
)
def test_workers_fit_the_machines(machines, workers, plan):
    assert WorkerPlan.of(machines, workers) == plan


@given(
    st.lists(st.builds(Machine, st.integers(0, 9), st.integers(0, 4)), min_size=1, max_size=4),
    st.none() | st.integers(1, 20),
)
def test_every_worker_finds_a_machine_and_ray_takes_the_amounts(machines, workers):
    plan = WorkerPlan.of(machines, workers)
    assert plan.fits(machines)
    assert workers in (None, plan.workers)
    for amount in (plan.cores, plan.gpus):
        assert amount <= 1 or amount == int(amount)
        assert amount * 10_000 == pytest.approx(round(amount * 10_000))


class SimulatedRay:
    """Machines on which only some actors are placed."""

    exceptions = SimpleNamespace(RayError=OSError, RayTaskError=ArithmeticError)

    def __init__(self, placed):
        self.placed, self.killed, self.waited = placed, [], []

    def nodes(self):
        return [{"Alive": True, "Resources": {"CPU": 8.0}}, {"Alive": False, "Resources": {"CPU": 99.0}}]

    def remote(self, _):
        def start(threads):
            return SimpleNamespace(__ray_ready__=SimpleNamespace(remote=object))

        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=start))

    def wait(self, references, num_returns, timeout=None):
        if timeout is None:
            raise OSError("the node is gone\n\nand much more")
        references = list(references)
        self.waited.append((num_returns, timeout))
        return references[: self.placed], references[self.placed :]

    def kill(self, actor):
        self.killed.append(actor)

    def put(self, content):
        return content

    def get(self, sign):
        return True

    def init(self, *_, **__):
        raise Exception("The current node timed out during startup.\nMore about it.")


class SimulatedActor:
    """Its references say what was asked of it."""

    def __init__(self, number):
        def options(max_task_retries):
            kind = "call" if max_task_retries == 0 else "call once there"
            return SimpleNamespace(remote=lambda _id, _content, *asked: (kind, number, *asked))

        self.call = SimpleNamespace(options=options)


class MortalRay(SimulatedRay):
    """Actors that die over some of their calls (numbers from 1), some of them on machines that do not come back."""

    def __init__(self, deaths, gone=()):
        super().__init__(0)
        self.deaths, self.gone, self.timeouts, self.sent = deaths, gone, [], []

    def wait(self, references, num_returns, timeout=None):
        assert references
        done = [each for each in references if each[0] == "call" or each[1] not in self.gone]
        if not done:
            self.timeouts.append(timeout)
        return done[:1], []

    def get(self, reference):
        what, number, *asked = reference
        if what == "call":
            self.sent.append((number, asked[-1]))
            if [worker for worker, _ in self.sent].count(number) in self.deaths.get(number, ()):
                raise OSError("The actor died.\n\nMore about it.")
        else:
            assert asked == ["describe"]
        return f"{number} {asked}", 1.0, []


def compute_on_mortals(monkeypatch, deaths, gone=()):
    """Have two workers describe themselves and compute ten shards."""
    mortal = MortalRay(deaths, gone)
    monkeypatch.setattr(executor, "_ray", lambda: mortal)
    actors = dict.fromkeys([SimulatedActor(0), SimulatedActor(1)], True)
    pool = RayPool(actors, "work", retries=2)  # pyright: ignore[reportArgumentType]
    described = pool.describe()
    queue = ShardQueue([Unit(number, 1.0, 1) for number in range(10)], len(described), 1)
    shards = [shard for shard, _ in results_of(pool, queue, tuple, [])]
    assert sorted(unit for shard in shards for unit in shard) == list(range(10))
    return mortal, actors, described


def test_a_worker_that_died_takes_shards_again_once_it_is_there_again(monkeypatch, caplog):
    mortal, actors, described = compute_on_mortals(monkeypatch, {0: [1, 3]})
    assert len(described) == 1  # it waits for none that is not there
    assert list(actors.values()) == [True, True]
    own = [shard for number, shard in mortal.sent if number == 0]
    assert own[0] == "describe"
    assert len(own) > 3  # it died over two
    assert "lost" not in caplog.text


def test_a_worker_that_dies_again_and_again_is_lost(monkeypatch, caplog):
    mortal, actors, _ = compute_on_mortals(monkeypatch, {0: [3, 4, 5]})
    assert [number for number, _ in mortal.sent].count(0) == 5
    assert "lost worker 0, 1 are left: The actor died\n" in caplog.text
    assert len(actors) == 1  # the next work of the command does not find the lost one


def test_nobody_waits_for_a_worker_whose_machine_is_gone(monkeypatch):
    mortal, actors, described = compute_on_mortals(monkeypatch, {0: [2], 1: [7]}, gone=[0])
    assert len(described) == 2
    assert list(actors.values()) == [False, True]
    pool = RayPool(actors, "work", retries=2)  # of the next round  # pyright: ignore[reportArgumentType]
    assert len(pool.describe()) == 1
    assert pool.workers == [1]
    assert not mortal.timeouts


def test_without_a_machine_for_any_worker_the_command_ends(monkeypatch):
    with pytest.raises(RunError, match="no worker of executor=ray is left: all have died, and in 120 s no machine"):
        compute_on_mortals(monkeypatch, {0: [3], 1: [3]}, gone=[0, 1])
    actors = {SimulatedActor(0): False}
    pool = RayPool(actors, "work", retries=2)  # pyright: ignore[reportArgumentType]
    with pytest.raises(RunError):
        pool.describe()
    assert not actors  # the next work of the command starts others


def test_a_command_goes_on_with_the_workers_that_are_placed_and_says_so(monkeypatch, caplog):
    simulated = SimulatedRay(placed=2)
    monkeypatch.setattr(executor, "_ray", lambda: simulated)
    assert len(executor._start_actors(Ray(workers=3), on_gpus=False)) == 2
    assert simulated.waited == [(1, 300), (3, 60)]
    assert len(simulated.killed) == 1  # it does not start later, when nobody gives it work
    assert (
        "goes on with 2 of 3 workers: each takes 2 cores and 0 GPUs, and the rest of the cluster is in use"
        in caplog.text
    )
    caplog.clear()
    simulated.placed = 3
    assert len(executor._start_actors(Ray(workers=3), on_gpus=False)) == 3
    assert not caplog.text


def test_without_a_worker_that_is_placed_one_line_says_what_each_takes(monkeypatch):
    simulated = SimulatedRay(placed=0)
    monkeypatch.setattr(executor, "_ray", lambda: simulated)
    with pytest.raises(UsageError, match="workers=2: no worker started in 300 s: each takes 4 cores and 0 GPUs"):
        executor._start_actors(Ray(workers=2), on_gpus=False)
    assert len(simulated.killed) == 2


@pytest.mark.parametrize(
    ("address", "key"), [(None, "executor=ray"), ("10.0.0.1:6379", "executor.address=10.0.0.1:6379")]
)
def test_a_ray_that_is_too_slow_to_start_is_one_line(monkeypatch, address, key):
    monkeypatch.setattr(executor, "_ray", lambda: SimulatedRay(0))
    monkeypatch.setattr(executor, "_say_if_ended", lambda: None)
    for name in executor.SILENT | executor.LOOPBACK_ALONE:
        monkeypatch.setenv(name, "0")
    with pytest.raises(UsageError, match=rf"\A{key}: Ray cannot be started \(The current node timed out [^\n]*\Z"):
        executor._connect(address)


def test_a_failure_of_waiting_loses_no_worker_and_is_one_line(monkeypatch):
    monkeypatch.setattr(executor, "_ray", lambda: SimulatedRay(0))
    pool = RayPool(dict.fromkeys([SimulatedActor(0), SimulatedActor(1)], True), "work", retries=3)  # pyright: ignore[reportArgumentType]
    pool.submit(0, "shard")
    with pytest.raises(RunError, match=r"the node is gone; re-run the command to resume\Z"):
        pool.next_finished()
    assert list(pool.workers) == [0, 1]


@dataclass(frozen=True)
class Reading:
    """Work whose workers read a file."""

    path: str

    def __call__(self):
        return self

    def compute(self, error):
        if error is not None:
            raise error
        return Path(self.path).read_text()


@pytest.fixture
def actor(monkeypatch, tmp_path):
    """Calls an actor on a machine h7, which has the command's folder if that exists."""
    monkeypatch.setattr(executor, "_ray", lambda: SimpleNamespace(get=lambda content: content))
    monkeypatch.setattr("socket.gethostname", lambda: "h7")
    monkeypatch.setattr("torch.set_num_threads", lambda threads: None)
    monkeypatch.setattr("logging.Logger.addHandler", lambda logger, handler: None)
    monkeypatch.chdir(tmp_path)

    def call(work, error=None, folder=tmp_path):
        content = work if isinstance(work, bytes) else pickle.dumps(work)
        return executor._Actor(1).call("id", [(content, str(folder))], "compute", error)[0]

    return call


def test_relative_paths_are_those_of_the_command_on_each_machine(actor, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "file").write_text("content")
    assert actor(Reading("file"), folder=tmp_path / "sub") == "content"


LOST = tempfile.gettempdir() + "/not/here"


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ((Reading("/no/file"),), RunError, "the worker on h7: /no/file: No such file or directory"),
        (
            (Reading("file"), None, LOST),
            RunError,
            f"the worker on h7, which does not have the command's folder {LOST}: file: No such file or directory",
        ),
        ((Reading(""), UsageError("model.checkpoint=a: no such folder")), UsageError,
         "the worker on h7: model.checkpoint=a: no such folder"),
        ((Reading(""), RuntimeError("CUDA error\nand more")), RuntimeError, "the worker on h7: CUDA error"),
        ((pickle.dumps(Reading("")).replace(b"Reading", b"Missing"),), RunError,
         "the worker on h7: it does not have the driver's code: "),
    ],
)  # fmt: skip
def test_what_a_worker_fails_with_names_its_machine(actor, arguments, kind, words):
    with pytest.raises(kind, match=rf"\A{words}") as raised:
        actor(*arguments)
    assert type(raised.value) is kind
    assert "\n" not in str(raised.value)


def test_what_a_worker_did_not_expect_is_raised_as_it_was(monkeypatch):
    def fail(_):
        error = ArithmeticError("\x1b[36mray::_Actor.call()\x1b[39m (pid=860) and a traceback")
        error.cause = ValueError("of the worker")  # pyright: ignore[reportAttributeAccessIssue]
        raise error

    mortal = MortalRay({})
    monkeypatch.setattr(mortal, "get", fail)
    monkeypatch.setattr(executor, "_ray", lambda: mortal)
    pool = RayPool(dict.fromkeys([SimulatedActor(0)], True), "work", retries=3)  # pyright: ignore[reportArgumentType]
    pool.submit(0, "shard")
    with pytest.raises(ValueError, match=r"\Aof the worker\Z") as raised:
        pool.next_finished()
    assert "traceback" in str(raised.value.__cause__)


NO_PACKAGE = """The actor died because of an error raised in its creation task, ray::_Actor() (ip=10.0.0.3)
           ^^^^
RuntimeError: The actor with name _Actor failed to import on the worker. This may be because needed library:

ray::_Actor.__init__() (pid=9, ip=10.0.0.3)
ModuleNotFoundError: No module named 'latent_tts'"""


@pytest.mark.parametrize(
    ("address", "key"), [(None, "executor=ray"), ("10.0.0.1:6379", "executor.address=10.0.0.1:6379")]
)
def test_a_machine_without_the_package_is_refused_by_its_address(monkeypatch, address, key):
    def fail(sign):
        raise OSError(NO_PACKAGE)

    simulated = SimulatedRay(placed=2)
    monkeypatch.setattr(simulated, "get", fail)
    monkeypatch.setattr(executor, "_ray", lambda: simulated)
    words = rf"\A{key}: the worker on 10\.0\.0\.3 cannot start: ModuleNotFoundError: No module named 'latent_tts'\Z"
    with pytest.raises(UsageError, match=words):
        executor._start_actors(Ray(workers=2, address=address), on_gpus=False)


OUT_OF_MEMORY = """1 worker(s) were killed due to the node running low on memory.
Memory on the node (IP: 10.0.0.7, ID: 22) was 22.61GB used / 23.54GB limit (0.960262)
OOM kill reason: Memory usage 24276168704B exceeded threshold of 24012687360B (95.0% of 25276514304B limit)
"""


def test_a_worker_that_ray_ends_for_memory_is_named_by_its_machine_with_what_needs_less(monkeypatch, caplog):
    monkeypatch.setattr(executor, "_ray", lambda: SimulatedRay(0))
    pool = RayPool(dict.fromkeys([SimulatedActor(0), SimulatedActor(1)], True), "work", retries=0)  # pyright: ignore[reportArgumentType]
    words = "because the memory of 10.0.0.7 is nearly full; fewer executor.workers or a smaller engine.rows need less"
    pool._lose(0, OSError(OUT_OF_MEMORY))
    assert f"executor=ray lost worker 0, 1 are left: Ray ended the processes of workers {words}" in caplog.text
    with pytest.raises(RunError, match=f"no worker of executor=ray is left: .*{words}; re-run the command to resume"):
        pool._lose(1, OSError(OUT_OF_MEMORY))


@pytest.mark.parametrize(
    ("cause", "words"),
    [
        ("RPC error: InvalidAuthToken: missing", "the cluster asks for a token; set RAY_AUTH"),
        ("Token authentication is enabled but no authentication token was found.", "the cluster asks for a token"),
        (
            "No node info found matching attributes: '' when trying to resolve node to connect to.",
            r"this machine does not belong to the cluster; `ray start --address=10\.0\.0\.1:6379` adds it",
        ),
    ],
)
def test_a_cluster_that_asks_for_a_token_or_is_that_of_other_machines_is_named(monkeypatch, cause, words):
    def refuse(*_, **__):
        raise ConnectionError("Failed to connect") from RuntimeError(cause)

    simulated = SimulatedRay(0)
    monkeypatch.setattr(simulated, "init", refuse)
    monkeypatch.setattr(executor, "_ray", lambda: simulated)
    monkeypatch.setattr(executor, "_say_if_ended", lambda: None)
    for name in executor.SILENT:
        monkeypatch.setenv(name, "0")
    with pytest.raises(UsageError, match=rf"10\.0\.0\.1:6379: {words}"):
        executor._connect("10.0.0.1:6379")


def test_a_command_ends_soon_after_the_process_that_makes_its_machine_a_node(monkeypatch):
    """Cut off from the cluster, Ray waits for ever."""
    ended, simulated = threading.Event(), SimulatedRay(0)
    with subprocess.Popen(["sleep", "60"]) as process:
        infos = [("sh", ["ab12"]), ("raylet", None), ("raylet", ["--node_id=other"]), ("raylet", ["--node_id=ab12"])]
        found = [*(psutil.Process() for _ in infos[1:]), psutil.Process(process.pid)]
        for each, (name, cmdline) in zip(found, infos, strict=True):
            each.info = {"name": name, "cmdline": cmdline}  # pyright: ignore[reportAttributeAccessIssue]
        monkeypatch.setattr("psutil.process_iter", lambda attrs: found)
        monkeypatch.setattr(simulated, "init", lambda *_, **__: None)
        monkeypatch.setattr(simulated, "is_initialized", lambda: not ended.is_set(), raising=False)
        context = SimpleNamespace(get_node_id=lambda: "ab12")
        monkeypatch.setattr(simulated, "get_runtime_context", lambda: context, raising=False)
        monkeypatch.setattr(executor, "_ray", lambda: simulated)
        monkeypatch.setattr(executor, "_say_if_ended", lambda: None)
        monkeypatch.setattr(executor, "SECONDS_TO_END", 0.0)
        monkeypatch.setattr("os._exit", lambda code: ended.set())
        for name in executor.SILENT:
            monkeypatch.setenv(name, "0")
        executor._connect("10.0.0.1:6379")
        assert not ended.wait(0.1)
        process.kill()
        assert ended.wait(10)
