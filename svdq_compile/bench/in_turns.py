"""What low-rank branches cost and graph passes buy: forwards with and without each in turns.

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
        label: of the variant, which says what is switched off.
        plain_ms, variant_ms: a forward with everything, and one without that.
    """

    size: str
    label: str
    plain_ms: float
    variant_ms: float

    @property
    def change_ms(self) -> float:
        """What a forward takes more without it; negative for what costs time."""
        return self.variant_ms - self.plain_ms

    @property
    def percent(self) -> float:
        """The same as a share of the forward with everything."""
        return 100 * ratio(self.change_ms, self.plain_ms)


def against_plain(run: Run, variant: Contender) -> Iterator[Turns]:
    """One of ours with everything and a variant, both in memory, at every size; captured where the plan captures."""
    plan = run.plan
    try:
        pair = [variant.plain, variant]
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
            label = f"{variant.label} {CAPTURED}" if plan.capture and run.gpu else variant.label
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
    title = "switched off, in turns"
    width = max(len(title), *(len(turns.label) for turns in found)) if found else 0
    lines = [f"{'size':9}  {title:{width}}  {'with ms':>8}  {'without ms':>10}  {'change ms':>9}  {'%':>6}"]
    for turns in found:
        times = f"{number(turns.plain_ms, 2):>8}  {number(turns.variant_ms, 2):>10}"
        change = f"{number(turns.change_ms, 2):>9}  {number(turns.percent, 1):>6}"
        lines.append(f"{turns.size:9}  {turns.label:{width}}  {times}  {change}")
    return "\n".join(lines) if found else ""
