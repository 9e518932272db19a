"""A backend that runs the passes and keeps what they did."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from ..passes.base import Report
from ..passes.pipeline import rewrite


class Recorder:
    """A backend of ``torch.compile`` that rewrites graphs and runs them as they are.

    Args:
        name: the pass that ``report`` is about.
    """

    def __init__(self, name: str):
        self.name = name
        self.reports: list[dict[str, Report]] = []
        self.graphs: list[fx.GraphModule] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: list[torch.Tensor]) -> Callable:
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

    def count(self, target: object) -> int:
        """Calls of a function in all graphs."""
        return sum(len(gm.graph.find_nodes(op="call_function", target=target)) for gm in self.graphs)
