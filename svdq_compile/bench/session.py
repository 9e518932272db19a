"""One run of a benchmark: the environment, the roofs, every case in turn, the summary."""

from __future__ import annotations

import contextlib
import dataclasses

import torch

from ..errors import OptionError
from ..ops import modes
from . import breakdown, linear, report, roofs
from .clocks import ClockMonitor, smi_name
from .environment import block_text, environment
from .layers import make_layer
from .measure import Bench
from .plan import Plan
from .timing import RUNS, Timer

CPU_SIZES = {"size": 256, "copy_bytes": 2**20}
"""Of the roofs on a CPU, where the benchmark can be tried but says nothing."""


def run(plan: Plan, device: torch.device) -> int:
    """Measures everything the plan names, printing and writing as it goes.

    Returns:
        Exit code: 1 if a result was wrong, else 0.

    Raises:
        OptionError: no mode of the plan can compute any storage of it.
        OSError: the CSV file cannot be written.
    """
    variants = [(m, s) for m in plan.modes for s in plan.storages if s != "expanded" or m not in modes.NEEDS_CODES]
    if not variants:
        raise OptionError(f"--modes {','.join(plan.modes)} cannot compute --storage {','.join(plan.storages)}")
    with torch.no_grad(), contextlib.ExitStack() as stack:
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        file = None if plan.csv is None else stack.enter_context(open(plan.csv, "w", newline="", encoding="utf-8"))
        block = environment(device)
        say(block_text(block))
        monitor = stack.enter_context(ClockMonitor(smi_name(device)))
        timer = Timer(device, flush=plan.flush)
        bench = Bench(timer, _measure_roofs(timer, plan.rounds), plan.rounds, monitor, tuple(variants))
        say(f"{'roofs':16} {bench.roofs}\n{'method':16} {_method(bench)}\n")
        output = None if file is None else report.CsvFile(file, block | _roof_columns(bench.roofs))
        rows = _measure_all(plan, bench, output)
        say(f"\n{'roofs at the end':16} {_measure_roofs(bench.timer, plan.rounds)}")
    if not plan.parts:
        say(f"\n{report.summary(rows)}")
    wrong = sum(row.status == report.FAILED for row in rows)
    if wrong:
        say(f"\n{wrong} of {len(rows)} {report.FAILED}")
    return 1 if wrong else 0


def _measure_all(plan: Plan, bench: Bench, output: report.CsvFile | None) -> list[report.Row]:
    columns = report.PART_COLUMNS if plan.parts else report.LINEAR_COLUMNS
    measure = breakdown.measure if plan.parts else linear.measure
    say(report.header(columns))
    rows = []
    for shape in plan.shapes:
        layer = make_layer(shape, plan.rank, plan.dynamic, bench.timer.device)
        for tokens in plan.tokens:
            found = measure(bench, layer, tokens)
            say(report.table(found, columns))
            if output is not None:
                output.add(found)
            rows += found
    return rows


def _measure_roofs(timer: Timer, rounds: int) -> roofs.Roofs:
    return roofs.measure(timer, rounds, **({} if timer.device.type == "cuda" else CPU_SIZES))


def _roof_columns(found: roofs.Roofs) -> dict[str, str]:
    return {f"roof_{name}": f"{value:.4g}" for name, value in dataclasses.asdict(found).items()}


def _method(bench: Bench) -> str:
    if bench.timer.stream is None:
        return "wall clock on a CPU: the numbers mean nothing"
    empty = roofs.empty_interval(bench.timer, bench.rounds)
    return (
        f"{bench.rounds} rounds of {RUNS} runs in a CUDA graph, L2 cache flushed by {bench.timer.flush_mode}; "
        f"an empty run takes {empty:.1f} us"
    )


def say(text: str) -> None:
    """Prints at once, since a run may be cut short."""
    print(text, flush=True)
