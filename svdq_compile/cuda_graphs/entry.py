"""One captured shape: inputs in, replay, outputs out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..model.rope import kept_outputs
from .arguments import Arguments
from .buffers import StaticInput
from .refusal import Refused


class Recording(Protocol):
    """A recorded computation: ``replay()`` runs it again and leaves its result in ``outputs``."""

    outputs: Any
    nbytes: int

    def replay(self) -> None:
        """Computes the outputs anew from what the inputs hold."""

    def close(self) -> None:
        """Gives its memory back to the pool."""


class Graphs(Protocol):
    """Where recordings come from; :class:`svdq_compile.cuda_graphs.cuda.CudaGraphs` is the real one."""

    def record(self, function: Callable[[], Any]) -> Recording:
        """Warms a function up and records it; Refused if it cannot be, OutOfMemoryError if there is no room."""

    def ordered(self) -> contextlib.AbstractContextManager:
        """What runs inside runs after what ran inside before."""

    def pool_nbytes(self) -> int:
        """Bytes of the pool its recordings share."""

    def finish(self) -> None:
        """Waits for every replay."""

    def renew(self) -> None:
        """Gives the pool back, once every recording is closed, for a new one."""


class Entry:
    """A forward captured for one key.

    Args:
        forward: the uncaptured call.
        rope_of: the model whose RoPE outputs are kept; None if it is compiled as a whole and must not be touched.
        arguments: the first call's; their tensors' values are the graph's first inputs.
        graphs: makes the recording.

    Raises:
        Refused: the forward cannot be captured.
    """

    def __init__(
        self, forward: Callable[..., Any], rope_of: nn.Module | None, arguments: Arguments, graphs: Graphs
    ) -> None:
        self.text = str(arguments)
        self.replays = 0
        self._inputs = [StaticInput(tensor) for tensor in arguments.tensors]
        self.input_nbytes = sum(buffer.nbytes for buffer in self._inputs)
        args, kwargs = arguments.replace(tuple(buffer.tensor for buffer in self._inputs))
        writes = _version_sum(self._inputs)
        with kept_outputs(rope_of) as self._kept:
            self._recording = graphs.record(lambda: forward(*args, **kwargs))
        self.pool_nbytes = self._recording.nbytes
        self._leaves, self._tree = pytree.tree_flatten(self._recording.outputs)
        if _version_sum(self._inputs) != writes:
            self.close()
            raise Refused("the forward writes into its arguments, which a replay would do to copies of them")

    def run(self, arguments: Arguments) -> Any:
        """The forward's result for other values; tensors of its own, which nothing overwrites later."""
        for buffer, tensor in zip(self._inputs, arguments.tensors, strict=True):
            buffer.load(tensor)
        self._recording.replay()
        self.replays += 1
        results = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in self._leaves]
        return pytree.tree_unflatten(results, self._tree)

    def close(self) -> None:
        """Gives inputs, outputs and graph back."""
        self._leaves = []
        self._inputs.clear()
        self._kept.clear()
        self._recording.close()


def _version_sum(inputs: list[StaticInput]) -> int:
    return sum(buffer.tensor._version for buffer in inputs)
