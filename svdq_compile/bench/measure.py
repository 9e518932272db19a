"""Candidates of one case, timed in turns and compared with each other."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence

from .clocks import ClockMonitor
from .layers import Layer
from .peers import PEERS
from .report import FAILED, OK, SKIPPED, Row
from .roofs import Roofs, Work
from .stats import ratio
from .timing import Timer, Timing

COMPARISONS = dict(zip(PEERS, ("speedup_bf16", "speedup_fp8_gemm", "speedup_fp8_rowwise")))
"""Peer -> the column that compares with it."""


@dataclasses.dataclass(frozen=True)
class Bench:
    """What all cases of a run share.

    Args:
        timer: times everything.
        roofs: this device's rates.
        rounds: turns of each candidate.
        monitor: reads clocks meanwhile.
        variants: (mode, storage) of the operator.
    """

    timer: Timer
    roofs: Roofs
    rounds: int
    monitor: ClockMonitor
    variants: tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Something to be timed.

    Args:
        name: the row's ``candidate``.
        run: what is timed; None for nothing.
        work: what it must do at least.
        mode: compute mode.
        storage: weight storage.
        flops: operations its TFLOP/s count; NaN for a part that is no product.
        status: ``FAILED`` for a wrong result, which is not timed.
        error: relative error of its result.
        note: for the reader.
    """

    name: str
    run: Callable[[], object] | None
    work: Work
    mode: str = ""
    storage: str = ""
    flops: float = math.nan
    status: str = OK
    error: float = math.nan
    note: str = ""

    @property
    def key(self) -> str:
        return f"{self.name}/{self.mode}/{self.storage}"


def time_all(bench: Bench, layer: Layer, tokens: int, kind: str, candidates: Sequence[Candidate]) -> list[Row]:
    """One row a candidate, in the order given.

    Args:
        bench: the run.
        layer: whose sizes the rows carry.
        tokens: M.
        kind: the rows' kind.
        candidates: of different names, modes or storages; those called as a peer are compared with.

    Raises:
        RuntimeError: the device no longer works.
    """
    begin = time.monotonic()
    runnable = {c.key: c.run for c in candidates if c.run is not None and c.status == OK}
    times = bench.timer.time(runnable, bench.rounds)
    clocks = bench.monitor.since(begin)
    medians = {c.name: times[c.key].at(50) for c in candidates if c.name in COMPARISONS and c.key in times}
    spec = layer.packed.spec
    rows = []
    for candidate in candidates:
        timing = times.get(candidate.key, Timing((), SKIPPED))
        status = candidate.status if candidate.status == FAILED or timing.samples else SKIPPED
        median = timing.at(50)
        floor, limit = bench.roofs.floor(candidate.work)
        comparisons = {column: ratio(medians.get(peer, math.nan), median) for peer, column in COMPARISONS.items()}
        row = Row(
            kind=kind,
            in_features=spec.in_features,
            out_features=spec.out_features,
            tokens=tokens,
            rank=spec.rank,
            candidate=candidate.name,
            mode=candidate.mode,
            storage=candidate.storage,
            status=status,
            p20_us=timing.at(20),
            p50_us=median,
            p80_us=timing.at(80),
            samples=len(timing.samples),
            method=timing.method,
            floor_us=floor,
            limit=limit,
            tflops=ratio(candidate.flops, median) * 1e-6,
            roof_percent=100 * ratio(floor, median),
            **comparisons,
            relative_error=candidate.error,
            sm_mhz=clocks.sm if clocks else math.nan,
            temperature_c=clocks.temperature if clocks else math.nan,
            power_w=clocks.power if clocks else math.nan,
            note="; ".join(text for text in (candidate.note, timing.note) if text),
        )
        rows.append(row)
    return rows
