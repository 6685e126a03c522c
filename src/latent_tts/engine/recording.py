"""Passes recorded once, as CUDA graphs, and replayed for later batches of the same sizes.

At small batches a GPU spends nine tenths of its time waiting for the next kernel to be launched; a graph launches all
kernels of a pass at once. Batches that share their sizes share a bucket: tensors that stay where they are, and passes
that read and write them. A recording is trusted once a batch other than the recorded one gave what the same passes give
without it.
"""

from __future__ import annotations

import logging
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Generic, TypeAlias, TypeVar

import torch
from torch import Tensor

from latent_tts.engine.device import free_bytes, is_out_of_memory, unreturnable_bytes
from latent_tts.errors import RunError
from latent_tts.types import Computation

log = logging.getLogger(__name__)
# of what is free once models are loaded; batches take at most half of it (`packing.MEMORY_SHARE`)
ROLLOUTS_SHARE, SCORES_SHARE = 0.25, 0.0625
# roundings within which rollouts agree, and how many of them agree at least, in float32 and in half precision:
_REPLAYED = (16.0, 0.9), (2.0, 0.9)  # replayed, for which a library may choose other kernels
_OTHER_ORDER = (256.0, 0.9), (16.0, 0.5)  # in tensors of other sizes, so summed in another order
MAX_RECORDED = 256  # passes of a bucket; later answer tokens of a sampler that is random in answers are not recorded
# tokens of prompts, padding included, up to which their pass is recorded: more of them take longer than launching
PROMPT_TOKENS = 1 << 12
MIN_LENGTH = 16  # of prompts, whose lengths grow by powers of two

Replay: TypeAlias = Callable[[], object]
Pass = TypeVar("Pass", bound=Hashable)
Kept = TypeVar("Kept", bound="Bucket[Any, Any]")
Found = TypeVar("Found")


class CudaRecorder:
    """Records CUDA graphs, whose temporary tensors share their memory."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, run: Callable[[], None], tensors: list[Tensor]) -> Replay:
        """Record a function that reads and writes tensors in place; returns what runs it again.

        Args:
            run: it was run before.
            tensors: what differs between its runs.
        """
        device, graph = tensors[0].device, torch.cuda.CUDAGraph()
        failed: Exception | None = None
        try:
            with (
                torch.cuda.device(device),
                torch.cuda.stream(torch.cuda.current_stream(device)),  # a recording that fails leaves its own stream
                # other threads write parts meanwhile
                torch.cuda.graph(graph, self._pool, _recording_stream(device), capture_error_mode="thread_local"),
            ):
                try:
                    run()
                except Exception as error:  # what ends the recording then fails too, and says less
                    failed = error
                    raise
        except Exception as error:
            # where CUDA has broken a recording off, torch leaves open what it allocates from: it would hold the memory
            # for good, and give nothing back when memory runs out
            with suppress(RuntimeError):  # closed, where CUDA went on until the recording ended
                torch._C._cuda_endAllocateToPool(device.index, self._pool)
                torch._C._cuda_releasePool(device.index, self._pool)
            raise (failed or error) from None
        return graph.replay


@cache
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """Where passes are recorded; one per device, since libraries keep a workspace for each stream."""
    return torch.cuda.Stream(device)


def power_of_two(number: int, least: int = 1) -> int:
    """The next power of two, and no less than another one."""
    return max(least, 1 << (number - 1).bit_length())


@dataclass(frozen=True)
class Prompts:
    """The pass over the prompts."""


class Bucket(ABC, Generic[Pass, Found]):
    """Batches of the same sizes: tensors that stay where they are, the passes over them, and what is recorded of these.

    Attributes:
        trusted: passes whose replay was compared with the passes themselves.
    """

    def __init__(self, recorder: CudaRecorder, dtype: torch.dtype) -> None:
        """Record nothing yet.

        Args:
            recorder: for this bucket alone.
            dtype: of the model.
        """
        self._recorder, self._dtype = recorder, dtype
        self._replays: dict[Pass, Replay] = {}
        self.trusted: set[Pass] = set()
        self._pool_bytes = 0

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """All that differs between batches or between the passes of a batch."""

    @abstractmethod
    def run(self, passes: Pass) -> None:
        """Run some passes, as they are recorded."""

    def clear(self) -> None:
        """Clear what was computed: a recording that does not write it would find what was run."""
        for tensor in self.tensors():
            if tensor.is_floating_point():
                tensor.zero_()

    def restore(self) -> None:
        """Go back to where every pass has room, though what it computes there is of no use."""

    @abstractmethod
    def agreement(self, found: Found, wanted: Found, roundings: float) -> float:
        """The share of rollouts of a batch, computed in two ways, that agree within some roundings."""

    @property
    def bytes(self) -> int:
        """Memory that it holds on its device."""
        return self._pool_bytes + sum(tensor.nbytes for tensor in self.tensors())

    def record_or_replay(self, load: Callable[[], None], walk: Callable[[Callable[[Pass], None]], Found]) -> Found:
        """What a batch gives; its passes are recorded, compared or replayed.

        Args:
            load: sets the tensors to the batch.
            walk: runs its passes by what it is given, and returns a copy of what they gave.

        Raises:
            RunError: replayed passes do not give what the same passes give when they are run.
        """
        met: dict[Pass, None] = {}  # in the order in which they were first run

        def run(passes: Pass, replayed: Collection[Pass]) -> None:
            if passes in replayed:
                self._replays[passes]()
            else:
                met[passes] = None
                self.run(passes)

        load()
        found = walk(partial(run, replayed=self.trusted))
        if recorded := [passes for passes in met if passes in self._replays]:
            self.clear()
            load()
            self.check(walk(partial(run, replayed=self._replays)), found, _REPLAYED, "when they are replayed")
            self.trusted.update(recorded)
        new = [passes for passes in met if passes not in self._replays]
        for passes in new[: MAX_RECORDED - len(self._replays)]:
            self._record(passes)
        return found

    def check(self, found: Found, wanted: Found, limits: Sequence[tuple[float, float]], where: str) -> None:
        """Check that enough of a batch's rollouts agree.

        Args:
            found: the batch.
            wanted: the same, computed otherwise.
            limits: roundings, and the least share, in float32 and in half precision.
            where: rollouts differ, in the error.

        Raises:
            RunError: the share is less.
        """
        roundings, least = limits[self._dtype.itemsize < 4]
        agreeing = self.agreement(found, wanted, roundings)
        if agreeing < least:
            raise RunError(f"{1 - agreeing:.1%} of the rollouts differ {where}")

    def _record(self, passes: Pass) -> None:
        self.restore()
        tensors = self.tensors()
        before = unreturnable_bytes(tensors[0].device)
        self._replays[passes] = self._recorder.record(partial(self.run, passes), tensors)
        self._pool_bytes += max(0, unreturnable_bytes(tensors[0].device) - before)


class Recordings:
    """The buckets of a device, within a share of its memory.

    The first batch of a bucket runs as without graphs, since recording costs more than one batch saves. The second one
    is recorded, the third one is compared, later ones are replayed.

    Attributes:
        new_recorder: makes what records the passes of a bucket.
        buckets: by what their batches share; the one that was made first comes first.
        refused: buckets whose batches run without graphs from now on.
        max_bytes: that all of them may hold; None until the first of them is made.
    """

    def __init__(
        self,
        device: torch.device | str,
        *,
        needed: bool = False,
        share: float = ROLLOUTS_SHARE,
        new_recorder: Callable[[], CudaRecorder] = CudaRecorder,
        max_bytes: float | None = None,
    ) -> None:
        """Record nothing yet.

        Args:
            device: where.
            needed: record the first batch of a bucket already, and let a failure be an error; otherwise batches run
                without graphs where they fail, and that is said.
            share: of what is free when the first bucket is made, for all of them.
            new_recorder: see above.
            max_bytes: in place of `share`.
        """
        self._device, self._needed, self._share = device, needed, share
        self.new_recorder, self.max_bytes = new_recorder, max_bytes
        self.buckets: dict[Hashable, Bucket[Any, Any]] = {}
        self._met: set[Hashable] = set()
        self.refused: set[Hashable] = set()
        self._failed = False  # for another reason than memory, so that other batches would fail too

    def usable(self, computation: Computation) -> bool:
        """Whether a model that is computed so can be recorded.

        Raises:
            RunError: it cannot, and graphs are needed.
        """
        if computation.attention == "shared-prefix":
            return True
        if self._needed:
            raise RunError(f"engine.graph=on: not with transformers' own attention ({computation.reason})")
        return False

    def compute(
        self,
        key: Hashable,
        usual: Callable[[], Found],
        fixed: Callable[[Kept | None], tuple[Kept, Found]],
    ) -> Found:
        """What a batch gives.

        Args:
            key: what it shares with the others of its bucket.
            usual: computes it without graphs.
            fixed: computes it in a bucket; None makes one.

        Raises:
            RunError: graphs are needed, and it cannot be recorded or gives something else.
        """
        if self._failed or key in self.refused:
            return usual()
        if not self._needed and key not in self._met:
            self._met.add(key)
            return usual()
        if self.max_bytes is None:
            self.max_bytes = self._share * free_bytes(self._device)
        try:
            return self._compute_fixed(key, usual, fixed)
        except Exception as error:  # recording may raise anything; what is wrong without it too is raised below
            self.buckets.pop(key, None)
            self.refused.add(key)
            why, no_memory = str(error).splitlines()[0] if str(error) else type(error).__name__, is_out_of_memory(error)
            if self._needed and not no_memory:
                raise RunError(f"engine.graph=on: {why}") from error
            self._failed = not no_memory
            which = "batches like this one" if no_memory else "batches"
            log.warning("%s run without CUDA graphs, which is slower (%s)", which, why)
            traceback.clear_frames(error.__traceback__)  # they hold the tensors of the bucket
        return usual()

    def _compute_fixed(
        self,
        key: Hashable,
        usual: Callable[[], Found],
        fixed: Callable[[Any], tuple[Bucket[Any, Found], Found]],
    ) -> Found:
        known = self.buckets.get(key)
        bucket, found = fixed(known)
        if known is None:
            bucket.check(found, usual(), _OTHER_ORDER, "in tensors of fixed sizes")
            self.buckets[key] = bucket
        self._evict(key)
        return found

    def _evict(self, key: Hashable) -> None:
        """Drop the oldest buckets until the others hold no more than is allowed, at last the one that was used now.

        What is dropped is not recorded again: sizes that come in turn would drop each other each time.
        """
        assert self.max_bytes is not None
        while self.buckets and sum(bucket.bytes for bucket in self.buckets.values()) > self.max_bytes:
            oldest = next(iter(self.buckets))
            del self.buckets[oldest]
            self.refused.add(oldest)
            if oldest == key:
                log.info("batches of these sizes are too large to be recorded and run without CUDA graphs: %s", key)
