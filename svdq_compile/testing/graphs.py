"""Watching what ``torch.compile`` does."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch._dynamo.utils import counters

from ..passes.base import Report
from ..passes.insert_linear import insert_linear
from ..passes.pipeline import rewrite


def captured(function: Callable, *inputs: object) -> torch.fx.GraphModule:
    """The graph Dynamo hands to a backend for a call, before anything was done to it."""
    graphs = []

    def keep(gm: torch.fx.GraphModule, example_inputs: list) -> Callable:
        graphs.append(gm)
        return gm.forward

    torch.compile(function, backend=keep, fullgraph=True)(*inputs)
    (gm,) = graphs
    return gm


class RecordingBackend:
    """The ``svdq`` backend, keeping the rewritten graphs.

    Each compilation calls the backend once, so ``len(recorder.reports)`` counts them.

    Args:
        lower: whether Inductor compiles the rewritten graphs; without it they run as they are.
        options: options for every compilation.
    """

    def __init__(self, *, lower: bool = True, **options: object) -> None:
        self.lower = lower
        self.options = options
        self.reports: list[Report] = []
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, gm: torch.fx.GraphModule, example_inputs, **kwargs):
        self.reports.append(insert_linear(gm))
        self.graphs.append(gm)
        if not self.lower:
            return gm.forward
        return torch._dynamo.lookup_backend("svdq")(gm, example_inputs, options=self.options or None, **kwargs)

    def count(self, target: object) -> int:
        """How many nodes of all graphs call ``target``."""
        return sum(len(g.graph.find_nodes(op="call_function", target=target)) for g in self.graphs)


class PassRecorder(RecordingBackend):
    """All passes of the ``svdq`` backend, whose graphs run as they are; ``reports`` holds those of all passes, by name.

    Args:
        name: the pass that ``report`` is about.
    """

    def __init__(self, name: str) -> None:
        super().__init__(lower=False)
        self.name = name

    def __call__(self, gm: torch.fx.GraphModule, example_inputs, **kwargs):
        self.reports.append(rewrite(gm))
        self.graphs.append(gm)
        return gm.forward

    @property
    def report(self) -> Report:
        """Of the only graph."""
        (reports,) = self.reports
        return reports[self.name]

    @property
    def reasons(self) -> list[str]:
        """Why the pass left what it left in the only graph."""
        return [reason for _, reason in self.report.left]


def unique_graphs() -> int:
    """Graphs Dynamo has compiled since its counters were cleared."""
    return counters["stats"]["unique_graphs"]
