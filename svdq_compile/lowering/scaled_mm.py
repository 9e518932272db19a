"""cuBLAS's e4m3 GEMM with our low-rank branch behind it: what ``max-autotune`` weighs the template against.

It rounds the residual product to the result's dtype before the low-rank product is added, and fuses no epilogue.
"""

from __future__ import annotations

import torch

from .._compat import ExternKernelChoice


def svdq_scaled_mm(
    x: torch.Tensor,
    w: torch.Tensor,
    scale_b: torch.Tensor,
    *optional: torch.Tensor,
    out: torch.Tensor,
    parts: tuple[str, ...],
    factor_a: float,
    factor_b: float,
) -> torch.Tensor:
    """``(x @ w.T) * (factor_a * scale_a * factor_b * scale_b) + h @ L1.T + bias`` into out [M, N].

    Args:
        x: float8_e4m3fn [M, K], contiguous.
        w: float8_e4m3fn [N, K], contiguous.
        scale_b: float32, one value.
        optional: the inputs ``parts`` names, as :data:`svdq_compile.lowering.templates.OPTIONAL` describes them;
            SCALE_A is among them and has one value.
    """
    given = dict(zip(parts, optional, strict=True))
    bias = given.get("BIAS")
    scale_a, scale_b = given["SCALE_A"] * factor_a, scale_b * factor_b
    torch._scaled_mm(x, w.t(), scale_a, scale_b, bias=bias, out_dtype=out.dtype, use_fast_accum=True, out=out)
    if "UP" in given:
        up = given["UP"]
        out.addmm_(given["PARTIALS"].sum(0).to(up.dtype), up.t())
    return out


CHOICE = ExternKernelChoice(svdq_scaled_mm, None, name="svdq_scaled_mm", has_out_variant=True)
