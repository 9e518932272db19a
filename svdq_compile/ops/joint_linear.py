"""``svdq::joint_linear``: linears of two streams, each added to its stream's residual, as the passes put them into
compiled graphs.

A few hundred tokens beside some thousand are a launch that is all overhead; computed in one with the others they are
almost free.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .linear import library, linear, without_gradient

SCHEMA = (
    "joint_linear(Tensor[] x, Tensor?[] first, Tensor?[] second, Tensor[] residual, Tensor[] gate, "
    "str compute='auto') -> (Tensor, Tensor)"
)

library.define(SCHEMA, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout))

PARTS = 8
"""Tensors of a stream's list: a weight's components, then the bias."""


def _check(condition: bool, message: str) -> None:
    torch._check(condition, lambda: f"svdq::joint_linear: {message}")


def validate(
    x: Sequence[torch.Tensor],
    first: Sequence[torch.Tensor | None],
    second: Sequence[torch.Tensor | None],
    residual: Sequence[torch.Tensor],
    gate: Sequence[torch.Tensor],
) -> None:
    """Lengths, shapes and dtypes that must agree; dynamic sizes are compared symbolically."""
    _check((len(x), len(residual), len(gate)) == (2, 2, 2), "needs two of each")
    for stream in (first, second):
        _check(len(stream) == PARTS, f"a stream has {len(stream)} tensors, needs {PARTS}")
    _check(all(each.dim() == 3 for each in x), "a stream needs three dimensions")
    _check(first[0].shape[0] == second[0].shape[0], "the streams' out_features differ")
    for each, own, stream, factor in zip(x, (first, second), residual, gate, strict=True):
        batch, tokens, _ = each.shape
        n = own[0].shape[0]
        _check(each.dtype == x[0].dtype, f"the streams are {x[0].dtype} and {each.dtype}")
        _check(stream.dtype == factor.dtype == each.dtype, "residual and gate need x's dtype")
        _check(tuple(stream.shape) == (batch, tokens, n), f"a residual is {tuple(stream.shape)}")
        _check(tuple(factor.shape) == (batch, 1, n), f"a gate is {tuple(factor.shape)}")


def joint_linear_reference(
    x: Sequence[torch.Tensor],
    first: Sequence[torch.Tensor | None],
    second: Sequence[torch.Tensor | None],
    residual: Sequence[torch.Tensor],
    gate: Sequence[torch.Tensor],
    compute: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """``residual + gate * linear(x)`` of both streams, step by step.

    Args:
        x: two streams, [B, S_i, K_i] each, of one dtype.
        first, second: each stream's weight: its components in the order of :data:`svdq_compile.spec.COMPONENTS`, then
            the bias; those it does not have are None. Both have the same out_features N.
        residual: x.dtype [B, S_i, N] of each stream.
        gate: x.dtype [B, 1, N] of each stream.
        compute: as ``svdq::linear``'s.

    Returns:
        Each stream's result, x.dtype [B, S_i, N], contiguous.

    Raises:
        RuntimeError: lengths, shapes or dtypes that do not fit together.
    """
    validate(x, first, second, residual, gate)
    one, two = (
        (added + factor * linear(each, *own, compute)).contiguous()
        for each, own, added, factor in zip(x, (first, second), residual, gate, strict=True)
    )
    return one, two


def _fake(x, first, second, residual, gate, compute="auto"):
    validate(x, first, second, residual, gate)
    one, two = (linear(each, *own, compute) for each, own in zip(x, (first, second), strict=True))
    return one, two


library.impl("joint_linear", joint_linear_reference, "CompositeExplicitAutograd")
torch.library.register_fake("svdq::joint_linear", _fake, lib=library)
without_gradient("joint_linear")

joint_linear = torch.ops.svdq.joint_linear.default
