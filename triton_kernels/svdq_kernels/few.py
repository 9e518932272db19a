"""Activations of a few tokens become GEMM operands, and are projected down in whole.

    x_hat   = x * s                     rounded once to x's dtype
    operand = quantize(x_hat)           see svdq_kernels.operand.OPERANDS
    h       = x_hat @ L2.T              float32 sums, rounded once to x's dtype

A program takes one token, a few ranks and all of K: with few tokens L2 is read soon enough that way, and no parts of h
are left for another kernel to add.
"""

import triton
import triton.language as tl

from .operand import nvfp4_values, smooth

MAX_TOKENS = 16
"""Up to here L2 is read once a token."""


@triton.jit
def store_operand(
    x_ptr,
    s_ptr,
    t_ptr,
    operand_ptr,
    first,
    end,
    OPERAND: tl.constexpr,
    SCALE_FACTOR: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Columns first to end of one token's operand; pointers to the token's, as the kernel's."""
    if t_ptr is not None:
        t = tl.load(t_ptr)
    for start in range(first, end, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        mask_k = offs_k < end
        x_hat = tl.load(x_ptr + offs_k, mask=mask_k, other=0.0)[None, :]
        if s_ptr is not None:
            x_hat = smooth(x_hat, tl.load(s_ptr + offs_k, mask=mask_k, other=0.0))
        values = x_hat
        if OPERAND == "fp8":
            # The conversion saturates and keeps NaN (PTX cvt.rn.satfinite).
            values = x_hat.to(tl.float32) * tl.div_rn(1.0, t * SCALE_FACTOR)
        elif OPERAND == "nvfp4":
            values = nvfp4_values(x_hat.to(tl.float32), t)
        tl.store(operand_ptr + offs_k[None, :], values.to(operand_ptr.dtype.element_ty), mask=mask_k[None, :])


@triton.jit
def _few_kernel(
    x_ptr,
    s_ptr,
    t_ptr,
    down_ptr,
    operand_ptr,
    h_ptr,
    R,
    stride_xm,
    stride_tm,
    K: tl.constexpr,
    OPERAND: tl.constexpr,
    SCALE_FACTOR: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Program (i, j): of token j ranks RANKS * i to RANKS * (i + 1), and the operand's columns from SPAN * i on.

    Args:
        x_ptr: x [M, K], unit column stride.
        s_ptr: s [K] or None.
        t_ptr: tensor scale, float32, one value (stride_tm 0) or [M] (stride_tm 1); None for a plain operand.
        down_ptr: L2 [R, K] contiguous, x's dtype.
        operand_ptr: result [M, K] contiguous; None to not store it.
        h_ptr: [M, R] contiguous.
        SCALE_FACTOR: fp8 divides by ``a = SCALE_FACTOR * t``.
    """
    token = tl.program_id(1).to(tl.int64)
    offs_r = tl.program_id(0) * RANKS + tl.arange(0, RANKS)
    products = tl.zeros((RANKS, BLOCK_K), dtype=tl.float32)
    # Unrolled, so that all of the program's loads are under way at once.
    for start in tl.static_range(0, K, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        x_hat = tl.load(x_ptr + token * stride_xm + offs_k, mask=mask_k, other=0.0)[None, :]
        if s_ptr is not None:
            x_hat = smooth(x_hat, tl.load(s_ptr + offs_k, mask=mask_k, other=0.0))
        mask_down = (offs_r < R)[:, None] & mask_k[None, :]
        down = tl.load(down_ptr + offs_r.to(tl.int64)[:, None] * K + offs_k[None, :], mask=mask_down, other=0.0)
        products += down.to(tl.float32) * x_hat.to(tl.float32)
    h = tl.sum(products, 1)
    tl.store(h_ptr + token * R + offs_r, h.to(h_ptr.dtype.element_ty), mask=offs_r < R)
    if operand_ptr is not None:
        first = tl.program_id(0) * SPAN
        row_t_ptr = None if t_ptr is None else t_ptr + token * stride_tm
        store_operand(
            x_ptr + token * stride_xm,
            s_ptr,
            row_t_ptr,
            operand_ptr + token * K,
            first,
            tl.minimum(first + SPAN, K),
            OPERAND,
            SCALE_FACTOR,
            BLOCK_S,
        )


RANKS = 2
"""Ranks a program takes: as measured on sm_90, as are the blocks of K."""


def configuration(k: int, rank: int) -> dict[str, int]:
    """Constants of the kernel and its ``num_warps``, for K and R."""
    block = min(1024 if k <= 8192 else 2048, triton.next_power_of_2(k))
    # Blocks of 16 columns share a scale.
    span = 16 * triton.cdiv(k, 16 * triton.cdiv(rank, RANKS))
    block_s = min(block, triton.next_power_of_2(span))
    return {"RANKS": RANKS, "BLOCK_K": block, "SPAN": span, "BLOCK_S": block_s, "num_warps": 4}


def grid(m: int, rank: int) -> tuple[int, int]:
    """Programs for M tokens, which may be symbolic, and R ranks."""
    return triton.cdiv(rank, RANKS), m
