"""The compute modes, and what ``auto`` means on a device.

``nvfp4``     what block-scaled hardware computes: 4-bit operands, exact, float32 sums (W4A4)
``fp8``       both operands rounded to e4m3, one scale per tensor or token, float32 sums (W8A8)
``bf16``      the 4-bit weight exact, the activation not quantised, float32 sums (W4A16)
``modelopt``  NVIDIA ModelOpt's own simulation, every operand rounded to the activation's dtype
``auto``      the fastest of the first three that a device has tensor cores for

An FP8 checkpoint's own operands are e4m3, so for it ``nvfp4`` is W8A8 as well. Importing this module imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import OptionError
from ..spec import Format

if TYPE_CHECKING:
    import torch

COMPUTE_MODES = ("auto", "nvfp4", "fp8", "bf16", "modelopt")

NEEDS_CODES = ("nvfp4", "modelopt")
"""Modes that an FP8_SVD weight, which has given up its 4-bit codes, cannot have."""

FP8_MIN_TOKENS = 17
"""Fewest tokens of one call that ``fp8`` quantises.

A linear of so few tokens is a weight read; a packed weight is then multiplied in 16 bits as it is unpacked, and
rounding it to e4m3 gains nothing.
"""


def check_compute(compute: str) -> None:
    """Refuses what is no compute mode.

    Raises:
        OptionError: it is none of :data:`COMPUTE_MODES`.
    """
    if compute not in COMPUTE_MODES:
        raise OptionError(f"compute={compute!r}: choose one of {', '.join(COMPUTE_MODES)}")


def resolve(compute: str, format: Format, device: torch.device) -> str:
    """The mode that computes a weight on a device.

    Args:
        compute: one of :data:`COMPUTE_MODES`; anything but ``auto`` is returned as it is.
        format: the weight's format; ``auto`` is never one of :data:`NEEDS_CODES` for FP8_SVD.
        device: where the activation is.

    Returns:
        For ``auto`` by CUDA compute capability: ``nvfp4`` from 10.0, ``fp8`` for 8.9 and 9.0, ``bf16`` for 8.0 to 8.8.
        ``nvfp4`` on anything else (CPU, meta, ROCm, older GPUs), where the reference computes every mode. For FP8_SVD
        ``bf16`` on NVIDIA GPUs below 8.9 and ``fp8`` everywhere else.
    """
    if compute != "auto":
        return compute
    import torch

    own = "fp8" if format is Format.FP8_SVD else "nvfp4"
    if device.type != "cuda" or torch.version.hip is not None:
        return own
    capability = torch.cuda.get_device_capability(device)
    if capability >= (10, 0):
        return own
    if capability >= (8, 9):
        return "fp8"
    return "bf16" if capability >= (8, 0) or format is Format.FP8_SVD else own


def arithmetic(mode: str, tokens: int, packed: bool = True) -> str:
    """What a resolved mode computes with for so many tokens.

    Args:
        mode: what :func:`resolve` returned.
        tokens: M, the product of all dimensions of the activation but the last. A plain int: of a SymInt the caller
            passes the hint, because comparing the SymInt itself would put a guard on it.
        packed: whether the weight is 4 bits; an e4m3 weight is multiplied as e4m3 however few tokens there are.

    Returns:
        ``bf16`` for ``fp8`` with fewer than :data:`FP8_MIN_TOKENS` tokens and a packed weight, else the mode itself.
    """
    return "bf16" if packed and mode == "fp8" and tokens < FP8_MIN_TOKENS else mode
