"""The rates no linear can beat, measured on the card at hand, and the time they allow for some work."""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F

from .peers import scaled_mm
from .stats import number, ratio
from .timing import Timer

GEMM_SIZE = 8192
COPY_BYTES = 2 * 2**30


@dataclasses.dataclass(frozen=True)
class Work:
    """What must be done at least.

    Args:
        bf16: operations of BF16 products, a multiplication and an addition counting two.
        fp8: the same of FP8 products.
        bytes: each input read once, each output written once.
    """

    bf16: float = 0.0
    fp8: float = 0.0
    bytes: float = 0.0


@dataclasses.dataclass(frozen=True)
class Roofs:
    """Measured rates; NaN for one this device does not have.

    Args:
        bf16: operations per second of a large BF16 product.
        fp8: of a large FP8 product with fast accumulation.
        bandwidth: bytes per second of a large copy, read and written ones.
    """

    bf16: float
    fp8: float
    bandwidth: float

    def floor(self, work: Work) -> tuple[float, str]:
        """Least microseconds some work takes, and whether ``compute`` or ``memory`` says so."""
        compute = sum(ratio(count, rate) for count, rate in ((work.bf16, self.bf16), (work.fp8, self.fp8)) if count)
        memory = ratio(work.bytes, self.bandwidth)
        # NaN, a missing rate, must win.
        limit = "memory" if compute < memory else "compute"
        return 1e6 * (memory if limit == "memory" else compute), limit

    def __str__(self) -> str:
        bf16, fp8 = (number(rate / 1e12, 1) for rate in (self.bf16, self.fp8))
        return f"BF16 {bf16} TFLOP/s, FP8 {fp8} TFLOP/s, copy {number(self.bandwidth / 1e9, 0)} GB/s"


def measure(timer: Timer, rounds: int, size: int = GEMM_SIZE, copy_bytes: int = COPY_BYTES) -> Roofs:
    """Measures the rates from medians, on random data: zeros let a GPU clock higher.

    Args:
        timer: times them as everything else is timed.
        rounds: turns each.
        size: M, N and K of the products.
        copy_bytes: bytes of the tensor that is copied.
    """
    device = timer.device
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator, device=device, dtype=torch.bfloat16) for _ in range(2))
    a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
    one = torch.ones((), device=device)
    source = torch.randn(copy_bytes // 4, generator=generator, device=device)
    target = torch.empty_like(source)
    times = timer.time(
        {
            "bf16": lambda: F.linear(a, b),
            "fp8": lambda: scaled_mm(a8, b8, one, one, None),
            # By a kernel: the copy engine, which copy_ may use, is slower.
            "copy": lambda: torch.neg(source, out=target),
        },
        rounds,
    )
    operations = 2.0 * size**3
    medians = {name: time.at(50) * 1e-6 for name, time in times.items()}
    return Roofs(
        ratio(operations, medians["bf16"]),
        ratio(operations, medians["fp8"]) if device.type == "cuda" else math.nan,
        ratio(2.0 * source.numel() * source.element_size(), medians["copy"]),
    )


def empty_interval(timer: Timer, rounds: int) -> float:
    """Median microseconds the method reports for doing nothing; part of every other time."""
    return timer.time({"nothing": lambda: None}, rounds)["nothing"].at(50)
