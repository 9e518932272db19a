"""CUDA graphs without a GPU, with the semantics that make captures go wrong.

A recording re-executes its function on the tensors it was recorded with: inputs are read where they lay, weights are
those of the recording, outputs are written where they lay. Recording computes nothing, and a replay destroys what
every other recording of the pool left behind.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..cuda_graphs.refusal import Refused

WARM_UPS = 3


class FakeRecording:
    """One recording.

    Args:
        pool: the graphs it belongs to.
        function: what to run.
        nbytes: of the pool.
    """

    def __init__(self, pool: FakeGraphs, function: Callable[[], Any], nbytes: int) -> None:
        self.nbytes, self.closed = nbytes, False
        self._pool, self._function = pool, function
        self._weights = pool.weights()
        leaves, tree = pytree.tree_flatten(function())
        # Poisoned in any mode, and an inference tensor may be written in its own only.
        with torch.inference_mode(False):
            self._static = [torch.empty_like(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        self.poison()
        self.outputs = pytree.tree_unflatten(self._static, tree)

    def replay(self) -> None:
        assert not self.closed, "a closed graph was replayed"
        assert self._pool.depth == 1, "nothing orders this replay"
        for other in self._pool.recordings:
            other.poison()
        with self._pool.swapped(self._weights):
            leaves = pytree.tree_flatten(self._function())[0]
        for target, value in zip(self._static, leaves, strict=True):
            if isinstance(target, torch.Tensor):
                target.copy_(value)

    def poison(self) -> None:
        for tensor in self._static:
            if isinstance(tensor, torch.Tensor):
                tensor.fill_(float("nan") if tensor.is_floating_point() else -1)

    def close(self) -> None:
        self.closed = True
        self.outputs = None
        self._pool.recordings.remove(self)


class FakeGraphs:
    """Stands for :class:`svdq_compile.cuda_graphs.cuda.CudaGraphs`.

    Args:
        model: whose weights recordings hold on to.
        sizes: bytes by which each recording makes the pool grow, in turn; the last one repeats.
        refuse: why recordings are refused, or None.
        room: how many recordings there is memory for, or None.
    """

    def __init__(
        self, model: nn.Module, sizes: tuple[int, ...] = (100,), refuse: str | None = None, room: int | None = None
    ) -> None:
        self.device = next(model.parameters()).device
        self.recordings: list[FakeRecording] = []
        self.recorded, self.renewed, self.depth = 0, 0, 0
        self.refuse, self.room = refuse, room
        self._model, self._sizes = model, sizes
        self._held = 0

    def __call__(self, device: torch.device) -> FakeGraphs:
        """As the factory that ``install`` takes."""
        assert device == self.device
        return self

    def record(self, function: Callable[[], Any]) -> FakeRecording:
        for _ in range(WARM_UPS):
            function()
        if self.room is not None and len(self.recordings) >= self.room:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        if self.refuse is not None:
            raise Refused(self.refuse)
        nbytes = self._sizes[min(self.recorded, len(self._sizes) - 1)]
        recording = FakeRecording(self, function, nbytes)
        self.recordings.append(recording)
        self.recorded += 1
        self._held += nbytes
        return recording

    @contextlib.contextmanager
    def ordered(self):
        assert self.depth == 0, "two replays at once"
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1

    def pool_nbytes(self) -> int:
        return self._held

    def finish(self) -> None:
        pass

    def renew(self) -> None:
        assert not self.recordings, "the pool is in use"
        self.renewed += 1
        self._held = 0

    def weights(self) -> list[tuple[dict, dict]]:
        """Every table of parameters and buffers, and what lies there; storage is shared, objects are not."""
        tables = [t for m in self._model.modules() for t in (m._parameters, m._buffers) if t]
        with torch.inference_mode(False):
            return [(t, {k: v if v is None else _alias(v) for k, v in t.items()}) for t in tables]

    @contextlib.contextmanager
    def swapped(self, weights: list[tuple[dict, dict]]):
        """Inside, the model has these weights."""
        own = [(table, dict(table)) for table, _ in weights]
        try:
            for table, held in weights:
                table.update(held)
            yield
        finally:
            for table, held in own:
                table.update(held)


def _alias(tensor: torch.Tensor) -> torch.Tensor:
    alias = tensor.detach()
    return nn.Parameter(alias, requires_grad=False) if isinstance(tensor, nn.Parameter) else alias
