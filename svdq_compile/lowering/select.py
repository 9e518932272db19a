"""What runs a linear on a device, as ``strict`` and ``explain`` want to know it: before there is an activation."""

from __future__ import annotations

import dataclasses

import torch

from ..dtypes import TORCH_DTYPES
from ..ops.cuda import capability
from ..ops.modes import resolve
from ..ops.native import has_native_fp4
from ..ops.plan import Facts, plan
from ..ops.weight import Fingerprint
from ..spec import Format

MANY_TOKENS = 4096
"""Tokens that stand for an image's; with fewer another kernel may run, but never a slower path."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """What computes a linear.

    Args:
        kernel: name of the implementation.
        fused: whether our kernels compute it; everything else is the slower, equally correct path.
        reason: why this one.
    """

    kernel: str
    fused: bool
    reason: str


def select(fingerprint: Fingerprint, device: torch.device, dtype: torch.dtype | None = None) -> Choice:
    """The implementation of ``svdq::linear`` for a weight on a device.

    Args:
        fingerprint: of the weight.
        device: where weight and activation are.
        dtype: of the activation; None for the model's.
    """
    spec = fingerprint.spec
    model_dtype = TORCH_DTYPES[spec.dtype]
    chosen = plan(
        Facts(
            mode=resolve(fingerprint.compute, spec.format, device),
            capability=capability(device),
            native=has_native_fp4(device),
            weight=torch.float8_e4m3fn if spec.format in (Format.FP8, Format.FP8_SVD) else torch.uint8,
            activation=dtype or model_dtype,
            in_features=spec.in_features,
            tokens=MANY_TOKENS,
            rank=spec.rank,
            low_rank=model_dtype if spec.rank else None,
        )
    )
    return Choice(chosen.kernel, chosen.fused, chosen.reason)
