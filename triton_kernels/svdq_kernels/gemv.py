"""The linear of at most four tokens: a read of the packed weight, multiplied as it is unpacked.

    y = (x @ (code * block scale).T) * (scale_a * scale_b) + h @ L1.T + bias

Eight codes lie in a 32-bit word, so x comes word-major: all first columns of the words, then all second ones. Then the
values of a word's n-th code meet consecutive elements of x, and no data crosses threads before the final sums.
"""

import torch
import triton
import triton.language as tl

from .dense import check_low_rank
from .fp4 import GROUP, decode_e4m3

MAX_TOKENS = 4
"""More tokens are more multiplications per code than a read has time for."""

BLOCK_N, BLOCK_W, NUM_WARPS = 4, 128, 2
"""Rows and words a step of a program takes: 16 bytes of codes a thread and load."""


@triton.jit
def decode_words(words):
    """Eight float32 tensors, ``code * 2**-126``, from the lowest nibble to the highest.

    An e2m1 code moved to the lowest exponent bits of a bfloat16 is its value times 2**-126; two codes at a time.

    Args:
        words: int32, any shape.
    """
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 pair, t;
        shl.b32 t, $8, 6;  and.b32 pair, t, 0x01C001C0;
        shl.b32 t, $8, 12; lop3.b32 pair, t, 0x80008000, pair, 0xEA;
        shl.b32 $0, pair, 16; and.b32 $4, pair, 0xFFFF0000;
        shl.b32 t, $8, 2;  and.b32 pair, t, 0x01C001C0;
        shl.b32 t, $8, 8;  lop3.b32 pair, t, 0x80008000, pair, 0xEA;
        shl.b32 $1, pair, 16; and.b32 $5, pair, 0xFFFF0000;
        shr.b32 t, $8, 2;  and.b32 pair, t, 0x01C001C0;
        shl.b32 t, $8, 4;  lop3.b32 pair, t, 0x80008000, pair, 0xEA;
        shl.b32 $2, pair, 16; and.b32 $6, pair, 0xFFFF0000;
        shr.b32 t, $8, 6;  and.b32 pair, t, 0x01C001C0;
        lop3.b32 pair, $8, 0x80008000, pair, 0xEA;
        shl.b32 $3, pair, 16; and.b32 $7, pair, 0xFFFF0000;
        }
        """,
        # Early clobbers: outputs are written while the word is still read.
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r",
        [words],
        dtype=(tl.float32,) * 8,
        is_pure=True,
        pack=1,
    )


@triton.jit
def matrix_vector(
    x_ptr,
    words_ptr,
    block_scale_ptr,
    offs_n,
    M,
    N,
    W,
    EVEN_W: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """``x @ (code * block scale).T`` of some rows of the weight.

    Args:
        x_ptr: 16-bit [M, 8, K/8] contiguous, word-major.
        words_ptr: codes, int32 [N, K/8] contiguous, first column in the lowest nibble.
        block_scale_ptr: [N, K/16] contiguous, e4m3 or its bits as uint8.
        offs_n: int32 [BLOCK_N].
        W: K / 8, words of a row.
        EVEN_W: whether BLOCK_W divides W; a mask along it would split the loads.
        TOKENS: M rounded up to a power of two.

    Returns:
        float32 [TOKENS, BLOCK_N].
    """
    token = tl.arange(0, TOKENS)
    row = offs_n.to(tl.int64)
    acc = tl.zeros((TOKENS, BLOCK_N, BLOCK_W), dtype=tl.float32)
    for start in range(0, W, BLOCK_W):
        offs_w = start + tl.arange(0, BLOCK_W)
        mask = (offs_n < N)[:, None]
        mask_x = (token < M)[:, None]
        if not EVEN_W:
            mask &= (offs_w < W)[None, :]
            mask_x &= (offs_w < W)[None, :]
        words = tl.load(words_ptr + row[:, None] * W + offs_w[None, :], mask=mask, other=0)
        bits = tl.load(block_scale_ptr + row[:, None] * (W // 2) + (offs_w // 2)[None, :], mask=mask, other=0.0)
        scale = decode_e4m3(bits.to(tl.uint8, bitcast=True))
        values = decode_words(words)
        part = tl.zeros((TOKENS, BLOCK_N, BLOCK_W), dtype=tl.float32)
        for place in tl.static_range(8):
            where = (token[:, None] * 8 + place) * W + offs_w[None, :]
            x = tl.load(x_ptr + where, mask=mask_x, other=0.0)
            # 2**64 keeps the products with code * 2**-126 away from both ends of float32.
            part += values[place][None, :, :] * (x.to(tl.float32) * 18446744073709551616.0)[:, None, :]
        acc += part * scale[None, :, :]
    return tl.sum(acc, 2) * 4611686018427387904.0


@triton.jit
def add_low_rank_vector(
    acc,
    partials_ptr,
    up_ptr,
    offs_n,
    M,
    N,
    R: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """``acc + h @ L1.T`` with ``h = sum of partials``, rounded to L1's dtype as every other kernel does.

    Args:
        acc: float32 [TOKENS, BLOCK_N].
        partials_ptr: float32 [SPLITS, M, R] contiguous.
        up_ptr: L1 [N, R] contiguous.
        SPLITS_PADDED: SPLITS rounded up to a power of two.
    """
    token = tl.arange(0, TOKENS)
    split = tl.arange(0, SPLITS_PADDED)
    for first in tl.static_range(0, R, 16):
        offs_r = first + tl.arange(0, 16)
        mask_r = offs_r < R
        mask_h = (split < SPLITS)[:, None, None] & (token < M)[None, :, None] & mask_r[None, None, :]
        where = (split[:, None, None] * M + token[None, :, None]) * R + offs_r[None, None, :]
        # All at once: one after the other they would take longer than the weight.
        h = tl.sum(tl.load(partials_ptr + where, mask=mask_h, other=0.0), 0)
        mask_up = (offs_n < N)[:, None] & mask_r[None, :]
        up = tl.load(up_ptr + offs_n.to(tl.int64)[:, None] * R + offs_r[None, :], mask=mask_up, other=0.0)
        h = h.to(up.dtype).to(tl.float32)
        acc += tl.sum(h[:, None, :] * up.to(tl.float32)[None, :, :], 2)
    return acc


@triton.jit
def scaled_vector(acc, scale_a_ptr, scale_b_ptr, M, TOKENS: tl.constexpr, PER_TOKEN: tl.constexpr):
    """``acc * (scale_a * scale_b)``; scale_a_ptr None stands for 1."""
    scale = tl.load(scale_b_ptr)
    token = tl.arange(0, TOKENS)
    if scale_a_ptr is None:
        acc = acc * scale
    elif PER_TOKEN:
        acc = acc * (tl.load(scale_a_ptr + token, mask=token < M, other=0.0) * scale)[:, None]
    else:
        acc = acc * (tl.load(scale_a_ptr) * scale)
    return acc


@triton.jit
def _gemv_kernel(
    x_ptr,
    words_ptr,
    block_scale_ptr,
    scale_a_ptr,
    scale_b_ptr,
    partials_ptr,
    up_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    W,
    PER_TOKEN: tl.constexpr,
    EVEN_W: tl.constexpr,
    R: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """BLOCK_N columns of y [M, N], contiguous; pointers as in the functions above, None for an absent part."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = matrix_vector(x_ptr, words_ptr, block_scale_ptr, offs_n, M, N, W, EVEN_W, TOKENS, BLOCK_N, BLOCK_W)
    acc = scaled_vector(acc, scale_a_ptr, scale_b_ptr, M, TOKENS, PER_TOKEN)
    if R > 0:
        acc = add_low_rank_vector(acc, partials_ptr, up_ptr, offs_n, M, N, R, SPLITS, SPLITS_PADDED, TOKENS)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    token = tl.arange(0, TOKENS)
    mask = (token < M)[:, None] & (offs_n < N)[None, :]
    tl.store(out_ptr + token[:, None] * N + offs_n[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)


def multiply_vector(
    x: torch.Tensor,
    qweight: torch.Tensor,
    weight_scale: torch.Tensor,
    scale_a: torch.Tensor | None,
    scale_b: torch.Tensor,
    partials: torch.Tensor | None,
    lora_up: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """``(x @ (code * block scale).T) * (scale_a * scale_b) + h @ L1.T + bias``, sums in float32.

    Args:
        x: bfloat16 or float16 [M, K], contiguous, at most :data:`MAX_TOKENS` rows, word-major as
            ``prepare(word_major=True)`` writes it: element ``8 * w + n`` of a row at ``n * (K / 8) + w``.
        qweight: packed codes uint8 [N, K/2], even column in the low nibble.
        weight_scale: float8_e4m3fn [N, K/16].
        scale_a: float32, one value, [M, 1] for one per token, or None for 1.
        scale_b: float32, one value.
        partials: float32 [S, M, R], whose sum over S is h; None without a low-rank branch.
        lora_up: L1 [N, R], bfloat16 or float16; None without a low-rank branch.
        bias: [N] or None.

    Returns:
        x's dtype [M, N], contiguous.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    m, k = x.shape
    n = qweight.shape[0]
    if m > MAX_TOKENS or x.dtype not in (torch.bfloat16, torch.float16) or not x.is_contiguous():
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}, needs up to {MAX_TOKENS} contiguous rows of 16 bits")
    if k % GROUP or tuple(qweight.shape) != (n, k // 2) or tuple(weight_scale.shape) != (n, k // GROUP):
        raise ValueError(f"weight {tuple(qweight.shape)}, {tuple(weight_scale.shape)} does not fit {k} columns")
    check_low_rank(m, n, partials, lora_up, bias)
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    rank = 0 if partials is None else partials.shape[2]
    with torch.cuda.device_of(x):
        _gemv_kernel[(triton.cdiv(n, BLOCK_N),)](
            x,
            qweight.contiguous().view(torch.int32),
            weight_scale.contiguous().view(torch.uint8),
            scale_a,
            scale_b,
            partials,
            lora_up.contiguous() if rank else None,
            bias,
            out,
            m,
            n,
            k // 8,
            PER_TOKEN=scale_a is not None and scale_a.numel() != 1,
            EVEN_W=k // 8 % BLOCK_W == 0,
            R=rank,
            SPLITS=partials.shape[0] if rank else 1,
            SPLITS_PADDED=triton.next_power_of_2(partials.shape[0]) if rank else 1,
            TOKENS=triton.next_power_of_2(m),
            BLOCK_N=BLOCK_N,
            BLOCK_W=BLOCK_W,
            num_warps=NUM_WARPS,
        )
    return out
