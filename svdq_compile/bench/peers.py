"""What a quantised linear competes with: cuBLAS on a dense weight, in BF16 and in FP8."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F

from ..spec import E4M3_MAX
from .timing import describe

PEERS = BF16, FP8_GEMM, FP8_ROWWISE = "cublas-bf16", "cublas-fp8", "cublas-fp8-rowwise"
FP8 = torch.float8_e4m3fn
TINY = 1e-12


@dataclasses.dataclass(frozen=True)
class Peer:
    """One dense linear.

    Args:
        name: one of :data:`PEERS`.
        run: computes it; None if its operands could not be made.
        note: what a reader must know about it.
    """

    name: str
    run: Callable[[], object] | None
    note: str = ""


def scaled_mm(
    a: torch.Tensor, b: torch.Tensor, scale_a: torch.Tensor, scale_b: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """``(a @ b.T) * scales + bias`` of e4m3 operands with fast accumulation, BF16 [M, N].

    Args:
        a: [M, K].
        b: [N, K].
        scale_a: float32, a scalar or [M, 1].
        scale_b: float32, a scalar or [1, N].
        bias: BF16 [N] or None.
    """
    return torch._scaled_mm(
        a, b.t(), scale_a=scale_a, scale_b=scale_b, bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 values and float32 [M, 1] scales, one per row: ``amax / 448``, as torchao's per-row FP8 linears do."""
    scale = (x.abs().amax(-1, keepdim=True).float() / E4M3_MAX).clamp(min=TINY)
    return (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(FP8), scale


def quantize_tensor(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same with one scale, a scalar."""
    scale = (x.abs().amax().float() / E4M3_MAX).clamp(min=TINY)
    return (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(FP8), scale


def peers(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> list[Peer]:
    """The dense linears on one activation.

    ``cublas-fp8`` is the product alone: operands and scales are given. ``cublas-fp8-rowwise`` quantises the activation
    first, token by token, which is what a real FP8 linear without calibration costs.

    Args:
        x: BF16 [M, K].
        weight: BF16 [N, K].
        bias: BF16 [N].
    """
    return [
        Peer(BF16, lambda: F.linear(x, weight, bias)),
        _made(FP8_GEMM, lambda: _tensorwise(x, weight, bias)),
        _made(FP8_ROWWISE, lambda: _rowwise(x, weight, bias)),
    ]


def _made(name: str, make: Callable[[], tuple[Callable[[], object], str]]) -> Peer:
    try:
        return Peer(name, *make())
    except Exception as error:
        return Peer(name, None, describe(error))


def _tensorwise(x, weight, bias):
    (a, scale_a), (b, scale_b) = quantize_tensor(x), quantize_tensor(weight)
    return lambda: scaled_mm(a, b, scale_a, scale_b, bias), ""


def _rowwise(x, weight, bias):
    b, scale_b = quantize_rows(weight)
    scale_b = scale_b.t().contiguous()
    quantize, note = _row_quantizer(x)

    def run() -> torch.Tensor:
        a, scale_a = quantize(x)
        return scaled_mm(a, b, scale_a, scale_b, bias)

    return run, note


def _row_quantizer(x: torch.Tensor) -> tuple[Callable, str]:
    """:func:`quantize_rows`, compiled for this very shape where that works."""
    if x.device.type != "cuda":
        return quantize_rows, "plain quantisation"
    # One function compiled for many shapes would run into Dynamo's recompilation limit, and then run plain, unsaid.
    torch.compiler.reset()
    try:
        compiled = torch.compile(quantize_rows, dynamic=False, fullgraph=True)
        compiled(x)
    except Exception as error:
        return quantize_rows, f"plain quantisation: {describe(error)}"
    return compiled, "compiled quantisation"
