"""What a transformer is given while a pipeline runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn


class Call(NamedTuple):
    """Keyword arguments of one forward pass, and the tensor it returned."""

    inputs: dict[str, Any]
    output: torch.Tensor


@contextlib.contextmanager
def recorded(transformer: nn.Module) -> Iterator[list[Call]]:
    """A list that every forward pass adds its keyword arguments and its output to."""
    calls: list[Call] = []

    def record(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        calls.append(Call(dict(kwargs), output[0]))

    hook = transformer.register_forward_hook(record, with_kwargs=True)
    try:
        yield calls
    finally:
        hook.remove()


def spread(calls: Sequence[Call], steps: int, kept: int) -> list[Call]:
    """The calls of some denoising steps, evenly spaced from the first on.

    Args:
        calls: all of one run, as many in each step: two with guidance, one without.
        steps: denoising steps of the run.
        kept: how many of them to keep, at least.
    """
    each = len(calls) // steps
    groups = [calls[i : i + each] for i in range(0, len(calls), each)]
    return [call for group in groups[:: max(1, len(groups) // kept)] for call in group]
