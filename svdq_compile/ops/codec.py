"""The narrow number formats, bit for bit: e2m1 codes, their packing, and e4m3 block scales.

Everything here is exact integer or IEEE arithmetic in plain PyTorch; kernels and checkpoints are tested against it.
Sources: OCP Microscaling Formats v1.0 (e2m1), OCP 8-bit Floating Point v1.0 (e4m3), NVFP4 as ModelOpt 0.47 exports it.
"""

from __future__ import annotations

import torch

from ..spec import E2M1_MAX, E4M3_MAX, GROUP_SIZE

E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Value of codes 0 to 7; bit 3 of a code is the sign."""


def unpack_codes(packed: torch.Tensor) -> torch.Tensor:
    """Codes of packed bytes: the low nibble is the even column.

    Args:
        packed: uint8 [..., K/2].

    Returns:
        uint8 [..., K], each 0 to 15.
    """
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)


def pack_codes(codes: torch.Tensor) -> torch.Tensor:
    """Inverse of :func:`unpack_codes`.

    Args:
        codes: uint8 [..., K], K even, each 0 to 15.

    Returns:
        uint8 [..., K/2].
    """
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def decode_e2m1(codes: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Values of e2m1 codes (uint8, 0 to 15); exact in every floating dtype of 16 bits or more."""
    table = torch.tensor(E2M1_MAGNITUDES + tuple(-m for m in E2M1_MAGNITUDES), dtype=dtype, device=codes.device)
    return table[codes.int()]


def encode_e2m1(values: torch.Tensor) -> torch.Tensor:
    """Nearest e2m1 code, ties to the even code, saturating at 6; NaN encodes as magnitude 0.

    A value's sign bit is kept, so -0.0 gives code 8.

    Args:
        values: float32 or float64, any shape, already divided by its scale.

    Returns:
        uint8, same shape, each 0 to 15.
    """
    a = values.abs()
    # Midpoints of the magnitudes; where the lower code is odd a tie goes up, so the comparison includes it.
    index = (a > 0.25).to(torch.uint8)
    for midpoint, tie_goes_up in (
        (0.75, True),
        (1.25, False),
        (1.75, True),
        (2.5, False),
        (3.5, True),
        (5.0, False),
    ):
        index += (a >= midpoint) if tie_goes_up else (a > midpoint)
    return index | (torch.signbit(values).to(torch.uint8) << 3)


def round_e4m3(values: torch.Tensor) -> torch.Tensor:
    """Nearest e4m3 value, ties to even, saturating at 448; NaN stays NaN. Returns float8_e4m3fn."""
    return values.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def quantize_nvfp4(
    values: torch.Tensor, tensor_scale: torch.Tensor, *, min_block_scale: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """NVFP4 codes and block scales: ``s = e4m3(amax / (6 * t))``, ``code = e2m1(v / (s * t))``.

    A block whose scale rounds to zero gets code 0 throughout.

    Args:
        values: float32 or float64 [..., K], K a multiple of 16.
        tensor_scale: t, float32 or float64, broadcastable to [..., 1] (a scalar or one per row).
        min_block_scale: lower clamp of s before rounding; ModelOpt's exporter uses 2**-9 for weights.

    Returns:
        codes uint8 [..., K] and scales float8_e4m3fn [..., K/16].
    """
    blocks = values.unflatten(-1, (-1, GROUP_SIZE))
    tensor_scale = tensor_scale.to(values.dtype)
    amax = blocks.abs().amax(-1)
    scale = round_e4m3((amax / (E2M1_MAX * tensor_scale)).clamp(min=min_block_scale))
    step = (scale.to(values.dtype) * tensor_scale).unsqueeze(-1)
    codes = encode_e2m1(torch.where(step == 0, torch.zeros_like(blocks), blocks / step))
    return codes.flatten(-2), scale


def decode_nvfp4(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Code times block scale, without the tensor scale: at most 6 significant bits, so exact in bfloat16.

    Args:
        codes: uint8 [..., K].
        scale: float8_e4m3fn [..., K/16].
        dtype: dtype of the result.

    Returns:
        ``dtype`` [..., K].
    """
    blocks = decode_e2m1(codes, dtype).unflatten(-1, (-1, GROUP_SIZE))
    return (blocks * scale.to(dtype).unsqueeze(-1)).flatten(-2)
