"""Three ways to run a callable several times with a clock around each run."""

from __future__ import annotations

import abc
import time
from collections.abc import Callable

import torch


class Runner(abc.ABC):
    """One turn is :meth:`start`, a synchronisation, then :meth:`collect`."""

    method: str
    note: str = ""

    @abc.abstractmethod
    def start(self) -> None:
        """Runs the callable several times, or enqueues that."""

    @abc.abstractmethod
    def collect(self) -> list[float]:
        """Microseconds of each run of the last turn."""


class ClockRunner(Runner):
    """Wall clock, for a CPU."""

    method = "clock"

    def __init__(self, function: Callable[[], object], runs: int):
        self._function, self._runs = function, runs
        self._times: list[float] = []

    def start(self) -> None:
        self._times = []
        for _ in range(self._runs):
            begin = time.perf_counter()
            self._function()
            self._times.append((time.perf_counter() - begin) * 1e6)

    def collect(self) -> list[float]:
        return self._times


class _EventRunner(Runner):
    """Runs on a stream, between events."""

    def __init__(self, function: Callable[[], object], runs: int, flush: Callable[[], None], stream, **event_options):
        self._function, self._flush, self._stream = function, flush, stream
        self._events = [
            tuple(torch.cuda.Event(enable_timing=True, **event_options) for _ in range(2)) for _ in range(runs)
        ]

    def _enqueue(self) -> None:
        for begin, end in self._events:
            self._flush()
            begin.record()
            self._function()
            end.record()

    def collect(self) -> list[float]:
        return [begin.elapsed_time(end) * 1e3 for begin, end in self._events]


class StreamRunner(_EventRunner):
    """Launches every run anew. The flush before it gives the CPU time to get ahead, but not always enough."""

    method = "stream"

    def __init__(self, function: Callable[[], object], runs: int, flush: Callable[[], None], stream, note: str = ""):
        super().__init__(function, runs, flush, stream)
        self.note = note

    def start(self) -> None:
        with torch.cuda.stream(self._stream):
            self._enqueue()


class GraphRunner(_EventRunner):
    """Replays a graph that holds all runs and their events; allocations of the callable live in its pool.

    Args:
        stream: the current one, on which the callable has been warmed up.
        pool: a fresh ``torch.cuda.graph_pool_handle()``.

    Raises:
        TypeError: this torch has no external events, the only ones a graph can record for timing.
        RuntimeError: the callable does something that cannot be captured. Call
            :func:`svdq_compile.cuda_graphs.cuda.forget_capture` then.
    """

    method = "graph"

    def __init__(self, function: Callable[[], object], runs: int, flush: Callable[[], None], stream, pool):
        super().__init__(function, runs, flush, stream, external=True)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool, stream=stream):
            self._enqueue()

    def start(self) -> None:
        with torch.cuda.stream(self._stream):
            self._graph.replay()
