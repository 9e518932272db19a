"""``svdq::feed_forward``: two quantised linears with GELU between them, as the passes put it into compiled graphs.

The tensor between the linears is the widest of a transformer block. Where the lowering has a kernel that finishes the
first product as the operand of the second (:mod:`svdq_kernels.feed_forward`), it is never written.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .linear import library, linear, without_gradient

SCHEMA = (
    "feed_forward(Tensor x, Tensor?[] up, Tensor?[] down, str compute_up='auto', str compute_down='auto') -> Tensor"
)

library.define(SCHEMA, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout))


def feed_forward_reference(
    x: torch.Tensor,
    up: Sequence[torch.Tensor | None],
    down: Sequence[torch.Tensor | None],
    compute_up: str = "auto",
    compute_down: str = "auto",
) -> torch.Tensor:
    """``linear(gelu(linear(x, up)), down)`` with GELU's tanh form, step by step.

    Args:
        x: activations [..., K].
        up, down: a weight's components in the order of :data:`svdq_compile.spec.COMPONENTS`, then the bias; those a
            weight does not have are None.
        compute_up, compute_down: as ``svdq::linear``'s ``compute``.

    Returns:
        x.dtype [..., out_features of down], contiguous.
    """
    hidden = F.gelu(linear(x, *up, compute_up), approximate="tanh")
    return linear(hidden, *down, compute_down)


def _fake(x, up, down, compute_up="auto", compute_down="auto"):
    return linear(linear(x, *up, compute_up), *down, compute_down)


library.impl("feed_forward", feed_forward_reference, "CompositeExplicitAutograd")
torch.library.register_fake("svdq::feed_forward", _fake, lib=library)
without_gradient("feed_forward")

feed_forward = torch.ops.svdq.feed_forward.default
