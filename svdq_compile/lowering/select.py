"""One decision, asked by the backend, by ``strict`` and by ``explain``: what runs a linear on a device."""

from __future__ import annotations

import dataclasses

import torch

from ..ops.weight import Fingerprint


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
    return Choice("reference", False, "no fused kernel yet: PyTorch operations on decoded operands")
