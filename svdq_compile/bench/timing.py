"""How long the GPU takes for a callable: cold L2 cache, no launch overhead, candidates in turns.

A CUDA graph holds, ``runs`` times: empty the L2 cache, record an event, the callable, record an event. Replaying it
gives ``runs`` samples that hold no work of the CPU. What cannot be captured is launched on a stream with the same
events around it, which the samples' ``method`` says. On a CPU it is the wall clock.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch

from ..cuda_graphs.cuda import forget_capture
from .runners import ClockRunner, GraphRunner, Runner, StreamRunner
from .stats import percentile

RUNS = 10
WARM_UPS = 3
FLUSH_BYTES = 256 * 2**20
L2_COPIES = 3


@dataclasses.dataclass(frozen=True)
class Timing:
    """Times of one candidate.

    Args:
        samples: microseconds each; none if the candidate could not be run.
        method: ``graph``, ``stream`` or ``clock``; ``-`` if it could not be run.
        note: why it could not be run or captured.
    """

    samples: tuple[float, ...]
    method: str
    note: str = ""

    def at(self, percent: float) -> float:
        """A percentile in microseconds; NaN without samples."""
        return percentile(self.samples, percent)


class Timer:
    """Times callables on one device, all in the same way.

    Args:
        device: where the callables work.
        runs: samples one turn of a candidate gives.
        flush: ``write`` fills a buffer larger than the L2 cache, as ``triton.testing.do_bench`` does, and leaves lines
            behind that must be written back while the callable runs; ``read`` reads such a buffer, which leaves clean
            ones.
    """

    def __init__(self, device: torch.device, runs: int = RUNS, flush: str = "read"):
        self.device = device
        self.runs = runs
        self.flush_mode = flush
        self.stream = None
        if device.type == "cuda":
            size = max(FLUSH_BYTES, L2_COPIES * l2_bytes(device))
            self._buffer = torch.zeros(size // 4, dtype=torch.float32, device=device)
            self._sum = torch.zeros((), dtype=torch.float32, device=device)
            self.stream = torch.cuda.Stream(device)

    def flush(self) -> None:
        """Empties the L2 cache, in stream order."""
        if self.flush_mode == "read":
            torch.sum(self._buffer, dim=0, out=self._sum)
        else:
            self._buffer.zero_()

    def time(self, candidates: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Timing]:
        """Lets the candidates take turns, so that clocks and heat are the same for all.

        Args:
            candidates: name -> callable without arguments. One that raises is reported, not raised.
            rounds: turns of each candidate; one more comes before them and does not count.

        Raises:
            RuntimeError: the device no longer works.
        """
        ready: dict[str, Runner] = {}
        failed: dict[str, Timing] = {}
        for name, function in candidates.items():
            runner = self._runner(function)
            if isinstance(runner, Runner):
                ready[name] = runner
            else:
                failed[name] = Timing((), "-", runner)
        samples: dict[str, list[float]] = {name: [] for name in ready}
        names = list(ready)
        for turn in range(rounds + 1 if names else 0):
            first = turn % len(names)
            order = names[first:] + names[:first]
            for name in order:
                ready[name].start()
            self._synchronize()
            for name in order:
                times = ready[name].collect()
                if turn:
                    samples[name] += times
        times = {name: Timing(tuple(samples[name]), r.method, r.note) for name, r in ready.items()}
        return {name: times.get(name) or failed[name] for name in candidates}

    def _runner(self, function: Callable[[], object]) -> Runner | str:
        """What runs a callable, or why nothing can."""
        try:
            self._warm_up(function)
        except Exception as error:
            self._synchronize()
            return describe(error)
        if self.stream is None:
            return ClockRunner(function, self.runs)
        pool = torch.cuda.graph_pool_handle()
        try:
            with torch.cuda.stream(self.stream):
                runner = GraphRunner(function, self.runs, self.flush, self.stream, pool)
                runner.start()
            self._synchronize()
            runner.collect()
            return runner
        except Exception as error:
            # Of a failed capture the interesting error is the one that ended it.
            why = describe(error.__context__ or error)
        # The default generator stays unusable; benchmarks draw from generators of their own.
        forget_capture(self.device, pool)
        self._synchronize()
        return StreamRunner(function, self.runs, self.flush, self.stream, note=f"not captured: {why}")

    def _warm_up(self, function: Callable[[], object]) -> None:
        if self.stream is None:
            function()
            return
        # On the stream of the capture, so that cuBLAS takes its workspace now and not from the graph's memory.
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            for _ in range(WARM_UPS):
                function()
        self._synchronize()

    def _synchronize(self) -> None:
        if self.stream is not None:
            torch.cuda.synchronize(self.device)


def l2_bytes(device: torch.device) -> int:
    """Size of a GPU's L2 cache; 0 where torch does not say."""
    return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0))


def describe(error: BaseException) -> str:
    """Type and first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
