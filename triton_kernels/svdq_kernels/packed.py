"""Activations as packed NVFP4: the operand of :mod:`.blockscaled`."""

import torch
import triton
import triton.language as tl

from .activation import check_scales
from .fp4 import GROUP, encode_e2m1, encode_e4m3, magnitude_bits, round_e4m3

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit
def load_smoothed(x_ptr, s_ptr, offs_k, K):
    """``x * s`` of one token, rounded once to x's dtype; x itself where s_ptr is None.

    Args:
        x_ptr: the token [K], unit stride.
        s_ptr: s [K] or None.
        offs_k: int32 [BLOCK_K].

    Returns:
        float32 [BLOCK_K], 0 beyond K.
    """
    x = tl.load(x_ptr + offs_k, mask=offs_k < K, other=0.0)
    if s_ptr is not None:
        s = tl.load(s_ptr + offs_k, mask=offs_k < K, other=0.0)
        x = (x.to(tl.float32) * s.to(tl.float32)).to(x.dtype)
    return x.to(tl.float32)


@triton.jit
def token_scale(x_ptr, s_ptr, K, BLOCK_K: tl.constexpr):
    """``amax(x_hat) / (6 * 448)`` of one token; 1 for an all-zero token, NaN for one that holds NaN.

    Arguments as :func:`load_smoothed`.
    """
    bits = tl.zeros((BLOCK_K,), dtype=tl.int32)
    for start in range(0, K, BLOCK_K):
        bits = tl.maximum(bits, magnitude_bits(load_smoothed(x_ptr, s_ptr, start + tl.arange(0, BLOCK_K), K)))
    t = tl.div_rn(tl.max(bits, axis=0).to(tl.float32, bitcast=True), 2688.0)
    return tl.where(t == 0, 1.0, t)


@triton.jit
def _quantize_packed_kernel(
    x_ptr,
    s_ptr,
    t_ptr,
    q_ptr,
    scale_ptr,
    K,
    SPAN,
    stride_xm,
    DYNAMIC: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``e2m1(x_hat / (b * t))`` with block scales ``b = e4m3(amax / (6 * t))``; code 0 where ``b * t`` is 0.

    A program takes SPAN columns of one token, with DYNAMIC all of them.

    Args:
        x_ptr: x [M, K], unit column stride.
        s_ptr: s [K] or None.
        t_ptr: t, float32: one value to read, with DYNAMIC [M] to write.
        q_ptr: packed codes uint8 [M, K/2] contiguous.
        scale_ptr: bits of b, uint8 [M, K/G] contiguous.
    """
    tl.static_assert(BLOCK_K % GROUP == 0)
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_xm
    q_ptr += row * (K // 2)
    scale_ptr += row * (K // GROUP)
    if DYNAMIC:
        t = token_scale(x_ptr, s_ptr, K, BLOCK_K)
        tl.store(t_ptr + row, t)
    else:
        t = tl.load(t_ptr)
    first = tl.program_id(1) * SPAN
    for start in range(first, tl.minimum(first + SPAN, K), BLOCK_K):
        x_hat = load_smoothed(x_ptr, s_ptr, start + tl.arange(0, BLOCK_K), K)
        blocks = tl.reshape(x_hat, (BLOCK_K // GROUP, GROUP))
        amax = tl.max(magnitude_bits(blocks), axis=1, keep_dims=True).to(tl.float32, bitcast=True)
        # Triton's / is not rounded as IEEE demands, and one ulp decides a tie.
        scale = round_e4m3(tl.div_rn(amax, 6.0 * t))  # [BLOCK_K / G, 1]
        step = scale * t
        quotient = tl.div_rn(blocks, tl.broadcast_to(step, blocks.shape))
        codes = encode_e2m1(tl.where(step == 0, 0.0, quotient))  # [BLOCK_K / G, G]
        even, odd = tl.split(tl.reshape(codes, (BLOCK_K // 2, 2)))
        offs_b = start // 2 + tl.arange(0, BLOCK_K // 2)
        tl.store(q_ptr + offs_b, even | (odd << 4), mask=offs_b < K // 2)
        offs_g = start // GROUP + tl.arange(0, BLOCK_K // GROUP)
        bits = tl.reshape(encode_e4m3(scale), (BLOCK_K // GROUP,))
        tl.store(scale_ptr + offs_g, bits, mask=offs_g < K // GROUP)


BLOCK_K = 1024
"""Columns a step of the quantising kernel takes: 8 values for each of 128 threads, so that loads move 16 bytes."""


def quantize_nvfp4_packed(
    x: torch.Tensor, pre_quant_scale: torch.Tensor | None, input_scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``x_hat = x * s`` as packed NVFP4, the operand :func:`multiply_nvfp4` takes.

    Args:
        x: bfloat16, float16 or float32 [M, K], K a multiple of 16, any strides; copied first unless its rows
            are contiguous.
        pre_quant_scale: s [K], or None for no smoothing.
        input_scale: t, float32 with one element, or None for ``amax / (6 * 448)`` per token.

    Returns:
        codes uint8 [M, K/2], even column in the low nibble; block scales float8_e4m3fn [M, K/16]; t, the one given
        or float32 [M, 1].

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    m, k = x.shape
    if x.dtype not in FLOATS:
        raise ValueError(f"x is {x.dtype}, needs bfloat16, float16 or float32")
    if k % GROUP:
        raise ValueError(f"x has {k} columns, needs a multiple of {GROUP}")
    check_scales(k, pre_quant_scale, input_scale)
    if x.stride(1) != 1:
        x = x.contiguous()
    if pre_quant_scale is not None:
        pre_quant_scale = pre_quant_scale.contiguous()
    codes = torch.empty(m, k // 2, dtype=torch.uint8, device=x.device)
    scale = torch.empty(m, k // GROUP, dtype=torch.uint8, device=x.device)
    t = torch.empty(m, 1, dtype=torch.float32, device=x.device) if input_scale is None else input_scale
    if codes.numel():
        dynamic = input_scale is None
        span = k if dynamic else BLOCK_K
        with torch.cuda.device_of(x):
            _quantize_packed_kernel[(m, triton.cdiv(k, span))](
                x,
                pre_quant_scale,
                t,
                codes,
                scale,
                k,
                span,
                x.stride(0),
                DYNAMIC=dynamic,
                GROUP=GROUP,
                BLOCK_K=BLOCK_K,
            )
    return codes, scale.view(torch.float8_e4m3fn), t
