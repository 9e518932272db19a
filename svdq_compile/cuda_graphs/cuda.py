"""Real CUDA graphs in one shared memory pool.

The pool may be shared because replays never overlap: each waits for the one before, on whatever stream that ran, and
whoever replays copies the outputs away before the next. A replay may therefore overwrite anything another graph left
in the pool, outputs included, but nothing that is still needed. Inputs lie outside the pool.
"""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .._compat import cudagraph_tree_runs
from .refusal import Refused

WARM_UPS = 2
"""Runs before the one that is watched: the first compiles, the second makes what is made lazily."""
OWN_GRAPHS = "torch.compile already runs it by CUDA graphs (mode='reduce-overhead'); compile without"
SYNC_MESSAGE = "called a synchronizing CUDA operation"
"""Of the warning that ``torch.cuda.set_sync_debug_mode("warn")`` gives."""


class Recording:
    """One captured graph.

    Args:
        graph: the captured graph.
        closed: called after it is given back.
        outputs: what the function returned; its tensors are in the pool and belong to the latest replay of any graph.
        nbytes: by how much the capture made the pool grow.
    """

    def __init__(self, graph: torch.cuda.CUDAGraph, closed: Callable[[], None], outputs: Any, nbytes: int) -> None:
        self.outputs, self.nbytes = outputs, nbytes
        self.replay = graph.replay
        self._graph, self._closed = graph, closed

    def close(self) -> None:
        """Gives the graph back; its memory returns to the pool."""
        self.outputs = None
        self._graph.reset()
        self._closed()


class CudaGraphs:
    """Captures graphs on one GPU and orders their replays.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._last_replay = torch.cuda.Event()
        self._pool, self._live = torch.cuda.graph_pool_handle(), 0
        self._generator = torch.cuda.default_generators[device.index]

    @contextlib.contextmanager
    def ordered(self) -> Iterator[None]:
        """Everything inside runs after what ran inside before, whatever the streams."""
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream()
            stream.wait_event(self._last_replay)
            try:
                yield
            finally:
                self._last_replay.record(stream)

    def record(self, function: Callable[[], Any]) -> Recording:
        """Runs a function until it is warm, then captures it.

        One call at a time in a process: what watches the function is the process's.

        Args:
            function: the computation; reads nothing from outside that moves or dies.

        Raises:
            Refused: the function synchronises, copies from pageable memory, runs Inductor's own CUDA graphs, or CUDA
                refused the capture.
            torch.OutOfMemoryError: there is too little memory. What else the function itself raises while it warms
            up is raised as it is.
        """
        with torch.cuda.device(self.device):
            caller = torch.cuda.current_stream()
            self._stream.wait_stream(caller)
            try:
                with torch.cuda.stream(self._stream):
                    self._warm_up(function)
                    return self._capture(function)
            finally:
                caller.wait_stream(self._stream)

    def pool_nbytes(self) -> int:
        """Bytes of GPU memory the pool holds now."""
        return sum(s["total_size"] for s in torch.cuda.memory_snapshot() if tuple(s["segment_pool_id"]) == self._pool)

    def renew(self) -> None:
        """Gives the memory of the old pool back, once every graph of it is closed."""
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()

    def finish(self) -> None:
        """Waits for every replay."""
        torch.cuda.synchronize(self.device)

    def _warm_up(self, function: Callable[[], Any]) -> None:
        with cudagraph_tree_runs() as runs:
            try:
                for _ in range(WARM_UPS):
                    function()
                drawn = self._generator.get_offset()
                with synchronisations() as found:
                    function()
            except RuntimeError as error:
                # Inductor's graphs raise where one run follows another without a step between them.
                if runs and not isinstance(error, torch.OutOfMemoryError):
                    raise Refused(OWN_GRAPHS) from error
                raise
        if self._generator.get_offset() != drawn:
            raise Refused("it draws random numbers")
        if runs:
            raise Refused(OWN_GRAPHS)
        if found:
            raise Refused(f"it waits for the GPU or copies from pageable memory at {', '.join(dict.fromkeys(found))}")

    def _capture(self, function: Callable[[], Any]) -> Recording:
        graph = torch.cuda.CUDAGraph()
        random = self._generator.clone_state()
        torch.cuda.synchronize(self.device)
        before = self.pool_nbytes()
        # A workspace cuBLAS keeps from outside could be freed under the graph; one it makes inside lies in the pool.
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        try:
            graph.capture_begin(self._pool, capture_error_mode="thread_local")
            outputs = function()
        except BaseException as error:
            self._abandon(graph, random)
            if isinstance(error, torch.OutOfMemoryError) or not isinstance(error, Exception):
                raise
            raise Refused(f"{type(error).__name__} while capturing: {error}") from error
        try:
            graph.capture_end()
        except RuntimeError as error:
            self._forget(random)
            raise Refused(f"CUDA refused the capture: {error}") from error
        finally:
            torch._C._cuda_clearCublasWorkspaces()
        self._live += 1
        return Recording(graph, self._closed, outputs, self.pool_nbytes() - before)

    def _closed(self) -> None:
        self._live -= 1
        self._leave_empty_pool()

    def _leave_empty_pool(self) -> None:
        # The allocator serves a pool that has lost its last graph no more.
        if not self._live:
            self._pool = torch.cuda.graph_pool_handle()

    def _abandon(self, graph: torch.cuda.CUDAGraph, random: torch.Generator) -> None:
        """Ends a capture whose function raised."""
        try:
            graph.capture_end()
        except RuntimeError:
            self._forget(random)
        else:
            graph.reset()
            self._leave_empty_pool()
        finally:
            torch._C._cuda_clearCublasWorkspaces()

    def _forget(self, random: torch.Generator) -> None:
        """Undoes what a failed ``capture_end`` leaves: the allocator serves the pool, the generator awaits an end."""
        forget_capture(self.device, self._pool)
        self._generator.graphsafe_set_state(random)
        self._leave_empty_pool()


def forget_capture(device: torch.device, pool: tuple[int, int]) -> None:
    """Makes the allocator forget a capture that failed; without this torch 2.11's ``empty_cache`` asserts from then on.

    The device's default generator, which such a capture also leaves unusable, stays so until its state is set.

    Args:
        device: the GPU.
        pool: the one of the capture.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    # Raises where the capture was ended in order, or never began: then nothing is left to forget.
    with contextlib.suppress(RuntimeError, AttributeError):
        torch._C._cuda_endAllocateToPool(index, pool)
        torch._C._cuda_releasePool(index, pool)


@contextlib.contextmanager
def synchronisations() -> Iterator[list[str]]:
    """Collects where this thread makes the host wait for the GPU, as ``file:line``."""
    found: list[str] = []
    thread = threading.get_ident()
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("always", message=SYNC_MESSAGE)
        warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
        passed_on = warnings.showwarning

        def show(message, category, filename, lineno, file=None, line=None):
            if not str(message).startswith(SYNC_MESSAGE):
                passed_on(message, category, filename, lineno, file, line)
            elif threading.get_ident() == thread:
                found.append(f"{os.path.basename(filename)}:{lineno}")

        warnings.showwarning = show
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(mode)
