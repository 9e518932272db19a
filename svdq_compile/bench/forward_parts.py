"""What one forward spends its time on: kernels by name, from the profiler's trace."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import pkgutil
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

PARTS = LINEARS, ATTENTION, QUANTISE, REST = "linears", "attention", "quantise", "rest"

GPU_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
"""Categories of the trace's events that occupy the GPU."""

_GENERATED = (
    (re.compile(r"^triton_tem_"), LINEARS),
    # An Inductor kernel's name lists operators; those that find a scale or round to 8 bits quantise for a peer.
    (re.compile(r"^triton_.*(amax|quanti[sz]e|float8)"), QUANTISE),
    (re.compile(r"^triton_(poi|per|red|for|mix|spl)"), REST),
)
_OTHERS = (
    (re.compile(r"sdpa|fmha|flash_fwd|flash_fprop|attention", re.IGNORECASE), ATTENTION),
    (re.compile(r"gemm|gemv|matmul|nvjet|cutlass|cublas|splitk", re.IGNORECASE), LINEARS),
)
_OURS = re.compile(r"(_\w+_kernel)(_\d+)?")
"""Inductor appends a number."""

QUANTISING = ("activation", "few", "modulation", "projection", "packed", "expand")
"""Modules of ``svdq_kernels`` whose kernels make operands or what that takes; those of all others multiply them."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """All launches of one kernel in a forward: its name, their summed milliseconds, and how many there were."""

    name: str
    ms: float
    launches: int

    @property
    def part(self) -> str:
        return part_of(self.name)


@dataclasses.dataclass(frozen=True)
class Breakdown:
    """The kernels of one forward, the longest first."""

    kernels: tuple[Kernel, ...]

    def ms(self, part: str) -> float:
        """Milliseconds of one of :data:`PARTS`."""
        return sum(kernel.ms for kernel in self.kernels if kernel.part == part)

    @property
    def total(self) -> float:
        """Milliseconds the GPU was busy."""
        return sum(kernel.ms for kernel in self.kernels)

    @property
    def launches(self) -> int:
        """Kernels, copies and fills."""
        return sum(kernel.launches for kernel in self.kernels)

    def text(self, count: int, blocks: int) -> str:
        """The longest kernels, one a line, per block.

        Args:
            count: how many lines at most.
            blocks: what is divided by.
        """
        lines = [f"{'us/block':>9}  {'launches/block':>14}  {'part':9}  kernel"]
        for kernel in self.kernels[:count]:
            per_block = f"{1e3 * kernel.ms / blocks:9.1f}  {kernel.launches / blocks:14.2f}"
            lines.append(f"{per_block}  {kernel.part:9}  {kernel.name[:110]}")
        return "\n".join(lines)


def part_of(name: str) -> str:
    """The part a kernel counts as: products of linears, attention, quantising and unpacking for them, or the rest."""
    own = _OURS.fullmatch(name)
    if own and own[1] in own_kernels():
        return own_kernels()[own[1]]
    rules = _GENERATED if name.startswith("triton_") else _OTHERS
    return next((part for pattern, part in rules if pattern.search(name)), REST)


@functools.cache
def own_kernels() -> dict[str, str]:
    """Name of each kernel of ``svdq_kernels`` -> its part."""
    import svdq_kernels

    found = {}
    for module in pkgutil.iter_modules(svdq_kernels.__path__):
        names = vars(importlib.import_module(f"{svdq_kernels.__name__}.{module.name}"))
        part = QUANTISE if module.name in QUANTISING else LINEARS
        found |= {name: part for name in names if _OURS.fullmatch(name)}
    return found


def profile(run: Callable[[], object]) -> Breakdown:
    """The kernels of one forward that has been warmed up, on a GPU."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    with record(activities=[ProfilerActivity.CUDA]) as recorded:
        run()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "trace.json")
        recorded.export_chrome_trace(str(file))
        return breakdown(json.loads(file.read_text(encoding="utf-8", errors="replace"))["traceEvents"])


def breakdown(events: Iterable[Mapping]) -> Breakdown:
    """Sums up a trace.

    Args:
        events: of a Chrome trace, with ``cat``, ``name`` and ``dur`` in microseconds.
    """
    times: dict[str, list[float]] = {}
    for event in events:
        if event.get("cat") in GPU_WORK:
            times.setdefault(event["name"], []).append(float(event["dur"]))
    kernels = (Kernel(name, 1e-3 * sum(each), len(each)) for name, each in times.items())
    return Breakdown(tuple(sorted(kernels, key=lambda kernel: -kernel.ms)))
