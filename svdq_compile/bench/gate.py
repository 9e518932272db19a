"""No time without a right result: every case is first compared with the specification in float64."""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from ..ops import reference
from ..ops.weight import SVDQWeight
from ..spec import COMPONENTS
from ..testing.oracle import assert_within_budget, relative_error

ROWS = 256


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the comparison found.

    Args:
        passed: within the budget of :mod:`svdq_compile.testing.oracle`.
        error: ``||y - oracle|| / ||oracle||``.
        reason: why not passed.
    """

    passed: bool
    error: float = math.nan
    reason: str = ""


class Bf16Products(TorchFunctionMode):
    """Inside, every ``F.linear`` is a BF16 product with a BF16 result: the specification by cuBLAS, as anyone would."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.linear:
            return func(*args, **(kwargs or {}))
        wide = args[0].dtype
        return func(*(operand.to(torch.bfloat16) for operand in args), **(kwargs or {})).to(wide)


def judge(y: torch.Tensor, x: torch.Tensor, weight: SVDQWeight, bias: torch.Tensor | None, arithmetic: str) -> Verdict:
    """Compares random rows of a result with the oracle, which sums in float64 what float32 quantised.

    Args:
        y: the result, BF16 [M, N].
        x: BF16 [M, K].
        weight: what y was computed with.
        bias: [N] or None.
        arithmetic: what it was computed with (:func:`svdq_compile.ops.modes.arithmetic`).
    """
    if y.shape != (x.shape[0], weight.shape[0]) or y.dtype != x.dtype:
        return Verdict(False, reason=f"result is {y.dtype} {tuple(y.shape)}")
    rows = pick_rows(x.shape[0], x.device)
    parts = {name: getattr(weight, name) for name in COMPONENTS}
    # Smoothing rounds to x's dtype, which float64 activations would not show.
    x_hat = reference.smooth(x[rows], parts.pop("pre_quant_scale"))
    rest = {**parts, "pre_quant_scale": None, "bias": bias, "arithmetic": arithmetic}
    oracle = reference.linear_wide(x_hat.double(), **rest)
    with Bf16Products():
        low_precision = reference.linear_wide(x_hat, **rest).to(y.dtype)
    try:
        assert_within_budget(y[rows], oracle, low_precision=low_precision)
    except AssertionError as error:
        return Verdict(False, relative_error(y[rows], oracle), str(error))
    return Verdict(True, relative_error(y[rows], oracle))


def pick_rows(tokens: int, device: torch.device) -> torch.Tensor:
    """Up to :data:`ROWS` random rows, ascending, the last one always among them: tiles end there."""
    if tokens <= ROWS:
        return torch.arange(tokens, device=device)
    generator = torch.Generator().manual_seed(tokens)
    rows = torch.randperm(tokens - 1, generator=generator)[: ROWS - 1]
    return torch.cat([rows, torch.tensor([tokens - 1])]).sort().values.to(device)


def poison(tokens: int, out_features: int, device: torch.device) -> None:
    """Leaves NaN in memory the allocator hands out next, so that an element nobody wrote is seen."""
    torch.full((tokens, out_features), math.nan, dtype=torch.bfloat16, device=device)
