"""The first GEMM of a feed-forward layer, finished as the operand of the second.

    y        = (x_q @ w_q.T) * (scale_a * scale_b) + h @ L1.T + bias
    x_hat    = gelu(y) * s                  gelu and the product rounded to 16 bits each
    operand  = e4m3(x_hat / a)
    partials = x_hat @ L2.T                 per tile of y's columns, rounded to 16 bits each

s, a and L2 belong to the second linear. gelu(y), [M, N] in 16 bits, is never written: the tile that holds it smooths,
quantises and projects it, so the second linear needs no activation kernel.
"""

import torch
import triton
import triton.language as tl

from . import dense, scratch
from .activation import check_scales, padded_rank
from .dense import column_parts, dense_tile, late, tile_origin
from .operand import smooth
from .projection import beside_arguments, sum_block, sum_partials, write_sum

LINEAR = tl.constexpr(-2.302208198144325)
"""-2 * sqrt(2 / pi) * log2(e): what GELU's tanh form and its exponential in base 2 make of x."""

CUBIC = tl.constexpr(0.044715 * -2.302208198144325)
"""The same of x**3."""


@triton.jit
def gelu_tanh(x):
    """``x / 2 * (1 + tanh(u)) = x / (1 + exp(-2 u))`` with ``u = sqrt(2 / pi) * (x + 0.044715 x**3)``.

    The second form needs no tanh, whose branches cost more registers than a tile of sums leaves.

    Args:
        x: float32, any shape.
    """
    exponent = x * (LINEAR + CUBIC * x * x)
    return x / (1.0 + tl.exp2(exponent))


@triton.jit
def load_down(down_ptr, offs_n, N, R: tl.constexpr, RANK: tl.constexpr):
    """Some columns of L2 [R, N], [RANK, width]; 0 without a low-rank branch."""
    down = 0
    if RANK > 0:
        offs_r = tl.arange(0, RANK)
        mask = (offs_r < R)[:, None] & (offs_n < N)[None, :]
        down = tl.load(down_ptr + offs_r.to(tl.int64)[:, None] * N + offs_n[None, :], mask=mask, other=0.0)
    return down


@triton.jit
def quantize_tile(
    y,
    down,
    s_ptr,
    t_ptr,
    reciprocal,
    operand_ptr,
    h,
    offs_m,
    offs_n,
    M,
    N,
    RANK: tl.constexpr,
    BFLOAT16: tl.constexpr,
):
    """Stores the operand of some columns of y; returns h with their part of the down-projection added.

    Args:
        y: float32 [BLOCK_M, width] at rows offs_m and columns offs_n.
        down: what :func:`load_down` returns of the same columns.
        s_ptr: s [N] or None.
        t_ptr: float32, one value.
        reciprocal: ``1 / a``.
        operand_ptr: e4m3 [M, N] contiguous.
        h: float32 [BLOCK_M, RANK].
        RANK: R rounded up to a size tl.dot takes, 0 without a low-rank branch.
        BFLOAT16: whether the model's dtype is bfloat16; else float16.
    """
    mask_n = offs_n < N
    x_hat = gelu_tanh(y).to(tl.bfloat16 if BFLOAT16 else tl.float16)
    if s_ptr is not None:
        x_hat = smooth(x_hat, tl.load(s_ptr + offs_n, mask=mask_n, other=0.0))
    # The conversion saturates and keeps NaN (PTX cvt.rn.satfinite).
    operand = (x_hat.to(tl.float32) * reciprocal).to(tl.float8e4nv)
    where = offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
    tl.store(operand_ptr + where, operand, mask=(offs_m < M)[:, None] & mask_n[None, :])
    if RANK > 0:
        h = tl.dot(x_hat, tl.trans(late(down, t_ptr)), h)
    return h


@triton.jit
def _gelu_quantize_kernel(
    x,
    w,
    scale_a_ptr,
    scale_b_ptr,
    partials_ptr,
    up_ptr,
    bias_ptr,
    s_ptr,
    t_ptr,
    down_ptr,
    operand_ptr,
    next_partials_ptr,
    beside_partials_ptr,
    beside_h_ptr,
    M,
    N,
    K,
    stride_xm,
    stride_wn,
    beside_size,
    PER_TOKEN: tl.constexpr,
    FACTOR_A: tl.constexpr,
    FACTOR_B: tl.constexpr,
    R: tl.constexpr,
    SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,
    NEXT_R: tl.constexpr,
    NEXT_RANK: tl.constexpr,
    SCALE_FACTOR: tl.constexpr,
    BFLOAT16: tl.constexpr,
    TMA: tl.constexpr,
    BESIDE_SPLITS: tl.constexpr,
    SUM_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """The operand [M, N] and partials [ceil(N / BLOCK_N), M, NEXT_R] of the second linear.

    Args:
        x: x_q [M, K], e4m3 and contiguous; w: w_q [N, K], likewise.
        t_ptr: float32, one value; ``a = SCALE_FACTOR * t``.
        down_ptr: L2 [NEXT_R, N] contiguous, or None.
        TMA: whether tiles are loaded by tensor descriptors.
        beside_partials_ptr, beside_h_ptr, beside_size, BESIDE_SPLITS: as :func:`.projection.sum_block`'s, the sum of
            another linear that programs without a tile in the last round make, or all of them; None without one.
        The rest: as in :func:`svdq_kernels.dense._dense_kernel` and :func:`quantize_tile`.
    """
    if TMA:
        x = tl.make_tensor_descriptor(x, [M, K], [stride_xm, 1], [BLOCK_M, BLOCK_K])
        w = tl.make_tensor_descriptor(w, [N, K], [stride_wn, 1], [BLOCK_N, BLOCK_K])
    HALF: tl.constexpr = BLOCK_N // 2
    reciprocal = tl.div_rn(1.0, tl.load(t_ptr) * SCALE_FACTOR)
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=1):
        origin_m, origin_n = tile_origin(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        acc = dense_tile(
            x,
            w,
            scale_a_ptr,
            scale_b_ptr,
            partials_ptr,
            up_ptr,
            bias_ptr,
            origin_m,
            origin_n,
            M,
            N,
            K,
            stride_xm,
            stride_wn,
            PER_TOKEN,
            FACTOR_A,
            FACTOR_B,
            R,
            SPLITS,
            CHUNK,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            TMA,
        )
        offs_m = origin_m + tl.arange(0, BLOCK_M)
        # All of L2's part of the tile is on its way while GELU is at work.
        left, right = origin_n + tl.arange(0, HALF), origin_n + tl.arange(0, HALF) + HALF
        downs = (
            load_down(down_ptr, left, N, NEXT_R, NEXT_RANK),
            load_down(down_ptr, right, N, NEXT_R, NEXT_RANK),
        )
        # Half of the sums at a time: both halves at once do not fit the registers.
        halves = column_parts(acc, BLOCK_M, BLOCK_N, 2)
        h = tl.zeros((BLOCK_M, NEXT_RANK if NEXT_RANK else 16), dtype=tl.float32)
        for i in tl.static_range(2):
            h = quantize_tile(
                halves[i],
                downs[i],
                s_ptr,
                t_ptr,
                reciprocal,
                operand_ptr,
                h,
                offs_m,
                origin_n + tl.arange(0, HALF) + i * HALF,
                M,
                N,
                NEXT_RANK,
                BFLOAT16,
            )
        if NEXT_RANK > 0:
            offs_r = tl.arange(0, NEXT_RANK)
            where = ((origin_n // BLOCK_N).to(tl.int64) * M + offs_m)[:, None] * NEXT_R + offs_r[None, :]
            mask_h = (offs_m < M)[:, None] & (offs_r < NEXT_R)[None, :]
            tl.store(next_partials_ptr + where, h.to(next_partials_ptr.dtype.element_ty), mask=mask_h)
    if beside_partials_ptr is not None:
        programs = tl.num_programs(0)
        busy = tiles % programs
        idle = programs - busy
        blocks = tl.cdiv(beside_size, SUM_BLOCK)
        # Idle programs take all of the sum, unless it would take them longer than a tile takes the others.
        takers = idle
        if blocks > idle * BLOCKS_A_TILE:
            takers = programs
        place = (tl.program_id(0) + idle) % programs
        if place < takers:
            for block in tl.range(place, blocks, takers, num_stages=1):
                sum_block(block, beside_partials_ptr, beside_h_ptr, beside_size, BESIDE_SPLITS, SUM_BLOCK)


SUM_BLOCK = 2048
"""Values of another linear's sum that a program adds up at once: eight a thread, so that few programs load fast."""

BLOCKS_A_TILE = tl.constexpr(3)
"""Blocks of another linear's sum that a program adds up in about the time of a tile, as measured on an H200."""

MAX_RANK = 64
"""Largest rank of the second linear: its down-projection shares the registers with a tile of sums."""


def configuration(m: int, n: int, capability: tuple[int, int]) -> dict[str, int]:
    """Constants of the kernel, ``num_warps`` and ``num_stages``; m may be a hint."""
    return dense.configurations(m, n, 1, capability)[0]


def multiply_gelu_quantize(
    x_q: torch.Tensor,
    w_q: torch.Tensor,
    scale_a: torch.Tensor | None,
    scale_b: torch.Tensor,
    partials: torch.Tensor | None,
    lora_up: torch.Tensor | None,
    bias: torch.Tensor | None,
    pre_quant_scale: torch.Tensor | None,
    input_scale: torch.Tensor,
    lora_down: torch.Tensor | None,
    dtype: torch.dtype,
    factor_a: float = 1.0,
    factor_b: float = 1.0,
    scale_factor: float = 1.0,
    beside: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Operand and down-projection of ``gelu(y)``, for y as :func:`svdq_kernels.dense.multiply` computes it.

    Args:
        x_q, w_q: float8_e4m3fn [M, K] and [N, K], contiguous.
        scale_a, scale_b, partials, lora_up, bias, factor_a, factor_b: as in :func:`svdq_kernels.dense.multiply`.
        pre_quant_scale: s [N] of the second linear, or None.
        input_scale: t of the second linear, float32, one value; its operand is divided by ``scale_factor * t``.
        lora_down: L2 [R, N] of the second linear, R at most :data:`MAX_RANK`, or None.
        dtype: bfloat16 or float16, what gelu(y), x_hat and partials are rounded to.
        beside: another linear's partials [S, M, R] and its h [1, M, R], which is made as by
            :func:`.projection.sum_partials`.

    Returns:
        The operand, float8_e4m3fn [M, N], contiguous. The sum of the partials, dtype [1, M, R], or None.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    m, n = x_q.shape[0], w_q.shape[0]
    dense.check(x_q, w_q, scale_a, scale_b, partials, lora_up, bias)
    check(x_q, n, pre_quant_scale, input_scale, lora_down, dtype)
    capability = torch.cuda.get_device_capability(x_q.device)
    config = configuration(m, n, capability)
    next_rank = 0 if lora_down is None else lora_down.shape[0]
    columns, rows = triton.cdiv(n, config["BLOCK_N"]), triton.cdiv(m, config["BLOCK_M"])
    operand = torch.empty(m, n, dtype=torch.float8_e4m3fn, device=x_q.device)
    slices = torch.empty(columns, m, next_rank, dtype=dtype, device=x_q.device) if next_rank else None
    if operand.numel():
        with torch.cuda.device_of(x_q):
            scratch.provide()
            _gelu_quantize_kernel[(min(columns * rows, dense.multiprocessors(x_q.device)),)](
                x_q,
                w_q,
                **dense.tile_arguments(x_q, w_q, scale_a, scale_b, partials, lora_up, bias, factor_a, factor_b),
                s_ptr=pre_quant_scale,
                t_ptr=input_scale,
                down_ptr=lora_down.contiguous() if next_rank else None,
                operand_ptr=operand,
                next_partials_ptr=slices,
                **beside_arguments(beside),
                SUM_BLOCK=SUM_BLOCK,
                NEXT_R=next_rank,
                NEXT_RANK=padded_rank(next_rank),
                SCALE_FACTOR=scale_factor,
                BFLOAT16=dtype == torch.bfloat16,
                TMA=dense.uses_tma(capability),
                **config,
            )
    elif beside:
        write_sum(*beside)
    return operand, sum_partials(slices, dtype) if next_rank else None


def check(x_q, n, pre_quant_scale, input_scale, lora_down, dtype) -> None:
    """Raises ValueError unless the second linear's arguments of :func:`multiply_gelu_quantize` fit."""
    if x_q.dtype != torch.float8_e4m3fn or dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"operands are {x_q.dtype}, activations {dtype}, needs e4m3 and a 16-bit float")
    if n % 16:
        raise ValueError(f"the second linear has {n} columns, needs a multiple of 16")
    check_scales(n, pre_quant_scale, input_scale)
    if lora_down is not None:
        if lora_down.shape[1:] != (n,) or lora_down.dtype != dtype:
            raise ValueError(f"lora_down is {lora_down.dtype} {tuple(lora_down.shape)}, needs {dtype} (R, {n})")
        if lora_down.shape[0] > MAX_RANK:
            raise ValueError(f"lora_down has rank {lora_down.shape[0]}, needs at most {MAX_RANK}")
