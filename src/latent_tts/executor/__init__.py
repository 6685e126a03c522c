"""Where the shards of a run are computed: workers, and the Protocol of `executor=...`.

A shard is some questions with a range of rollouts each. The driver hands shards to workers and alone writes what comes
back, so workers need no shared folder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeAlias


class Worker(Protocol):
    """Computes shards of one kind of work, in the driver's process or in one of its own."""

    def describe(self) -> Any:
        """What the driver has to know of it; loads its models."""
        ...

    def compute(self, shard: Any) -> Any:
        """The result of a shard. Both can be pickled unless the worker is in the driver's process."""
        ...


Work: TypeAlias = Callable[[], Worker]  # makes a worker in this process; can be pickled unless it is the driver's


@dataclass(frozen=True)
class Finished:
    """A shard that a worker is done with, or a worker that is there again.

    Attributes:
        worker: which one.
        result: what it computed; None if the worker died.
        seconds: that it computed.
        lost: whether the worker has died, and any other has to compute its shard, if it had one.
        back: whether it is one that had died and takes shards again.
    """

    worker: int
    result: Any
    seconds: float
    lost: bool = False
    back: bool = False


class Pool(Protocol):
    """Workers that have received the work."""

    @property
    def workers(self) -> Sequence[int]:
        """Those that are there: not lost, and not dead and about to be started again."""
        ...

    def describe(self) -> list[Any]:
        """What each worker that is there says of itself."""
        ...

    def submit(self, worker: int, shard: Any) -> None:
        """Give an idle worker a shard."""
        ...

    def next_finished(self) -> Finished:
        """Wait until some worker is done with its shard, has died over it, or is there again.

        Raises:
            RunError: no worker is left.
        """
        ...


class Executor(Protocol):
    """Where shards are computed.

    Attributes:
        name: as shown in tables.
        in_process: whether the driver computes them itself.
    """

    name: ClassVar[str]
    in_process: ClassVar[bool]

    @property
    def fixed(self) -> bool:
        """Whether shards are the batches that the driver would make, whatever the workers' speeds."""
        ...

    def check(self, device: str) -> None:
        """Check that workers can be had, without torch.

        Args:
            device: `engine.device`.

        Raises:
            UsageError: they cannot.
        """
        ...

    def open(self, work: Work, device: str) -> Pool:
        """Workers for some work; those of the work before are used again.

        Args:
            work: makes a worker.
            device: `engine.device`.

        Raises:
            UsageError: there are none.
        """
        ...
