"""``svdq::joint_feed_forward``: feed-forward layers of two streams, each added to its stream's residual, as the passes
put them into compiled graphs.

Where the first linears can finish the operands of the second ones, these are one launch for both streams: the tiles of
a short stream fill multiprocessors that the last wave of the long one leaves idle.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .feed_forward import feed_forward
from .linear import library, without_gradient

SCHEMA = (
    "joint_feed_forward(Tensor[] x, Tensor?[] first_up, Tensor?[] first_down, Tensor?[] second_up, "
    "Tensor?[] second_down, Tensor[] residual, Tensor[] gate, str compute_up='auto', str compute_down='auto') "
    "-> (Tensor, Tensor)"
)

library.define(SCHEMA, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout))


def _check(condition: bool, message: str) -> None:
    torch._check(condition, lambda: f"svdq::joint_feed_forward: {message}")


def validate(
    x: Sequence[torch.Tensor],
    up: Sequence[torch.Tensor],
    down: Sequence[torch.Tensor],
    residual: Sequence[torch.Tensor],
    gate: Sequence[torch.Tensor],
) -> None:
    """What must agree between the streams; dynamic sizes are compared symbolically.

    Args:
        x, residual, gate: as the operator's.
        up, down: ``qweight`` of the first and of the second linear of each stream.
    """
    _check((len(x), len(residual), len(gate)) == (2, 2, 2), "needs two of each")
    _check(all(each.dim() == 3 for each in x), "a stream needs three dimensions")
    _check(x[0].shape[2] == x[1].shape[2], "the streams' in_features differ")
    _check(up[0].shape[0] == up[1].shape[0], "the first linears' out_features differ")
    _check(down[0].shape[0] == down[1].shape[0], "the second linears' out_features differ")
    n = down[0].shape[0]
    for each, stream, factor in zip(x, residual, gate, strict=True):
        batch, tokens, _ = each.shape
        _check(each.dtype == x[0].dtype, f"the streams are {x[0].dtype} and {each.dtype}")
        _check(stream.dtype == factor.dtype == each.dtype, "residual and gate need x's dtype")
        _check(tuple(stream.shape) == (batch, tokens, n), f"a residual is {tuple(stream.shape)}")
        _check(tuple(factor.shape) == (batch, 1, n), f"a gate is {tuple(factor.shape)}")


def joint_feed_forward_reference(
    x: Sequence[torch.Tensor],
    first_up: Sequence[torch.Tensor | None],
    first_down: Sequence[torch.Tensor | None],
    second_up: Sequence[torch.Tensor | None],
    second_down: Sequence[torch.Tensor | None],
    residual: Sequence[torch.Tensor],
    gate: Sequence[torch.Tensor],
    compute_up: str = "auto",
    compute_down: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """``residual + gate * feed_forward(x)`` of both streams, step by step.

    Args:
        x: two streams, [B, S_i, K] each, of one dtype.
        first_up, first_down: the first stream's linears, as ``svdq::feed_forward``'s ``up`` and ``down``.
        second_up, second_down: the second stream's; sizes are the first's, formats and ranks need not be.
        residual: x.dtype [B, S_i, N] of each stream, N out_features of ``down``.
        gate: x.dtype [B, 1, N] of each stream.
        compute_up, compute_down: as ``svdq::linear``'s ``compute``, of both streams.

    Returns:
        Each stream's result, x.dtype [B, S_i, N], contiguous.

    Raises:
        RuntimeError: lengths, shapes or dtypes that do not fit together.
    """
    layers = (first_up, first_down), (second_up, second_down)
    validate(x, *([layer[i][0] for layer in layers] for i in range(2)), residual, gate)
    one, two = (
        (added + factor * feed_forward(each, *layer, compute_up, compute_down)).contiguous()
        for each, layer, added, factor in zip(x, layers, residual, gate, strict=True)
    )
    return one, two


def _fake(x, first_up, first_down, second_up, second_down, residual, gate, compute_up="auto", compute_down="auto"):
    layers = (first_up, first_down), (second_up, second_down)
    validate(x, *([layer[i][0] for layer in layers] for i in range(2)), residual, gate)
    one, two = (feed_forward(each, *layer, compute_up, compute_down) for each, layer in zip(x, layers, strict=True))
    return one, two


library.impl("joint_feed_forward", joint_feed_forward_reference, "CompositeExplicitAutograd")
torch.library.register_fake("svdq::joint_feed_forward", _fake, lib=library)
without_gradient("joint_feed_forward")

joint_feed_forward = torch.ops.svdq.joint_feed_forward.default
