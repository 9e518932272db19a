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
SYNC_MESSAGE = "called a synchronizing CUDA operation"
"""Of the warning that ``torch.cuda.set_sync_debug_mode("warn")`` gives."""


class Recording:
    """One captured graph.

    Args:
        graph: the captured graph.
        outputs: what the function returned; its tensors are in the pool and belong to the latest replay of any graph.
        nbytes: by how much the capture made the pool grow.
    """

    def __init__(self, graph: torch.cuda.CUDAGraph, outputs: Any, nbytes: int) -> None:
        self.outputs, self.nbytes = outputs, nbytes
        self.replay = graph.replay
        self._graph = graph

    def close(self) -> None:
        """Gives the graph back; its memory returns to the pool."""
        self.outputs = None
        self._graph.reset()


class CudaGraphs:
    """Captures graphs on one GPU and orders their replays.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._last_replay = torch.cuda.Event()
        self._pool = torch.cuda.graph_pool_handle()

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

        Args:
            function: the computation; reads nothing from outside that moves or dies.

        Raises:
            Refused: the function synchronises, copies from pageable memory, runs Inductor's own CUDA graphs, or CUDA
                refused the capture. What the function itself raises while it warms up is raised as it is.
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
        """Starts a new pool, once every graph of the old one is closed, and gives the old one's memory back."""
        torch.cuda.synchronize(self.device)
        self._pool = torch.cuda.graph_pool_handle()
        torch.cuda.empty_cache()

    def finish(self) -> None:
        """Waits for every replay."""
        torch.cuda.synchronize(self.device)

    def _warm_up(self, function: Callable[[], Any]) -> None:
        for _ in range(WARM_UPS):
            function()
        with synchronisations() as found, cudagraph_tree_runs() as runs:
            function()
        if runs:
            raise Refused("torch.compile already runs it by CUDA graphs (mode='reduce-overhead'); compile without")
        if found:
            raise Refused(f"it waits for the GPU or copies from pageable memory at {', '.join(dict.fromkeys(found))}")

    def _capture(self, function: Callable[[], Any]) -> Recording:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self.device)
        before = self.pool_nbytes()
        # A workspace cuBLAS keeps from outside could be freed under the graph; one it makes inside lies in the pool.
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        graph.capture_begin(self._pool, capture_error_mode="thread_local")
        try:
            outputs = function()
        except BaseException as error:
            self._abandon(graph)
            if not isinstance(error, Exception):
                raise
            raise Refused(f"{type(error).__name__} while capturing: {error}") from error
        try:
            graph.capture_end()
        except RuntimeError as error:
            self._forget(graph)
            raise Refused(f"CUDA refused the capture: {error}") from error
        finally:
            torch._C._cuda_clearCublasWorkspaces()
        return Recording(graph, outputs, self.pool_nbytes() - before)

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        try:
            graph.capture_end()
        except RuntimeError:
            self._forget(graph)
        else:
            graph.reset()
        finally:
            torch._C._cuda_clearCublasWorkspaces()

    def _forget(self, graph: torch.cuda.CUDAGraph) -> None:
        """Undoes what a failed ``capture_end`` leaves: the allocator still serves the pool, and counts the graph."""
        with contextlib.suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(self.device.index, self._pool)
            torch._C._cuda_releasePool(self.device.index, self._pool)
        self._pool = torch.cuda.graph_pool_handle()


@contextlib.contextmanager
def synchronisations() -> Iterator[list[str]]:
    """Collects where this thread makes the host wait for the GPU, as ``file:line``."""
    found: list[str] = []
    thread = threading.get_ident()
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        passed_on = warnings.showwarning

        def show(message, category, filename, lineno, file=None, line=None):
            if SYNC_MESSAGE not in str(message):
                passed_on(message, category, filename, lineno, file, line)
            elif threading.get_ident() == thread:
                found.append(f"{os.path.basename(filename)}:{lineno}")

        warnings.showwarning = show
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(mode)
