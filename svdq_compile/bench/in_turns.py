"""What the low-rank branches cost: forwards with and without them in turns.

A few percent are less than clocks and heat make of the minutes between one contender of a run and the next.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator

import torch

from ..cuda_graphs.captured import capture
from . import forward_models
from .forward_measure import Run, release_cached, time_forward
from .forward_models import Contender, forward_of, make_inputs
from .forward_report import CAPTURED
from .stats import number, percentile, ratio

FORWARDS = 4
"""Timed in a turn, behind two that are not."""


@dataclasses.dataclass(frozen=True)
class Turns:
    """Medians of one size, in milliseconds.

    Args:
        size: of the image.
        label: of the contender.
        with_ms, without_ms: a forward with and without the low-rank branches.
    """

    size: str
    label: str
    with_ms: float
    without_ms: float

    @property
    def percent(self) -> float:
        """The branches' share of the forward."""
        return 100 * ratio(self.with_ms - self.without_ms, self.with_ms)


def low_rank_cost(run: Run, contender: Contender) -> Iterator[Turns]:
    """One of ours with its branches and without, both in memory, at every size; captured where the plan captures."""
    plan = run.plan
    try:
        pair = [contender, dataclasses.replace(contender, low_rank=False)]
        models = [
            forward_models.compile_model(forward_models.build(each, plan, run.device), each, plan) for each in pair
        ]
        for size in plan.sizes:
            if not plan.dynamic:
                torch._dynamo.reset()
            forwards = [forward_of(model, make_inputs(model, plan, size, plan.text, run.device)) for model in models]
            with contextlib.ExitStack() as stack:
                for model, forward in zip(models, forwards, strict=True):
                    forward()
                    if plan.capture and run.gpu:
                        stack.callback(capture(model, strict=True).release)
                        forward()
                medians = [percentile(samples, 50) for samples in _samples(run, forwards)]
            label = f"{contender.label} {CAPTURED}" if plan.capture and run.gpu else contender.label
            yield Turns("x".join(map(str, size)), label, *medians)
    finally:
        torch._dynamo.reset()
        release_cached(run)


def _samples(run: Run, forwards: list) -> list[list[float]]:
    """Milliseconds of each forward; turns begin with another one every round."""
    samples: list[list[float]] = [[] for _ in forwards]
    for forward in forwards:
        time_forward(forward, run.device, 1)
    for turn in range(run.plan.repeats):
        for i in itertools.chain(range(turn % 2, len(forwards)), range(turn % 2)):
            samples[i] += time_forward(forwards[i], run.device, FORWARDS, warm_seconds=0)
    return samples


def turns_table(found: list[Turns]) -> str:
    """A line a size; empty if nothing was measured."""
    title = "low-rank branches"
    width = max(len(title), *(len(turns.label) for turns in found)) if found else 0
    lines = [f"{'size':9}  {title:{width}}  {'with ms':>8}  {'without ms':>10}  {'%':>5}"]
    for turns in found:
        numbers = f"{number(turns.with_ms, 2):>8}  {number(turns.without_ms, 2):>10}  {number(turns.percent, 1):>5}"
        lines.append(f"{turns.size:9}  {turns.label:{width}}  {numbers}")
    return "\n".join(lines) if found else ""
