"""Quantised linears with sums in a wide dtype: the oracle of compiled code."""

from __future__ import annotations

import torch
from torch import nn

from ..ops import reference
from ..ops.linear import linear_reference
from ..spec import COMPONENTS


def wide_linear(layer: nn.Linear, x: torch.Tensor, wide: torch.dtype) -> torch.Tensor:
    """``layer(x)`` by the specification, its sums in a wide dtype, of the operands that x's dtype is quantised to.

    Args:
        layer: a quantised linear.
        x: activations [..., K] in the model's dtype.
        wide: dtype of the sums.

    Returns:
        wide [..., N].
    """
    w = layer.weight
    # Smoothing rounds to x's dtype, so it comes before sums are widened.
    parts = [None if name == "pre_quant_scale" else getattr(w, name) for name in COMPONENTS]
    x_hat = reference.smooth(x, w.pre_quant_scale).to(wide)
    return linear_reference(x_hat, *parts, layer.bias, w.operator_compute)
