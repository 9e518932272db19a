"""``svdq::modulated_norm``: what a transformer block does to an activation before its linears.

Where an activation kernel reads the result, its lowering leaves it to that kernel, and the result is never written.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..errors import SvdqError
from .linear import library

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


def _refuse_backward(ctx, grad):
    raise SvdqError(
        "svdq::modulated_norm has no gradient.\n  hint:   run inference under torch.no_grad() or inference_mode()"
    )


library.impl("modulated_norm", modulated_norm_reference, "CompositeExplicitAutograd")
torch.library.register_fake("svdq::modulated_norm", _fake, lib=library)
torch.library.register_autograd("svdq::modulated_norm", _refuse_backward, lib=library)

modulated_norm = torch.ops.svdq.modulated_norm.default
