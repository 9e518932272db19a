"""One decision, asked by the backend, by ``strict`` and by ``explain``: what runs a linear on a device."""

from __future__ import annotations

import dataclasses

import torch

from ..ops.weight import Fingerprint
from ..spec import Format


@dataclasses.dataclass(frozen=True)
class Choice:
    """What computes a linear.

    Args:
        kernel: name of the implementation.
        fused: whether it is a fused kernel; everything else is the slower, equally correct path.
        reason: why this one.
    """

    kernel: str
    fused: bool
    reason: str


def select(fingerprint: Fingerprint, device: torch.device) -> Choice:
    """The implementation of ``svdq::linear`` for a weight on a device."""
    if fingerprint.compute == "modelopt":
        return Choice("reference", False, "compute='modelopt' reproduces ModelOpt's simulation, which no kernel does")
    if device.type != "cuda":
        return Choice("reference", False, f"there is no fused kernel for {device.type}")
    if fingerprint.spec.format is Format.FP8:
        return Choice("reference", False, "there is no fused kernel for FP8 weights")
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
        return Choice("reference", False, "the Triton kernels need an NVIDIA GPU of sm_80 or later")
    return Choice("triton+cublas", False, "Triton quantises and expands, cuBLAS multiplies in bfloat16: not one kernel")
