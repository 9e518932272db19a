"""``svdq::modulated_norm``: what a transformer block does to an activation before its linears.

Where an activation kernel reads the result, its lowering leaves it to that kernel, and the result is never written.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .linear import library, without_gradient

library.define(
    "modulated_norm(Tensor x, Tensor scale, Tensor shift, float eps) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)


def modulated_norm_reference(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float) -> torch.Tensor:
    """``layer_norm(x) * (1 + scale) + shift``, step by step in x's dtype.

    Args:
        x: [..., K], normalised over its last dimension.
        scale, shift: x's dtype, of a shape that broadcasts to x's.
        eps: added to the variance.

    Returns:
        Of x's shape and dtype, contiguous.
    """
    return (F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift).contiguous()


def _fake(x, scale, shift, eps):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


library.impl("modulated_norm", modulated_norm_reference, "CompositeExplicitAutograd")
torch.library.register_fake("svdq::modulated_norm", _fake, lib=library)
without_gradient("modulated_norm")

modulated_norm = torch.ops.svdq.modulated_norm.default
