"""The residual GEMM on dense operands, with everything that shares its accumulator.

    y = (x_q @ w_q.T) * (scale_a * scale_b) + h @ L1.T + bias

One persistent program per multiprocessor walks over the output tiles. h arrives as its sum, or as partial sums over
slices of K that every tile adds in the same order, so results do not depend on the launch.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def tile_origin(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """First row and column of a tile; tiles go down GROUP_M rows before they go right, so that L2 holds both sides."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    per_group = GROUP_M * tl.cdiv(N, BLOCK_N)
    first = (tile // per_group) * GROUP_M
    height = min(tiles_m - first, GROUP_M)
    return (first + tile % height) * BLOCK_M, ((tile % per_group) // height) * BLOCK_N


@triton.jit
def next_tile(start, tiles):
    """Behind ``tiles`` tiles, the next one of the program whose first was start; counted from there."""
    programs = tl.num_programs(0)
    return start + tl.cdiv(max(tiles - start, 0), programs) * programs - tiles


@triton.jit
def descriptor_rows(M, BLOCK_M: tl.constexpr, WHOLE_TILES: tl.constexpr):
    """Rows of an operand that a tensor descriptor covers: M, or those of whole tiles where there is memory for them.

    The copy engine is slow at rows beyond a descriptor. Those behind M hold anything, and no result depends on them.
    """
    rows = M
    if WHOLE_TILES:
        rows = tl.cdiv(M, BLOCK_M) * BLOCK_M
    return rows


@triton.jit
def product(
    x,
    w,
    origin_m,
    origin_n,
    M,
    N,
    K,
    stride_xm,
    stride_wn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
):
    """``x @ w.T`` of one tile.

    Args:
        x: tensor descriptor of [M, K] with blocks [BLOCK_M, BLOCK_K], or without TMA the pointer to it.
        w: the same for [N, K].

    Returns:
        float32 [BLOCK_M, BLOCK_N].
    """
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if TMA:
        # Descriptors take 32-bit offsets, and sizes may be 64-bit.
        row_m, row_n = origin_m.to(tl.int32), origin_n.to(tl.int32)
        for start in range(0, K, BLOCK_K):
            column = tl.cast(start, tl.int32)
            # Descriptors read zeros beyond the edges.
            acc = tl.dot(x.load([row_m, column]), tl.trans(w.load([row_n, column])), acc)
    else:
        offs_m = origin_m + tl.arange(0, BLOCK_M)
        offs_n = origin_n + tl.arange(0, BLOCK_N)
        offs_k = tl.arange(0, BLOCK_K)
        x_ptrs = x + offs_m.to(tl.int64)[:, None] * stride_xm + offs_k[None, :]
        w_ptrs = w + offs_n.to(tl.int64)[:, None] * stride_wn + offs_k[None, :]
        for start in range(0, K, BLOCK_K):
            mask_k = (offs_k < K - start)[None, :]
            a = tl.load(x_ptrs + start, mask=(offs_m < M)[:, None] & mask_k, other=0.0)
            b = tl.load(w_ptrs + start, mask=(offs_n < N)[:, None] & mask_k, other=0.0)
            acc = tl.dot(a, tl.trans(b), acc)
    return acc


@triton.jit
def output_scale(
    scale_a_ptr,
    scale_b_ptr,
    offs_m,
    M,
    PER_TOKEN: tl.constexpr,
    FACTOR_A: tl.constexpr,
    FACTOR_B: tl.constexpr,
):
    """``(FACTOR_A * scale_a) * (FACTOR_B * scale_b)``, one value or [BLOCK_M, 1]; scale_a_ptr None stands for 1."""
    scale = tl.load(scale_b_ptr) * FACTOR_B
    if scale_a_ptr is not None:
        if PER_TOKEN:
            scale = (tl.load(scale_a_ptr + offs_m, mask=offs_m < M, other=0.0) * FACTOR_A * scale)[:, None]
        else:
            scale = tl.load(scale_a_ptr) * FACTOR_A * scale
    return scale


@triton.jit
def scaled(
    acc,
    scale_a_ptr,
    scale_b_ptr,
    offs_m,
    M,
    PER_TOKEN: tl.constexpr,
    FACTOR_A: tl.constexpr,
    FACTOR_B: tl.constexpr,
):
    """``acc`` times :func:`output_scale`."""
    return acc * output_scale(scale_a_ptr, scale_b_ptr, offs_m, M, PER_TOKEN, FACTOR_A, FACTOR_B)


@triton.jit
def late(value, scale_ptr):
    """A value that was loaded early, used not before here.

    Triton would change its layout, which waits for it, right where it is loaded. This it takes for a choice that
    depends on a scale; LLVM knows that none is above infinity, and drops it.
    """
    return tl.where(tl.load(scale_ptr) > float("inf"), 0.0, value)


@triton.jit
def load_low_rank(
    partials_ptr,
    up_ptr,
    offs_m,
    offs_n,
    M,
    N,
    first,
    R: tl.constexpr,
    SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Ranks first to first + CHUNK of ``h = sum of partials``, [BLOCK_M, CHUNK], and of L1, [BLOCK_N, CHUNK].

    Args:
        partials_ptr: [SPLITS, M, R] contiguous, float32 or, of a sum made before, L1's dtype.
        up_ptr: L1 [N, R] contiguous.
    """
    offs_r = first + tl.arange(0, CHUNK)
    row = offs_m.to(tl.int64)
    mask_h = (offs_m < M)[:, None]
    mask_up = (offs_n < N)[:, None]
    if R % CHUNK:
        mask_h &= (offs_r < R)[None, :]
        mask_up &= (offs_r < R)[None, :]
    h = tl.load(partials_ptr + row[:, None] * R + offs_r[None, :], mask=mask_h, other=0.0)
    for split in tl.static_range(1, SPLITS):
        where = partials_ptr + (row + split * M)[:, None] * R + offs_r[None, :]
        h += tl.load(where, mask=mask_h, other=0.0)
    up = tl.load(up_ptr + offs_n.to(tl.int64)[:, None] * R + offs_r[None, :], mask=mask_up, other=0.0)
    # Rounded as a tensor core operand has to be.
    return h.to(up.dtype), up


@triton.jit
def add_low_rank(
    acc,
    partials_ptr,
    up_ptr,
    offs_m,
    offs_n,
    M,
    N,
    R: tl.constexpr,
    SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """``acc + h @ L1.T``; arguments as :func:`load_low_rank`.

    Args:
        CHUNK: ranks multiplied at once, a power of two of at least 16.
    """
    for first in tl.static_range(0, R, CHUNK):
        h, up = load_low_rank(partials_ptr, up_ptr, offs_m, offs_n, M, N, first, R, SPLITS, CHUNK)
        acc = tl.dot(h, tl.trans(up), acc)
    return acc


@triton.jit
def add_bias(acc, bias_ptr, offs_n, N):
    """``acc + bias`` for bias [N]."""
    return acc + tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]


@triton.jit
def dense_tile(
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
    PER_TOKEN: tl.constexpr,
    FACTOR_A: tl.constexpr,
    FACTOR_B: tl.constexpr,
    R: tl.constexpr,
    SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
    BIAS_FIRST: tl.constexpr = False,
):
    """y of one tile, float32 [BLOCK_M, BLOCK_N]; arguments as in the functions above, None for an absent part.

    Args:
        BIAS_FIRST: adds the bias ahead of the low-rank branch, by the instruction that scales the sums. Without it the
            sums move to registers of their own behind the branch, which GELU needs anyway.
    """
    offs_m = origin_m + tl.arange(0, BLOCK_M)
    offs_n = origin_n + tl.arange(0, BLOCK_N)
    # What fits the registers is on its way while the main loop runs.
    scale = output_scale(scale_a_ptr, scale_b_ptr, offs_m, M, PER_TOKEN, FACTOR_A, FACTOR_B)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0)
    EARLY: tl.constexpr = (SPLITS == 1 or BLOCK_M == 64) and R <= CHUNK
    if R > 0 and EARLY:
        h, up = load_low_rank(partials_ptr, up_ptr, offs_m, offs_n, M, N, 0, R, SPLITS, CHUNK)
    acc = product(x, w, origin_m, origin_n, M, N, K, stride_xm, stride_wn, BLOCK_M, BLOCK_N, BLOCK_K, TMA)
    acc = acc * late(scale, scale_b_ptr)
    if bias_ptr is not None and BIAS_FIRST:
        acc += late(bias, scale_b_ptr).to(tl.float32)[None, :]
    if R > 0:
        if EARLY:
            acc = tl.dot(late(h, scale_b_ptr), tl.trans(late(up, scale_b_ptr)), acc)
        else:
            acc = add_low_rank(acc, partials_ptr, up_ptr, offs_m, offs_n, M, N, R, SPLITS, CHUNK)
    if bias_ptr is not None and not BIAS_FIRST:
        acc += late(bias, scale_b_ptr).to(tl.float32)[None, :]
    return acc


@triton.jit
def column_parts(acc, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr):
    """The columns of a tile in PARTS parts of the same width, a power of two of them, from left to right.

    Args:
        acc: [BLOCK_M, BLOCK_N].

    Returns:
        Tuple of tensors [BLOCK_M, BLOCK_N / PARTS].
    """
    if PARTS == 1:
        parts = (acc,)
    else:
        left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
        halves: tl.constexpr = PARTS // 2
        parts = column_parts(left, BLOCK_M, BLOCK_N // 2, halves) + column_parts(right, BLOCK_M, BLOCK_N // 2, halves)
    return parts


@triton.jit
def _dense_kernel(
    x,
    w,
    scale_a_ptr,
    scale_b_ptr,
    partials_ptr,
    up_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    stride_xm,
    stride_wn,
    PER_TOKEN: tl.constexpr,
    FACTOR_A: tl.constexpr,
    FACTOR_B: tl.constexpr,
    R: tl.constexpr,
    SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,
    TMA: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """The whole of y [M, N], contiguous; pointers as in the functions above, None for an absent part.

    Args:
        PARTS: in how many parts a tile is stored.
    """
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
        parts = column_parts(acc, BLOCK_M, BLOCK_N, PARTS)
        for i in tl.static_range(PARTS):
            offs_n = origin_n + i * (BLOCK_N // PARTS) + tl.arange(0, BLOCK_N // PARTS)
            where = offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
            mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
            tl.store(out_ptr + where, parts[i].to(out_ptr.dtype.element_ty), mask=mask)


HOPPER_TILES = {
    "many": (128, 256, 128, 8, 3),
    "wide and deep": (128, 256, 128, 8, 4),
    "wide": (128, 128, 128, 8, 5),
    "wide and flat": (64, 128, 256, 4, 4),
    "narrow": (64, 128, 128, 4, 7),
    "narrow and flat": (64, 64, 256, 4, 6),
}
"""BLOCK_M, BLOCK_N, bytes of BLOCK_K, num_warps, num_stages that fit 227 KB of shared memory.

As measured with e4m3 operands ("narrow" with a stage more, which an epilogue may have no room for): flat ones for few
tokens, narrow ones where larger tiles would leave multiprocessors idle, and deep ones because the weight comes from
memory. Where many tokens share it, three stages are faster than the four that fit.
"""

OTHER_TILES = {"many": (128, 128, 128, 8, 3), "flat": (64, 64, 128, 4, 3)}
"""The same for GPUs with 99 KB, and for those nothing was measured on."""


def best_tile(m: int, n: int) -> str:
    """The one of :data:`HOPPER_TILES` to take without measuring; arguments as :func:`configurations`."""
    if m > 512:
        return "many"
    if n >= 8192:
        return "wide and flat" if m <= 64 else "wide and deep" if 128 < m <= 256 else "wide"
    return "wide" if m > 256 else "narrow" if m > 128 else "narrow and flat"


def configurations(m: int, n: int, element_size: int, capability: tuple[int, int]) -> list[dict[str, int]]:
    """Tiles with their ``num_warps`` and ``num_stages``, the one to take without measuring first.

    Args:
        m, n: sizes of the result; m may be a hint.
        element_size: bytes of an operand's element, 1 or 2.
        capability: of the device.
    """
    hopper = capability[0] == 9
    tiles = HOPPER_TILES if hopper else OTHER_TILES
    best = best_tile(m, n) if hopper else "many" if m > 128 else "flat"
    return [
        {
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
            "BLOCK_K": row_bytes // element_size,
            # Wide results reuse their weight tile over more rows before they leave L2.
            "GROUP_M": 32 if n >= 8192 else 8,
            "num_warps": warps,
            "num_stages": stages,
        }
        for block_m, block_n, row_bytes, warps, stages in sorted(tiles.values(), key=lambda tile: tile != tiles[best])
    ]


def rank_chunk(rank: int) -> int:
    """Ranks that :func:`add_low_rank` multiplies at once: few, because the accumulator takes most registers."""
    return 32 if rank > 16 else 16


def column_parts_of(block_n: int) -> int:
    """In how many parts a tile is stored: what is converted and stored at once is in registers twice."""
    return max(1, block_n // 128)


def uses_tma(capability: tuple[int, int]) -> bool:
    """Whether a GPU loads tiles by tensor descriptors (the copy engine of sm_90 and later)."""
    return capability[0] >= 9


def rows_in_memory(x_q: torch.Tensor, block_m: int) -> int:
    """As :func:`descriptor_rows`, whole tiles where an operand's storage has room for them.

    Args:
        x_q: [M, K], contiguous.
        block_m: rows of a tile.
    """
    m, k = x_q.shape
    rows = -(-m // block_m) * block_m
    room = x_q.untyped_storage().nbytes() // x_q.element_size() - x_q.storage_offset()
    return rows if rows * k <= room else m


def multiply(
    x_q: torch.Tensor,
    w_q: torch.Tensor,
    scale_a: torch.Tensor | None,
    scale_b: torch.Tensor,
    partials: torch.Tensor | None,
    lora_up: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    factor_a: float = 1.0,
    factor_b: float = 1.0,
    config: dict[str, int] | None = None,
) -> torch.Tensor:
    """``(x_q @ w_q.T) * (factor_a * scale_a * factor_b * scale_b) + h @ L1.T + bias``.

    Args:
        x_q: float8_e4m3fn, bfloat16 or float16 [M, K], contiguous, K a multiple of 16.
        w_q: x_q's dtype [N, K], contiguous.
        scale_a: float32, one value, [M, 1] for one per token, or None for 1.
        scale_b: float32, one value.
        partials: float32 [S, M, R], whose sum over S is h, or h itself [1, M, R] in L1's dtype; None without a
            low-rank branch.
        lora_up: L1 [N, R], bfloat16 or float16; None without a low-rank branch.
        bias: [N] or None.
        out_dtype: dtype of the result.
        config: one of :func:`configurations`, to override the first.

    Returns:
        out_dtype [M, N], contiguous.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    m, n = x_q.shape[0], w_q.shape[0]
    check(x_q, w_q, scale_a, scale_b, partials, lora_up, bias)
    capability = torch.cuda.get_device_capability(x_q.device)
    chosen = dict(config or configurations(m, n, x_q.element_size(), capability)[0])
    out = torch.empty(m, n, dtype=out_dtype, device=x_q.device)
    if not out.numel():
        return out
    tma = uses_tma(capability)
    x, w = x_q, w_q
    if tma:
        from triton.tools.tensor_descriptor import TensorDescriptor

        rows, k = rows_in_memory(x_q, chosen["BLOCK_M"]), x_q.shape[1]
        x = TensorDescriptor(x_q, [rows, k], [k, 1], [chosen["BLOCK_M"], chosen["BLOCK_K"]])
        w = TensorDescriptor.from_tensor(w_q, [chosen["BLOCK_N"], chosen["BLOCK_K"]])
    tiles = triton.cdiv(m, chosen["BLOCK_M"]) * triton.cdiv(n, chosen["BLOCK_N"])
    with torch.cuda.device_of(x_q):
        _dense_kernel[(min(tiles, multiprocessors(x_q.device)),)](
            x,
            w,
            out_ptr=out,
            **tile_arguments(x_q, w_q, scale_a, scale_b, partials, lora_up, bias, factor_a, factor_b),
            TMA=tma,
            PARTS=column_parts_of(chosen["BLOCK_N"]),
            **chosen,
        )
    return out


def finish_arguments(scale_a, scale_b, partials, lora_up, bias) -> dict[str, object]:
    """What a kernel finishes its sums with, by its parameters' names; arguments as :func:`multiply` takes them."""
    rank = 0 if partials is None else partials.shape[2]
    return {
        "scale_a_ptr": scale_a,
        "scale_b_ptr": scale_b,
        "partials_ptr": partials,
        "up_ptr": lora_up.contiguous() if rank else None,
        "bias_ptr": None if bias is None else bias.contiguous(),
        "PER_TOKEN": scale_a is not None and scale_a.numel() != 1,
        "R": rank,
        "SPLITS": partials.shape[0] if rank else 1,
    }


def tile_arguments(x_q, w_q, scale_a, scale_b, partials, lora_up, bias, factor_a, factor_b) -> dict[str, object]:
    """What :func:`dense_tile` takes of a launch, by the kernel's parameters' names, without operands and tiles."""
    finish = finish_arguments(scale_a, scale_b, partials, lora_up, bias)
    return finish | {
        "M": x_q.shape[0],
        "N": w_q.shape[0],
        "K": x_q.shape[1],
        "stride_xm": x_q.stride(0),
        "stride_wn": w_q.stride(0),
        "FACTOR_A": factor_a,
        "FACTOR_B": factor_b,
        "CHUNK": rank_chunk(finish["R"]),
    }


def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def check(x_q, w_q, scale_a, scale_b, partials, lora_up, bias) -> None:
    """Raises ValueError unless the arguments of :func:`multiply` fit together."""
    m, k = x_q.shape
    n = w_q.shape[0]
    if x_q.dtype != w_q.dtype or x_q.dtype not in (torch.float8_e4m3fn, torch.bfloat16, torch.float16):
        raise ValueError(f"operands are {x_q.dtype} and {w_q.dtype}, need one of e4m3, bfloat16, float16")
    if w_q.shape[1] != k or k % 16 or not x_q.is_contiguous() or not w_q.is_contiguous():
        raise ValueError(f"operands {tuple(x_q.shape)} and {tuple(w_q.shape)}, need contiguous (M, K) and (N, K)")
    if scale_b.numel() != 1 or (scale_a is not None and scale_a.numel() not in (1, m)):
        raise ValueError("scale_a needs one value or M of them, scale_b one")
    check_low_rank(m, n, partials, lora_up, bias)


def check_low_rank(m, n, partials, lora_up, bias) -> None:
    """Raises ValueError unless partials [S, M, R], L1 [N, R] and bias [N] fit together."""
    if (partials is None) != (lora_up is None):
        raise ValueError("partials and lora_up come together")
    if partials is not None and (partials.shape[1:] != (m, lora_up.shape[1]) or lora_up.shape[0] != n):
        raise ValueError(f"partials {tuple(partials.shape)} and lora_up {tuple(lora_up.shape)} do not fit")
    if bias is not None and tuple(bias.shape) != (n,):
        raise ValueError(f"bias is {tuple(bias.shape)}, needs ({n},)")
