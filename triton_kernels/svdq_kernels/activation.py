"""Smoothed and quantised NVFP4 activations as a bfloat16 matrix, exactly."""

import torch
import triton
import triton.language as tl

from .fp4 import GROUP, magnitude_bits, round_e2m1, round_e4m3


@triton.jit
def load_smoothed(x_ptr, s_ptr, row, offs_k, K, stride_xm):
    """``x * s`` of one token, rounded once to x's dtype; x itself where s_ptr is None.

    Args:
        row: int64 scalar.
        offs_k: int32 [BLOCK_K].

    Returns:
        x's dtype [BLOCK_K], 0 beyond K.
    """
    mask = offs_k < K
    x = tl.load(x_ptr + row * stride_xm + offs_k, mask=mask, other=0.0)
    if s_ptr is not None:
        s = tl.load(s_ptr + offs_k, mask=mask, other=0.0)
        x = (x.to(tl.float32) * s.to(tl.float32)).to(x.dtype)
    return x


@triton.jit
def _token_scale_kernel(x_ptr, s_ptr, t_ptr, K, stride_xm, BLOCK_K: tl.constexpr):
    """``t = amax(x_hat) / (6 * 448)`` of one token; 1 for an all-zero token, NaN for one that holds NaN.

    Args:
        x_ptr: x [M, K], unit column stride.
        s_ptr: s [K] or None.
        t_ptr: t float32 [M].
    """
    row = tl.program_id(0).to(tl.int64)
    bits = tl.zeros((BLOCK_K,), dtype=tl.int32)
    for start in range(0, K, BLOCK_K):
        x_hat = load_smoothed(x_ptr, s_ptr, row, start + tl.arange(0, BLOCK_K), K, stride_xm)
        bits = tl.maximum(bits, magnitude_bits(x_hat.to(tl.float32)))
    amax = tl.max(bits, axis=0).to(tl.float32, bitcast=True)
    t = tl.div_rn(amax, 2688.0)
    tl.store(t_ptr + row, tl.where(t == 0, 1.0, t))


@triton.jit
def _quantize_kernel(
    x_ptr, s_ptr, t_ptr, q_ptr, h_ptr, K, stride_xm, stride_tm, GROUP: tl.constexpr, BLOCK_K: tl.constexpr
):
    """``e2m1(x_hat / (b * t)) * b`` with block scales ``b = e4m3(amax / (6 * t))``; 0 where ``b * t`` is 0.

    Args:
        x_ptr: x [M, K], unit column stride.
        s_ptr: s [K] or None.
        t_ptr: t float32, one value (stride_tm 0) or [M] (stride_tm 1).
        q_ptr: the result, bfloat16 [M, K] contiguous.
        h_ptr: x_hat, x's dtype [M, K] contiguous, or None to not store it.
    """
    tl.static_assert(BLOCK_K % GROUP == 0)
    row = tl.program_id(0).to(tl.int64)
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = offs_k < K
    x_hat = load_smoothed(x_ptr, s_ptr, row, offs_k, K, stride_xm)  # [BLOCK_K]
    if h_ptr is not None:
        tl.store(h_ptr + row * K + offs_k, x_hat, mask=mask_k)
    t = tl.load(t_ptr + row * stride_tm)
    blocks = tl.reshape(x_hat.to(tl.float32), (BLOCK_K // GROUP, GROUP))
    amax = tl.max(magnitude_bits(blocks), axis=1, keep_dims=True).to(tl.float32, bitcast=True)
    # Triton's / is not rounded as IEEE demands, and one ulp decides a tie.
    scale = round_e4m3(tl.div_rn(amax, 6.0 * t))  # [BLOCK_K / G, 1]
    step = scale * t
    quotient = tl.div_rn(blocks, tl.broadcast_to(step, blocks.shape))
    values = round_e2m1(tl.where(step == 0, 0.0, quotient)) * scale  # [BLOCK_K / G, G]
    values = tl.reshape(values, (BLOCK_K,)).to(q_ptr.dtype.element_ty)
    tl.store(q_ptr + row * K + offs_k, values, mask=mask_k)


BLOCK_K = 1024
"""One token a program: 8 values for each of 128 threads, so that loads and stores move 16 bytes."""


def quantize_nvfp4(
    x: torch.Tensor, pre_quant_scale: torch.Tensor | None, input_scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``x_hat = x * s`` and its NVFP4 value ``code * block scale``, without the tensor scale.

    Args:
        x: bfloat16, float16 or float32 [M, K], K a multiple of 16, any strides; copied first unless its rows
            are contiguous.
        pre_quant_scale: s [K], or None for no smoothing.
        input_scale: t, float32 with one element, or None for ``amax / (6 * 448)`` per token.

    Returns:
        x_q bfloat16 [M, K], exact (at most 6 significant bits); t, the one given or float32 [M, 1]; x_hat
        [M, K] in x's dtype, without smoothing x itself.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    m, k = x.shape
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"x is {x.dtype}, needs bfloat16, float16 or float32")
    if k % GROUP:
        raise ValueError(f"x has {k} columns, needs a multiple of {GROUP}")
    if pre_quant_scale is not None and tuple(pre_quant_scale.shape) != (k,):
        raise ValueError(f"pre_quant_scale is {tuple(pre_quant_scale.shape)}, needs ({k},)")
    if input_scale is not None and (input_scale.dtype != torch.float32 or input_scale.numel() != 1):
        raise ValueError(f"input_scale is {input_scale.dtype}, {input_scale.numel()} values, needs one float32")
    if x.stride(1) != 1:
        x = x.contiguous()
    if pre_quant_scale is not None:
        pre_quant_scale = pre_quant_scale.contiguous()
    x_q = torch.empty(m, k, dtype=torch.bfloat16, device=x.device)
    x_hat = None if pre_quant_scale is None else torch.empty_like(x_q, dtype=x.dtype)
    t = torch.empty(m, 1, dtype=torch.float32, device=x.device) if input_scale is None else input_scale
    if x_q.numel():
        with torch.cuda.device_of(x):
            if input_scale is None:
                _token_scale_kernel[(m,)](x, pre_quant_scale, t, k, x.stride(0), BLOCK_K=BLOCK_K)
            _quantize_kernel[(m, triton.cdiv(k, BLOCK_K))](
                x,
                pre_quant_scale,
                t,
                x_q,
                x_hat,
                k,
                x.stride(0),
                1 if input_scale is None else 0,
                GROUP=GROUP,
                BLOCK_K=BLOCK_K,
            )
    return x_q, t, x if x_hat is None else x_hat
