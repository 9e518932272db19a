"""One contender of ``bench forward``: built, checked, timed and profiled at every size, and freed."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch._dynamo.utils import counters

from ..cuda_graphs.captured import capture
from . import compile_time, forward_models
from .clocks import ClockMonitor
from .forward_gate import References, against_eager, against_float64
from .forward_models import Contender, forward_of, make_inputs
from .forward_parts import PARTS, Breakdown, profile
from .forward_plan import ForwardPlan
from .forward_report import CAPTURED, Row
from .gate import Verdict
from .report import FAILED, SKIPPED
from .stats import percentile
from .timing import describe

log = logging.getLogger(__name__)

WARM_SECONDS = 1.0
"""Every contender runs so long before it is timed, so that clocks and heat are the same for all."""

CHECKED_BLOCKS = 2


@dataclasses.dataclass(frozen=True)
class Run:
    """What all contenders of a run share.

    Args:
        plan: made for the device.
        device: where.
        monitor: reads clocks meanwhile.
        on_breakdown: is told the kernels of every row.
    """

    plan: ForwardPlan
    device: torch.device
    monitor: ClockMonitor
    on_breakdown: Callable[[Row, Breakdown], None]

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"


@dataclasses.dataclass(frozen=True)
class Subject:
    """A contender that has been built and compiled.

    Args:
        model: what is called.
        check: ours with two blocks, compiled in the same way.
        references: per size, of ``model``'s forward before it was compiled; None for a peer.
        check_references: per size, of ``check``'s.
        weights: bytes of ``model``.
        baseline: bytes that were allocated before it was built.
    """

    model: nn.Module
    check: nn.Module | None
    references: dict[tuple[int, int], References]
    check_references: dict[tuple[int, int], References]
    weights: int
    baseline: int


def measure(run: Run, contender: Contender) -> Iterator[Row]:
    """Rows of one contender: a size each, in a CUDA graph as well if it is one of ours."""
    try:
        yield from _measure(run, contender)
    finally:
        # By now nothing holds its models.
        torch._dynamo.reset()
        release_cached(run)


def _measure(run: Run, contender: Contender) -> Iterator[Row]:
    compilation: dict[str, float] = {}
    try:
        if run.plan.compile_time and not contender.variant:
            compilation = compile_time.measure(run.plan, contender, str(run.device))
        subject = _prepare(run, contender)
    except Exception as error:
        failed = {"status": FAILED if contender.ours else SKIPPED, "note": describe(error)}
        yield from (dataclasses.replace(_row(run, contender, size), **failed) for size in run.plan.sizes)
        return
    for size in run.plan.sizes:
        if not run.plan.dynamic:
            torch._dynamo.reset()
        for row in _measure_size(run, contender, subject, size):
            yield dataclasses.replace(row, **compilation)
            compilation = {}


def _prepare(run: Run, contender: Contender) -> Subject:
    plan = run.plan
    checks, check = {}, None
    if contender.ours:
        with _stage(run, contender, "two blocks and their float64 references"):
            check = forward_models.build(contender, plan, run.device, CHECKED_BLOCKS)
            checks = {size: against_float64(check, _inputs(run, check, size)) for size in plan.sizes}
            release_cached(run)
    baseline = torch.cuda.memory_allocated(run.device) if run.gpu else 0
    with _stage(run, contender, "all blocks"):
        model = forward_models.build(contender, plan, run.device)
    references = {}
    if contender.ours:
        with _stage(run, contender, "their references"):
            references = {size: against_eager(model, _inputs(run, model, size)) for size in plan.sizes}
    weights = forward_models.weight_bytes(model)
    compiled = [None if m is None else forward_models.compile_model(m, contender, plan) for m in (model, check)]
    release_cached(run)
    return Subject(*compiled, references, checks, weights, baseline)


def _measure_size(run: Run, contender: Contender, subject: Subject, size: tuple[int, int]) -> Iterator[Row]:
    row = dataclasses.replace(_row(run, contender, size), weights_gb=subject.weights / 1e9)
    counters.clear()
    begin = time.perf_counter()
    try:
        errors, verdict = {}, Verdict(True)
        if subject.check is not None:
            verdict = subject.check_references[size].judge(subject.check(**_inputs(run, subject.check, size))[0])
            errors["block_error"] = verdict.error
        forward = forward_of(subject.model, _inputs(run, subject.model, size))
        y = forward()
        _synchronize(run)
        errors["first_s"] = time.perf_counter() - begin
        errors["graphs"] = counters["stats"]["unique_graphs"]
        if subject.references and verdict.passed:
            verdict = subject.references[size].judge(y)
            errors["relative_error"] = verdict.error
        elif not subject.references and not bool(y.isfinite().all()):
            verdict = Verdict(False, reason="the result is not finite")
        row = dataclasses.replace(row, **errors)
        if not verdict.passed:
            yield dataclasses.replace(row, status=FAILED, note=verdict.reason)
            return
        with _stage(run, contender, "timing"):
            row = _timed(run, row, subject, forward)
    except Exception as error:
        _synchronize(run)
        yield dataclasses.replace(row, status=FAILED if contender.ours else SKIPPED, note=describe(error))
        return
    yield row
    if contender.ours and run.plan.capture and run.gpu:
        yield _captured(run, row, subject, forward, y)


def _timed(run: Run, row: Row, subject: Subject, forward: Callable[[], torch.Tensor]) -> Row:
    """The row with times, parts, memory and clocks."""
    begin = time.monotonic()
    if run.gpu:
        torch.cuda.reset_peak_memory_stats(run.device)
    samples = time_forward(forward, run.device, run.plan.repeats)
    clocks = run.monitor.since(begin)
    row = dataclasses.replace(
        row,
        p20_ms=percentile(samples, 20),
        p50_ms=percentile(samples, 50),
        p80_ms=percentile(samples, 80),
        samples=len(samples),
    )
    if clocks is not None:
        readings = {"sm_mhz": clocks.sm, "temperature_c": clocks.temperature, "power_w": clocks.power}
        row = dataclasses.replace(row, **readings)
    if not run.gpu:
        return row
    row = dataclasses.replace(row, peak_gb=(torch.cuda.max_memory_allocated(run.device) - subject.baseline) / 1e9)
    begin = time.perf_counter()
    found = profile(forward)
    log.info("profiling took %.1f s", time.perf_counter() - begin)
    row = dataclasses.replace(
        row,
        gpu_ms=found.total,
        launches=found.launches,
        launches_per_block=found.launches / row.blocks,
        **{f"{part}_ms": found.ms(part) for part in PARTS},
    )
    run.on_breakdown(row, found)
    return row


def _captured(run: Run, row: Row, subject: Subject, forward: Callable[[], torch.Tensor], expected) -> Row:
    """The same in one CUDA graph, whose result must have the same bits."""
    row = Row(**{name: getattr(row, name) for name in _IDENTITY}, how=CAPTURED, weights_gb=row.weights_gb)
    handle = None
    try:
        begin = time.perf_counter()
        handle = capture(subject.model, strict=True)
        results = [forward().clone() for _ in range(2)]
        first = time.perf_counter() - begin
        row = dataclasses.replace(row, first_s=first, pool_gb=handle.report().pool_nbytes / 1e9)
        if not all(torch.equal(y, expected) for y in results):
            return dataclasses.replace(row, status=FAILED, note="the result differs from that outside the graph")
        return _timed(run, row, subject, forward)
    except Exception as error:
        _synchronize(run)
        return dataclasses.replace(row, status=FAILED, note=describe(error))
    finally:
        if handle is not None:
            handle.release()


def time_forward(
    forward: Callable[[], object], device: torch.device, repeats: int, warm_seconds: float = WARM_SECONDS
) -> list[float]:
    """Milliseconds of forwards that follow each other without a pause, as in a denoising loop.

    On a GPU from events around each; the CPU may run ahead, and where it cannot the gaps count. For warm_seconds, and
    at least once, it runs untimed before.
    """
    begin = time.perf_counter()
    while True:
        forward()
        if device.type != "cuda":
            break
        torch.cuda.synchronize(device)
        if time.perf_counter() - begin >= warm_seconds:
            break
    if device.type != "cuda":
        samples = []
        for _ in range(repeats):
            begin = time.perf_counter()
            forward()
            samples.append(1e3 * (time.perf_counter() - begin))
        return samples
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    # One more comes first, so that the CPU is ahead when the clock starts.
    forward()
    for event in events[:-1]:
        event.record()
        forward()
    events[-1].record()
    torch.cuda.synchronize(device)
    return [first.elapsed_time(second) for first, second in itertools.pairwise(events)]


_IDENTITY = (
    *("model", "blocks", "height", "width", "batch", "text", "rank"),
    *("contender", "mode", "storage", "variant"),
)


def _row(run: Run, contender: Contender, size: tuple[int, int]) -> Row:
    plan = run.plan
    return Row(
        model=plan.model,
        blocks=forward_models.config_of(plan)["num_layers"],
        height=size[0],
        width=size[1],
        batch=plan.batch,
        text=plan.text,
        rank=plan.rank if contender.ours and contender.low_rank else 0,
        contender=contender.name,
        mode=contender.mode,
        storage=contender.storage,
        variant=contender.variant,
    )


def _inputs(run: Run, model: nn.Module, size: tuple[int, int]) -> dict[str, Any]:
    return make_inputs(model, run.plan, size, run.plan.text, run.device)


@contextlib.contextmanager
def _stage(run: Run, contender: Contender, name: str) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    _synchronize(run)
    log.info("%s: %s took %.1f s", contender.label, name, time.perf_counter() - begin)


def release_cached(run: Run) -> None:
    """Gives back what nothing holds any more."""
    gc.collect()
    if run.gpu:
        torch.cuda.empty_cache()


def _synchronize(run: Run) -> None:
    """Raises where an error has left the device unusable, since every further result would be an error too."""
    if run.gpu:
        torch.cuda.synchronize(run.device)
