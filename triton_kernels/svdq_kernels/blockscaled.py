"""NVFP4 times NVFP4 on packed operands, by block-scaled tensor cores (sm_100, sm_103, sm_120, sm_121) where there are.

Beside the README's letters, S counts the parts a sum over K was split into.
"""

import torch
import triton
import triton.language as tl

from .dense import tile_origin
from .fp4 import GROUP, decode_e4m3, unpack_e2m1


@triton.jit
def decode_tile(codes, scale, GROUP: tl.constexpr):
    """Code times block scale; float16 holds it exactly: at most 6 significant bits between 2**-10 and 2688.

    Args:
        codes: packed, uint8 [ROWS, K/2].
        scale: e4m3 bits, uint8 [ROWS, K/G].

    Returns:
        float16 [ROWS, K].
    """
    values = tl.reshape(unpack_e2m1(codes), (scale.shape[0], scale.shape[1], GROUP))
    values *= decode_e4m3(scale)[:, :, None]
    return tl.reshape(values, (scale.shape[0], scale.shape[1] * GROUP)).to(tl.float16)


@triton.jit
def blockscaled_product(
    x_ptr,
    xs_ptr,
    w_ptr,
    ws_ptr,
    first_m,
    first_n,
    M,
    N,
    K,
    stride_xm,
    stride_xsm,
    stride_wn,
    stride_wsn,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """One tile of ``(x code * x block scale) @ (w code * w block scale).T``, without the tensor scales.

    Without NATIVE both operands are decoded to float16, which is exact as well, and multiplied by the tensor cores
    every GPU from sm_80 on has. That needs no memory for an expanded weight, and shares all but the product itself
    with the native branch, so that a GPU without block-scaled tensor cores tests the rest.

    Args:
        x_ptr: codes uint8 [M, K/2], even column in the low nibble, unit column stride.
        xs_ptr: block scales [M, K/G], e4m3 or its bits as uint8, unit column stride.
        w_ptr: codes uint8 [N, K/2], likewise.
        ws_ptr: block scales [N, K/G], likewise.
        first_m: the tile's first row, int32 scalar below M.
        first_n: the tile's first column, int32 scalar below N.
        stride_xm: bytes between rows of x_ptr, a multiple of 8; stride_wn likewise, stride_xsm and stride_wsn of any
            parity. A tile's rows span less than 2**31 bytes.
        EVEN_K: whether K is a multiple of BLOCK_K.
        NATIVE: whether the GPU multiplies block-scaled e2m1.

    Returns:
        float32 [BLOCK_M, BLOCK_N]; what lies beyond M or N repeats the last row or column.
    """
    tl.static_assert(BLOCK_K % (4 * GROUP) == 0)
    offs_b = tl.arange(0, BLOCK_K // 2)
    offs_g = tl.arange(0, BLOCK_K // GROUP)
    rows_m = tl.minimum(tl.arange(0, BLOCK_M), M - 1 - first_m)[:, None]
    rows_n = tl.minimum(tl.arange(0, BLOCK_N), N - 1 - first_n)[:, None]
    # 64 bits for the tile's corner alone: pointers of every element would take twice the registers.
    x_ptr += first_m.to(tl.int64) * (stride_xm // 8 * 8)
    w_ptr += first_n.to(tl.int64) * (stride_wn // 8 * 8)
    xs_ptr = xs_ptr.to(tl.pointer_type(tl.uint8), bitcast=True) + first_m.to(tl.int64) * stride_xsm
    ws_ptr = ws_ptr.to(tl.pointer_type(tl.uint8), bitcast=True) + first_n.to(tl.int64) * stride_wsn
    # Tells the compiler that it may load 8 bytes at once.
    offs_x = rows_m * (stride_xm // 8 * 8) + offs_b[None, :]  # [BLOCK_M, BLOCK_K / 2]
    offs_w = rows_n * (stride_wn // 8 * 8) + offs_b[None, :]  # [BLOCK_N, BLOCK_K / 2]
    offs_xs = rows_m * stride_xsm + offs_g[None, :]  # [BLOCK_M, BLOCK_K / G]
    offs_ws = rows_n * stride_wsn + offs_g[None, :]  # [BLOCK_N, BLOCK_K / G]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptr + offs_x)
            w = tl.load(w_ptr + offs_w)
            xs = tl.load(xs_ptr + offs_xs)
            ws = tl.load(ws_ptr + offs_ws)
        else:
            # Zero scales make what follows K add nothing; the next row's might be NaN. Codes: nothing may be read
            # beyond the end of the tensor.
            mask_b = (offs_b < (K - start) // 2)[None, :]
            mask_g = (offs_g < (K - start) // GROUP)[None, :]
            x = tl.load(x_ptr + offs_x, mask=mask_b, other=0)
            w = tl.load(w_ptr + offs_w, mask=mask_b, other=0)
            xs = tl.load(xs_ptr + offs_xs, mask=mask_g, other=0)
            ws = tl.load(ws_ptr + offs_ws, mask=mask_g, other=0)
        if NATIVE:
            xs = xs.to(tl.float8e4nv, bitcast=True)
            ws = ws.to(tl.float8e4nv, bitcast=True)
            acc = tl.dot_scaled(x, xs, "e2m1", w.T, ws, "e2m1", acc)
        else:
            acc = tl.dot(decode_tile(x, xs, GROUP), decode_tile(w, ws, GROUP).T, acc)
        x_ptr += BLOCK_K // 2
        w_ptr += BLOCK_K // 2
        xs_ptr += BLOCK_K // GROUP
        ws_ptr += BLOCK_K // GROUP
    return acc


@triton.jit
def sum_partials(h_ptr, offs_m, offs_r, M, R, SPLITS):
    """Sum over S of one tile of h, in ascending order, so that it does not depend on scheduling.

    Args:
        h_ptr: float32 [S, M, R] contiguous.
        offs_m: int32 [BLOCK_M].
        offs_r: int32 [BLOCK_R].
        SPLITS: S.

    Returns:
        float32 [BLOCK_M, BLOCK_R], 0 beyond M and R.
    """
    mask = (offs_m < M)[:, None] & (offs_r < R)[None, :]
    offs = offs_m.to(tl.int64)[:, None] * R + offs_r[None, :]
    h = tl.zeros(mask.shape, dtype=tl.float32)
    for _ in range(SPLITS):
        h += tl.load(h_ptr + offs, mask=mask, other=0.0)
        h_ptr += tl.cast(M, tl.int64) * R
    return h


@triton.jit
def load_transposed(l1_ptr, offs_n, offs_r, N, R):
    """One tile of L1^T [BLOCK_R, BLOCK_N], 0 beyond R and N, from L1 [N, R] contiguous."""
    offs = offs_n.to(tl.int64)[:, None] * R + offs_r[None, :]
    return tl.load(l1_ptr + offs, mask=(offs_n < N)[:, None] & (offs_r < R)[None, :], other=0.0).T


@triton.jit
def load_bias(bias_ptr, offs_n, N):
    """float32 [1, BLOCK_N] of the bias [N], 0 beyond N."""
    return tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]


@triton.jit
def finish_product(
    acc,
    i_ptr,
    t_ptr,
    h_ptr,
    l1_ptr,
    bias_ptr,
    first_m,
    first_n,
    M,
    N,
    R,
    SPLITS,
    PER_TOKEN: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """``acc * (i * t) + sum(h) @ L1.T + bias``, in two halves of the columns: half the registers at a time.

    ``tl.reshape(tl.permute(tl.join(left, right), (0, 2, 1)), acc.shape)`` is the whole tile again.

    Args:
        acc: the tile of :func:`blockscaled_product`, float32 [BLOCK_M, BLOCK_N].
        i_ptr: scale of the activations, float32, one value, or [M] with PER_TOKEN.
        t_ptr: tensor scale of the weight, float32, one value.
        h_ptr: parts of ``x_hat @ L2.T``, float32 [S, M, R] contiguous, or None without a low-rank branch.
        l1_ptr: L1 [N, R] contiguous, bfloat16 or float16; the sum over S is rounded to its dtype.
        bias_ptr: [N], any floating dtype, or None.
        first_m: the tile's first row, int32 scalar.
        first_n: the tile's first column, int32 scalar.
        SPLITS: S.
        BLOCK_R: ranks a step, a power of two, at least 16.

    Returns:
        left, right: float32 [BLOCK_M, BLOCK_N / 2] each.
    """
    BLOCK_M: tl.constexpr = acc.shape[0]
    HALF: tl.constexpr = acc.shape[1] // 2
    offs_m = first_m + tl.arange(0, BLOCK_M)
    offs_left = first_n + tl.arange(0, HALF)
    offs_right = offs_left + HALF
    left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, HALF)), (0, 2, 1)))
    i = tl.load(i_ptr + offs_m, mask=offs_m < M, other=0.0)[:, None] if PER_TOKEN else tl.load(i_ptr)
    scale = i * tl.load(t_ptr)
    left *= scale
    right *= scale
    if h_ptr is not None:
        for start in range(0, R, BLOCK_R):
            offs_r = start + tl.arange(0, BLOCK_R)
            h = sum_partials(h_ptr, offs_m, offs_r, M, R, SPLITS).to(l1_ptr.dtype.element_ty)
            left = tl.dot(h, load_transposed(l1_ptr, offs_left, offs_r, N, R), left)
            right = tl.dot(h, load_transposed(l1_ptr, offs_right, offs_r, N, R), right)
    if bias_ptr is not None:
        left += load_bias(bias_ptr, offs_left, N)
        right += load_bias(bias_ptr, offs_right, N)
    return left, right


@triton.jit
def store_tile(out_ptr, values, first_m, first_n, M, N):
    """Stores what of a tile lies within M and N.

    Args:
        out_ptr: [M, N] contiguous, any floating dtype; BLOCK_M rows hold less than 2**31 elements.
        values: float32 [BLOCK_M, BLOCK_N].
    """
    offs_m = tl.arange(0, values.shape[0])[:, None]
    offs_n = tl.arange(0, values.shape[1])[None, :]
    mask = (offs_m < M - first_m) & (offs_n < N - first_n)
    out_ptr += first_m.to(tl.int64) * N + first_n
    tl.store(out_ptr + offs_m * N + offs_n, values.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _multiply_kernel(
    x_ptr,
    xs_ptr,
    w_ptr,
    ws_ptr,
    i_ptr,
    t_ptr,
    h_ptr,
    l1_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    R,
    SPLITS,
    stride_xm,
    stride_xsm,
    stride_wn,
    stride_wsn,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """One tile of the output; arguments as :func:`blockscaled_product` and :func:`finish_product` take them."""
    first_m, first_n = tile_origin(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    acc = blockscaled_product(
        x_ptr,
        xs_ptr,
        w_ptr,
        ws_ptr,
        first_m,
        first_n,
        M,
        N,
        K,
        stride_xm,
        stride_xsm,
        stride_wn,
        stride_wsn,
        GROUP,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        EVEN_K,
        NATIVE,
    )
    left, right = finish_product(
        acc, i_ptr, t_ptr, h_ptr, l1_ptr, bias_ptr, first_m, first_n, M, N, R, SPLITS, PER_TOKEN, BLOCK_R
    )
    store_tile(out_ptr, left, first_m, first_n, M, N)
    store_tile(out_ptr, right, first_m, first_n + BLOCK_N // 2, M, N)


SM_100_TILE = (128, 128, 256, 8, 4)
"""BLOCK_M, BLOCK_N, BLOCK_K, warps, stages. Triton does not overlap one block-scaled product of a program with its
next on sm_100; two programs a multiprocessor do, which is room for 113 KiB of shared memory, 128 registers a thread
and 256 columns of tensor memory each."""

SM_120_TILE = (128, 128, 128, 8, 4)

NATIVE_TILES = {(10, 0): SM_100_TILE, (10, 3): SM_100_TILE, (12, 0): SM_120_TILE}
"""Compute capability -> tile, where Triton multiplies e2m1 with e4m3 block scales by the tensor cores."""

# Before 3.8 Triton decodes on sm_121, and fails at it for e4m3 scales.
if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8):
    NATIVE_TILES[12, 1] = SM_120_TILE

DECODED_TILE = (128, 64, 64, 8, 3)
"""The tile of every other GPU; larger ones spill registers."""

GROUP_M = 8
MAX_BLOCK_R = 64


def block_r(rank: int) -> int:
    """Ranks a step of the low-rank product takes; 16 is the least a tensor core takes."""
    return min(MAX_BLOCK_R, max(16, triton.next_power_of_2(rank)))


def multiply_nvfp4(
    x_codes: torch.Tensor,
    x_scale: torch.Tensor,
    qweight: torch.Tensor,
    weight_scale: torch.Tensor,
    input_scale: torch.Tensor,
    weight_scale_2: torch.Tensor,
    partials: torch.Tensor | None,
    lora_up: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """``(x_q @ w_q.T) * (i * t) + sum(partials) @ L1.T + bias`` with sums in float32 and one rounding at the end.

    ``x_q`` and ``w_q`` are code times block scale. GPUs without block-scaled tensor cores multiply the same numbers
    as float16, exactly. Tensors that are not contiguous are copied first.

    Args:
        x_codes: packed codes uint8 [M, K/2], even column in the low nibble.
        x_scale: float8_e4m3fn [M, K/16].
        qweight: packed codes uint8 [N, K/2].
        weight_scale: float8_e4m3fn [N, K/16].
        input_scale: i, float32, one value or M of them, one per token.
        weight_scale_2: t, float32, one value.
        partials: float32 [S, M, R], whose sum is ``x_hat @ L2.T``, added in ascending order and rounded to the dtype
            of ``lora_up``, or that sum [1, M, R] in this dtype; None without a low-rank branch.
        lora_up: L1, bfloat16 or float16 [N, R]; None without a low-rank branch.
        bias: bfloat16, float16 or float32 [N], or None.
        out_dtype: bfloat16, float16 or float32.

    Returns:
        ``out_dtype`` [M, N], contiguous.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    m, n, rank = _check(
        x_codes, x_scale, qweight, weight_scale, input_scale, weight_scale_2, partials, lora_up, bias, out_dtype
    )
    k = 2 * x_codes.shape[1]
    out = torch.empty(m, n, dtype=out_dtype, device=x_codes.device)
    if out.numel():
        capability = torch.cuda.get_device_capability(x_codes.device)
        block_m, block_n, block_k, num_warps, num_stages = NATIVE_TILES.get(capability, DECODED_TILE)
        x_codes, qweight = x_codes.contiguous(), qweight.contiguous()
        # Bits rather than e4m3 values: Triton has no e4m3 loads below sm_89.
        x_bits, weight_bits = (t.contiguous().view(torch.uint8) for t in (x_scale, weight_scale))
        with torch.cuda.device_of(x_codes):
            _multiply_kernel[(triton.cdiv(m, block_m) * triton.cdiv(n, block_n),)](
                x_codes,
                x_bits,
                qweight,
                weight_bits,
                input_scale.contiguous(),
                weight_scale_2,
                partials.contiguous() if rank else None,
                lora_up.contiguous() if rank else None,
                None if bias is None else bias.contiguous(),
                out,
                m,
                n,
                k,
                rank,
                len(partials) if rank else 0,
                k // 2,
                k // GROUP,
                k // 2,
                k // GROUP,
                GROUP=GROUP,
                BLOCK_M=block_m,
                BLOCK_N=block_n,
                BLOCK_K=block_k,
                BLOCK_R=block_r(rank),
                GROUP_M=GROUP_M,
                EVEN_K=k % block_k == 0,
                PER_TOKEN=input_scale.numel() != 1,
                NATIVE=capability in NATIVE_TILES,
                num_warps=num_warps,
                num_stages=num_stages,
            )
    return out


FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def _check(x_codes, x_scale, qweight, weight_scale, input_scale, weight_scale_2, partials, lora_up, bias, out_dtype):
    """M, N and R (0 without a low-rank branch) of arguments that fit together; ValueError if they do not."""
    (m, half_k), (n, _) = x_codes.shape, qweight.shape
    for name, codes, scale in (("x", x_codes, x_scale), ("weight", qweight, weight_scale)):
        if codes.dtype != torch.uint8 or scale.dtype != torch.float8_e4m3fn:
            raise ValueError(f"{name} is {codes.dtype} and {scale.dtype}, needs uint8 and float8_e4m3fn")
        if codes.shape[1] % 8 or tuple(scale.shape) != (codes.shape[0], codes.shape[1] // 8):
            raise ValueError(f"{name} scale {tuple(scale.shape)} does not fit {tuple(codes.shape)} codes")
    if qweight.shape[1] != half_k:
        raise ValueError(f"x has {2 * half_k} columns, the weight {2 * qweight.shape[1]}")
    if input_scale.dtype != torch.float32 or input_scale.numel() not in (1, m):
        raise ValueError(f"input_scale is {input_scale.dtype}, {input_scale.numel()} values, needs 1 or {m} float32")
    if weight_scale_2.dtype != torch.float32 or weight_scale_2.numel() != 1:
        raise ValueError(f"weight_scale_2 is {weight_scale_2.dtype}, {weight_scale_2.numel()} values, needs 1 float32")
    if (partials is None) != (lora_up is None):
        raise ValueError("partials and lora_up go together")
    rank = 0
    if lora_up is not None:
        rank = lora_up.shape[-1]
        if lora_up.dtype not in (torch.bfloat16, torch.float16) or tuple(lora_up.shape) != (n, rank):
            raise ValueError(f"lora_up is {lora_up.dtype} {tuple(lora_up.shape)}, needs bfloat16 or float16 ({n}, R)")
        summed = partials.dtype == lora_up.dtype and len(partials) == 1
        if not (partials.dtype == torch.float32 or summed) or tuple(partials.shape[1:]) != (m, rank):
            raise ValueError(
                f"partials is {partials.dtype} {tuple(partials.shape)}, needs float32 (S, {m}, {rank}), "
                f"or {lora_up.dtype} (1, {m}, {rank})"
            )
    if bias is not None and (bias.dtype not in FLOATS or tuple(bias.shape) != (n,)):
        raise ValueError(f"bias is {bias.dtype} {tuple(bias.shape)}, needs bfloat16, float16 or float32 ({n},)")
    if out_dtype not in FLOATS:
        raise ValueError(f"out_dtype is {out_dtype}, needs bfloat16, float16 or float32")
    return m, n, rank
