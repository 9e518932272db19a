"""Three linears of one activation, finished as attention's operands in buffers that several streams share.

    y    = (x_q @ w_q.T) * (scale_a * scale_b) + h @ L1.T + bias           of each member
    q, k = rotate(y / sqrt(mean(y**2) + eps) * norm)                       the mean over a head
    v    = y

rotate multiplies elements 2 i and 2 i + 1 of a head, as a complex number, with cos + i sin of their row. Everything is
float32 from the sums of the GEMM to the only rounding, that of the stored result.
"""

import torch
import triton
import triton.language as tl

from . import dense
from .dense import column_parts, dense_tile, tile_origin


@triton.jit
def load_pairs(pointers):
    """The float32 a pointer points at, and the one behind it, for pointers that are 8-byte aligned.

    PTX, because the threads that hold a pair of columns shall load its cos and sin: ``tl.load`` would have them in
    another layout, and 64 KB a head would go through shared memory, of which a tile of operands leaves 32 KB.
    """
    return tl.inline_asm_elementwise(
        "ld.global.nc.v2.f32 {$0, $1}, [$2];",
        "=f,=f,l",
        [pointers],
        dtype=(tl.float32, tl.float32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def normalize_and_rotate(
    y,
    norm_ptr,
    freqs_ptr,
    rows,
    EPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """One head of q or k.

    Args:
        y: float32 [BLOCK_M, HEAD_DIM].
        norm_ptr: [HEAD_DIM], or None for ones.
        freqs_ptr: float32 [S, HEAD_DIM / 2, 2] contiguous, (cos, sin) of S rows.
        rows: [BLOCK_M], which of them to take, all below S.

    Returns:
        float32 [BLOCK_M, HEAD_DIM].
    """
    factor = tl.rsqrt(tl.sum(y * y, 1) / HEAD_DIM + EPS)
    y = y * factor[:, None]
    if norm_ptr is not None:
        y = y * tl.load(norm_ptr + tl.arange(0, HEAD_DIM)).to(tl.float32)[None, :]
    real, imaginary = tl.split(tl.reshape(y, (BLOCK_M, HEAD_DIM // 2, 2)))
    pair = 2 * tl.arange(0, HEAD_DIM // 2)
    cos, sin = load_pairs(freqs_ptr + rows.to(tl.int64)[:, None] * HEAD_DIM + pair[None, :])
    turned = tl.join(real * cos - imaginary * sin, real * sin + imaginary * cos)
    return tl.reshape(turned, (BLOCK_M, HEAD_DIM))


@triton.jit
def _heads_kernel(
    x,
    w0,
    w1,
    w2,
    scale_a_ptr,
    scale_b0_ptr,
    scale_b1_ptr,
    scale_b2_ptr,
    partials_ptr,
    up0_ptr,
    up1_ptr,
    up2_ptr,
    bias0_ptr,
    bias1_ptr,
    bias2_ptr,
    norm_q_ptr,
    norm_k_ptr,
    freqs_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    M,
    N,
    K,
    stride_xm,
    stride_wn,
    tokens,
    first,
    sequence,
    PER_TOKEN: tl.constexpr,
    FACTOR_A: tl.constexpr,
    FACTOR_B: tl.constexpr,
    EPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    R: tl.constexpr,
    SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Rows ``first`` to ``first + tokens`` of every sequence of q, k and v [B, sequence, N].

    Args:
        x: x_q [M, K], e4m3 and contiguous, M = B * tokens.
        w0, w1, w2: w_q [N, K] of q, k and v, likewise.
        norm_q_ptr, norm_k_ptr, freqs_ptr: as in :func:`normalize_and_rotate`.
        TMA: whether tiles are loaded by tensor descriptors.
        The rest: as in :func:`svdq_kernels.dense._dense_kernel`, per member with its number.
    """
    if TMA:
        x = tl.make_tensor_descriptor(x, [M, K], [stride_xm, 1], [BLOCK_M, BLOCK_K])
        w0 = tl.make_tensor_descriptor(w0, [N, K], [stride_wn, 1], [BLOCK_N, BLOCK_K])
        w1 = tl.make_tensor_descriptor(w1, [N, K], [stride_wn, 1], [BLOCK_N, BLOCK_K])
        w2 = tl.make_tensor_descriptor(w2, [N, K], [stride_wn, 1], [BLOCK_N, BLOCK_K])
    HEADS: tl.constexpr = BLOCK_N // HEAD_DIM
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    start = tl.program_id(0)
    for member in tl.static_range(3):
        if member == 0:
            w, scale_b_ptr, up_ptr, bias_ptr = w0, scale_b0_ptr, up0_ptr, bias0_ptr
            norm_ptr, out_ptr = norm_q_ptr, q_ptr
        if member == 1:
            w, scale_b_ptr, up_ptr, bias_ptr = w1, scale_b1_ptr, up1_ptr, bias1_ptr
            norm_ptr, out_ptr = norm_k_ptr, k_ptr
        if member == 2:
            w, scale_b_ptr, up_ptr, bias_ptr = w2, scale_b2_ptr, up2_ptr, bias2_ptr
            norm_ptr, out_ptr = None, v_ptr
        for tile in tl.range(start, tiles, tl.num_programs(0), num_stages=1):
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
            rows = offs_m % tokens
            out_rows = (offs_m // tokens).to(tl.int64) * sequence + (first + rows)
            heads = column_parts(acc, BLOCK_M, BLOCK_N, HEADS)
            for i in tl.static_range(HEADS):
                y = heads[i]
                if member < 2:
                    y = normalize_and_rotate(y, norm_ptr, freqs_ptr, rows, EPS, BLOCK_M, HEAD_DIM)
                offs_n = origin_n + i * HEAD_DIM + tl.arange(0, HEAD_DIM)
                where = out_rows[:, None] * N + offs_n[None, :]
                mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
                tl.store(out_ptr + where, y.to(out_ptr.dtype.element_ty), mask=mask)
        # The program's next tile, counted from the next member's first.
        start += tl.cdiv(max(tiles - start, 0), tl.num_programs(0)) * tl.num_programs(0) - tiles


HEAD_DIMS = (64, 128)
"""Sizes of a head that a tile holds whole heads of."""


def configuration(m: int, n: int, head_dim: int, capability: tuple[int, int]) -> dict[str, int]:
    """Constants of the kernel, ``num_warps`` and ``num_stages``.

    Args:
        m: rows, may be a hint.
        n: columns of one linear.
        head_dim: one of :data:`HEAD_DIMS`.
        capability: of the device.
    """
    choices = dense.configurations(m, 3 * n, 1, capability)
    return next(config for config in choices if config["BLOCK_N"] % head_dim == 0)


def multiply_heads(
    x_q: torch.Tensor,
    w_q: list[torch.Tensor],
    scale_a: torch.Tensor | None,
    scale_b: list[torch.Tensor],
    partials: torch.Tensor | None,
    lora_up: list[torch.Tensor | None],
    bias: list[torch.Tensor | None],
    norms: list[torch.Tensor | None],
    freqs: torch.Tensor,
    out: list[torch.Tensor],
    first: int,
    eps: float,
    factor_a: float = 1.0,
    factor_b: float = 1.0,
) -> None:
    """Writes the heads of one stream into rows ``first`` to ``first + S_i`` of every sequence of q, k and v.

    Args:
        x_q: float8_e4m3fn [B * S_i, K], contiguous, K a multiple of 16.
        w_q: of q, k and v, float8_e4m3fn [N, K], contiguous.
        scale_a, partials, factor_a, factor_b: as in :func:`svdq_kernels.dense.multiply`, the same for all three.
        scale_b, lora_up, bias: as there, one each.
        norms: weights [D] of q's and k's RMSNorm, None for ones.
        freqs: float32 [S_i, D / 2, 2], contiguous: cos and sin of every row.
        out: q, k and v, bfloat16 or float16 [B, S, N / D, D], contiguous.
        first: where the stream begins.
        eps: of both norms.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    check(x_q, w_q, scale_a, scale_b, partials, lora_up, bias, norms, freqs, out, first)
    m, n = x_q.shape[0], w_q[0].shape[0]
    if not m:
        return
    batch, sequence, _, head_dim = out[0].shape
    capability = torch.cuda.get_device_capability(x_q.device)
    config = configuration(m, n, head_dim, capability)
    tiles = 3 * triton.cdiv(m, config["BLOCK_M"]) * triton.cdiv(n, config["BLOCK_N"])
    shared = dense.tile_arguments(x_q, w_q[0], scale_a, scale_b[0], partials, lora_up[0], bias[0], factor_a, factor_b)
    own = {"w": w_q, "scale_b_ptr": scale_b, "up_ptr": lora_up, "bias_ptr": bias}
    with torch.cuda.device_of(x_q):
        triton.set_allocator(lambda size, align, stream: torch.empty(size, dtype=torch.int8, device=x_q.device))
        _heads_kernel[(min(tiles, dense.multiprocessors(x_q.device)),)](
            x_q,
            **{name: value for name, value in shared.items() if name not in own},
            **members(own),
            norm_q_ptr=norms[0],
            norm_k_ptr=norms[1],
            freqs_ptr=freqs,
            q_ptr=out[0],
            k_ptr=out[1],
            v_ptr=out[2],
            tokens=m // batch,
            first=first,
            sequence=sequence,
            EPS=eps,
            HEAD_DIM=head_dim,
            TMA=dense.uses_tma(capability),
            **config,
        )


def members(own: dict[str, list]) -> dict[str, object]:
    """The kernel's arguments that there are three of, by parameter name, of lists for q, k and v."""
    return {
        name.replace("_ptr", f"{i}_ptr") if "_ptr" in name else f"{name}{i}": value
        for name, values in own.items()
        for i, value in enumerate(values)
    }


def check(x_q, w_q, scale_a, scale_b, partials, lora_up, bias, norms, freqs, out, first) -> None:
    """Raises ValueError unless the arguments of :func:`multiply_heads` fit together."""
    if (*map(len, (w_q, scale_b, lora_up, bias, norms, out)),) != (3, 3, 3, 3, 2, 3):
        raise ValueError("needs three of each for q, k and v, and two norms")
    if x_q.dtype != torch.float8_e4m3fn:
        raise ValueError(f"operands are {x_q.dtype}, needs e4m3")
    for own in zip(w_q, scale_b, lora_up, bias, strict=True):
        dense.check(x_q, own[0], scale_a, own[1], partials, *own[2:])
        if own[0].shape != w_q[0].shape:
            raise ValueError("the weights of q, k and v differ in shape")
    size = tuple(out[0].shape)
    if any(tuple(each.shape) != size or not each.is_contiguous() or each.dtype != out[0].dtype for each in out):
        raise ValueError("q, k and v need one shape and dtype, contiguous")
    batch, sequence, heads, head_dim = size
    if head_dim not in HEAD_DIMS or heads * head_dim != w_q[0].shape[0]:
        raise ValueError(f"heads are {size[2:]} for {w_q[0].shape[0]} columns, needs head_dim in {HEAD_DIMS}")
    tokens, rest = divmod(x_q.shape[0], batch)
    if rest or first < 0 or first + tokens > sequence:
        raise ValueError(f"{x_q.shape[0]} rows from {first} on do not fit {batch} sequences of {sequence}")
    if freqs.dtype != torch.float32 or not freqs.is_contiguous() or tuple(freqs.shape) != (tokens, head_dim // 2, 2):
        raise ValueError(f"freqs are {freqs.dtype} {tuple(freqs.shape)}, need float32 ({tokens}, {head_dim // 2}, 2)")
    if any(norm is not None and tuple(norm.shape) != (head_dim,) for norm in norms):
        raise ValueError(f"norms need ({head_dim},)")
