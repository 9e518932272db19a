"""One run of ``bench forward``: the environment, every contender, and variants of ours in turns with the plain one."""

from __future__ import annotations

import contextlib
import dataclasses
import math

import torch

from ..errors import OptionError
from . import chart, report
from .clocks import ClockMonitor, smi_name
from .environment import block_text, environment
from .forward_measure import Run, measure
from .forward_models import Contender, config_of, contenders
from .forward_parts import Breakdown
from .forward_plan import BF16, FP8, ForwardPlan
from .forward_report import CAPTURED, COMPILED, TIME_COLUMNS, Row, compile_table, fitted, parts_table
from .in_turns import Turns, against_plain, turns_table
from .report import FAILED, OK
from .session import say
from .stats import ratio
from .timing import describe


def run(plan: ForwardPlan, device: torch.device) -> int:
    """Measures everything the plan names, printing and writing as it goes.

    Returns:
        Exit code: 1 if a result was wrong, else 0.

    Raises:
        OptionError: nothing is left to measure.
        OSError: the CSV file or the chart cannot be written.
    """
    plan = plan.on(device.type)
    found = contenders(plan)
    if not found:
        raise OptionError(f"--modes {','.join(plan.modes)} cannot compute --storage {','.join(plan.storages)}")
    with torch.no_grad(), contextlib.ExitStack() as stack:
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        file = None if plan.csv is None else stack.enter_context(open(plan.csv, "w", newline="", encoding="utf-8"))
        block = environment(device)
        say(f"{block_text(block)}\n{_conditions(plan, device)}\n")
        output = None if file is None else report.CsvFile(file, block | {"attention": plan.attention}, Row)
        monitor = stack.enter_context(ClockMonitor(smi_name(device)))
        columns = fitted(TIME_COLUMNS, (f"{contender.label} {CAPTURED}" for contender in found))
        say(report.header(columns))
        rows: list[Row] = []
        turns: list[Turns] = []
        shared = Run(plan, device, monitor, lambda *kernels: _say_kernels(plan, *kernels))
        for contender in found:
            for row in measure(shared, contender):
                rows.append(compared(row, rows))
                say(report.table(rows[-1:], columns))
                if output is not None:
                    output.add(rows[-1:])
            if contender.variant and _all_right(rows, contender):
                turns += _in_turns(shared, contender)
    for text in (parts_table(rows), turns_table(turns), compile_table(rows)):
        if text:
            say(f"\n{text}")
    if plan.chart is not None:
        chart.draw(rows, plan.chart)
    wrong = sum(row.status == FAILED for row in rows)
    if wrong:
        say(f"\n{wrong} of {len(rows)} {FAILED}")
    return 1 if wrong else 0


def _in_turns(shared: Run, variant: Contender) -> list[Turns]:
    """A variant and the plain one, at the sizes where both models could be had at once; else says why not."""
    found: list[Turns] = []
    try:
        found.extend(against_plain(shared, variant))
    except Exception as error:
        say(f"{variant.label} and {variant.plain.label} in turns: {describe(error)}")
    return found


def _all_right(rows: list[Row], variant: Contender) -> bool:
    """Whether every row of a variant and of the plain one could be measured."""
    pair = [(each.name, each.mode, each.storage, each.variant) for each in (variant, variant.plain)]
    return all(row.status == OK for row in rows if (row.contender, row.mode, row.storage, row.variant) in pair)


def compared(row: Row, earlier: list[Row]) -> Row:
    """The row with its speedups over the peers measured before it, or over itself."""
    peers = {r.contender: r.p50_ms for r in (*earlier, row) if r.size == row.size and r.status == OK}
    if row.status != OK:
        return row
    bf16, fp8 = (ratio(peers.get(name, math.nan), row.p50_ms) for name in (BF16, FP8))
    return dataclasses.replace(row, speedup_bf16=bf16, speedup_fp8=fp8)


def _conditions(plan: ForwardPlan, device: torch.device) -> str:
    """What the run does, in the form of the environment's lines."""
    method = "CUDA events around forwards that follow each other" if device.type == "cuda" else "wall clock on a CPU"
    if device.type != "cuda":
        method += ": the numbers mean nothing"
    how = "as a whole" if plan.whole else "block by block"
    sizes = "sizes share code" if plan.dynamic else "each size for itself"
    lines = {
        "model": f"{plan.model}, {config_of(plan)['num_layers']} blocks, batch {plan.batch}, {plan.text} prompt tokens",
        "attention": plan.attention,
        "compiled": f"{how}, {sizes}",
        "method": f"{plan.repeats} {method}",
    }
    return "\n".join(f"{name:16} {value}" for name, value in lines.items())


def _say_kernels(plan: ForwardPlan, row: Row, found: Breakdown) -> None:
    if plan.kernels and row.how == COMPILED:
        say(f"\n{row.size} {row.label}\n{found.text(plan.kernels, row.blocks)}\n")
