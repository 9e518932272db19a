"""Packed NVFP4 weights as a dense GEMM operand."""

import torch
import triton
import triton.language as tl

from .fp4 import GROUP, decode_e4m3

E4M3_DIVISOR = 8.0
"""The power of two that brings the largest product, e2m1's 6 times e4m3's 448, below e4m3's 448."""

DTYPES = (torch.bfloat16, torch.float16, torch.float8_e4m3fn)


@triton.jit
def _expand_kernel(
    qweight_ptr,
    scale_ptr,
    out_ptr,
    num_groups,
    DIVISOR: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """``out = code * block scale / DIVISOR`` of BLOCK_G consecutive blocks; all three tensors are contiguous.

    float16 holds every product exactly, and GPUs multiply two of its numbers at once.
    """
    WORDS: tl.constexpr = GROUP // 8
    first = tl.program_id(0).to(tl.int64) * BLOCK_G
    offs_g = tl.arange(0, BLOCK_G)
    mask_g = offs_g < num_groups - first
    words_ptr = qweight_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + first * WORDS
    offs_w = offs_g[:, None] * WORDS + tl.arange(0, WORDS)[None, :]  # [BLOCK_G, words of a block]
    words = tl.load(words_ptr + offs_w, mask=mask_g[:, None], other=0)
    scale = tl.load(scale_ptr + first + offs_g, mask=mask_g, other=0.0).to(tl.uint8, bitcast=True)
    scale = (decode_e4m3(scale) * (1.0 / DIVISOR)).to(tl.float16)
    codes = tl.reshape(words[:, :, None] >> (4 * tl.arange(0, 8))[None, None, :], (BLOCK_G, GROUP))
    # As bits of float16 a code is its value times 2**-14: both formats count 0.5 as a subnormal.
    bits = ((codes & 7) << 9) | ((codes & 8) << 12)
    values = bits.to(tl.int16).to(tl.float16, bitcast=True) * 16384.0 * scale[:, None]
    offs_k = offs_g[:, None] * GROUP + tl.arange(0, GROUP)[None, :]  # [BLOCK_G, G]
    tl.store(out_ptr + first * GROUP + offs_k, values.to(out_ptr.dtype.element_ty), mask=mask_g[:, None])


BLOCK_G, NUM_WARPS = 128, 4
"""A block a thread, so that it stores 16 bytes at once and no data crosses threads."""


def divisor(dtype: torch.dtype) -> float:
    """What an expanded weight of a dtype is to be multiplied with: 8 for e4m3, 1 for 16 bits."""
    return E4M3_DIVISOR if dtype == torch.float8_e4m3fn else 1.0


def expand_nvfp4(
    qweight: torch.Tensor, weight_scale: torch.Tensor, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """``code * block scale``, without the tensor scale.

    At most 6 significant bits and between 2**-10 and 2688, so exact in bfloat16 and float16. In float8_e4m3fn it is
    divided by 8 and rounded to nearest.

    Args:
        qweight: packed codes uint8 [N, K/2], even column in the low nibble.
        weight_scale: float8_e4m3fn [N, K/16].
        dtype: bfloat16, float16, or float8_e4m3fn (sm_89 and later).

    Returns:
        dtype [N, K], contiguous.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    n, half_k = qweight.shape
    if qweight.dtype != torch.uint8 or weight_scale.dtype != torch.float8_e4m3fn:
        raise ValueError(f"dtypes {qweight.dtype} and {weight_scale.dtype}, needs uint8 and float8_e4m3fn")
    if half_k % 8 or tuple(weight_scale.shape) != (n, half_k // 8):
        raise ValueError(f"weight_scale {tuple(weight_scale.shape)} does not fit {tuple(qweight.shape)} codes")
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype}, needs one of {DTYPES}")
    out = torch.empty(n, 2 * half_k, dtype=dtype, device=qweight.device)
    num_groups = weight_scale.numel()
    if num_groups:
        # Bits rather than e4m3 values: Triton has no e4m3 loads below sm_89.
        scale_bits = weight_scale.contiguous().view(torch.uint8)
        with torch.cuda.device_of(qweight):
            _expand_kernel[(triton.cdiv(num_groups, BLOCK_G),)](
                qweight.contiguous(),
                scale_bits,
                out,
                num_groups,
                DIVISOR=divisor(dtype),
                GROUP=GROUP,
                BLOCK_G=BLOCK_G,
                num_warps=NUM_WARPS,
            )
    return out
