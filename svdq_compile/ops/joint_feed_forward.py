"""``svdq::joint_feed_forward``: the feed-forward layers of two streams, as the passes put them into compiled graphs.

Where the lowering has a kernel for the first linear of a layer that finishes the operand of its second one, that kernel
computes both streams in one launch: the tiles of a short stream fill multiprocessors that the last wave of the long one
leaves idle.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .feed_forward import feed_forward
from .linear import library, without_gradient

SCHEMA = (
    "joint_feed_forward(Tensor[] x, Tensor?[] first_up, Tensor?[] first_down, Tensor?[] second_up, "
    "Tensor?[] second_down, str compute_up='auto', str compute_down='auto') -> (Tensor, Tensor)"
)

library.define(SCHEMA, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout))


def _check(condition: bool, message: str) -> None:
    torch._check(condition, lambda: f"svdq::joint_feed_forward: {message}")


def validate(x: Sequence[torch.Tensor], *weights: Sequence[torch.Tensor | None]) -> None:
    """What must agree between the streams; dynamic sizes are compared symbolically.

    Args:
        x: as the operator's.
        weights: the operator's lists of components.
    """
    first_up, first_down, second_up, second_down = (parts[0] for parts in weights)
    _check(len(x) == 2, f"{len(x)} activations for two streams")
    _check(x[0].dtype == x[1].dtype, f"the streams are {x[0].dtype} and {x[1].dtype}")
    _check(x[0].shape[-1] == x[1].shape[-1], "the streams' in_features differ")
    _check(first_up.shape[0] == second_up.shape[0], "the first linears' out_features differ")
    _check(first_down.shape[0] == second_down.shape[0], "the second linears' out_features differ")


def joint_feed_forward_reference(
    x: Sequence[torch.Tensor],
    first_up: Sequence[torch.Tensor | None],
    first_down: Sequence[torch.Tensor | None],
    second_up: Sequence[torch.Tensor | None],
    second_down: Sequence[torch.Tensor | None],
    compute_up: str = "auto",
    compute_down: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """``svdq::feed_forward`` of each stream, one behind the other.

    Args:
        x: two activations [..., K] of one dtype.
        first_up, first_down: the first stream's linears, as ``svdq::feed_forward``'s ``up`` and ``down``.
        second_up, second_down: the second stream's; sizes are the first's, formats and ranks need not be.
        compute_up, compute_down: as ``svdq::linear``'s ``compute``, of both streams.

    Returns:
        Per stream x.dtype [..., out_features of down], contiguous.

    Raises:
        RuntimeError: sizes or dtypes of the streams differ, or do not fit within one.
    """
    validate(x, first_up, first_down, second_up, second_down)
    first = feed_forward(x[0], first_up, first_down, compute_up, compute_down)
    return first, feed_forward(x[1], second_up, second_down, compute_up, compute_down)


library.impl("joint_feed_forward", joint_feed_forward_reference, "CompositeExplicitAutograd")
torch.library.register_fake("svdq::joint_feed_forward", joint_feed_forward_reference, lib=library)
without_gradient("joint_feed_forward")

joint_feed_forward = torch.ops.svdq.joint_feed_forward.default
