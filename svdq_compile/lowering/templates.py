"""GEMM templates: main loops of ``svdq_kernels`` between Inductor's prologue and its fused epilogues.

A template's text is short on purpose. It walks over tiles, calls the device functions the eager kernels are made of,
and leaves the store to Inductor, which puts whatever follows (GELU, gate * y + residual, a cast) before it.
"""

from __future__ import annotations

import functools

from .._compat import SymbolicGridFn, TritonTemplate

OPTIONAL = ("SCALE_A", "PARTIALS", "UP", "BIAS")
"""Inputs of a GEMM that may be absent, in the order the templates take them."""


@SymbolicGridFn
def persistent_grid(m, n, meta, *, cdiv, min):
    """One program per multiprocessor, fewer if there are fewer tiles."""
    return (min(meta["PROGRAMS"], cdiv(m, meta["BLOCK_M"]) * cdiv(n, meta["BLOCK_N"])), 1, 1)


@SymbolicGridFn
def tile_grid(m, n, meta, *, cdiv):
    """One program per tile."""
    return (cdiv(m, meta["BLOCK_M"]) * cdiv(n, meta["BLOCK_N"]), 1, 1)


def arguments(parts: tuple[str, ...]) -> str:
    """Scales, low-rank branch and bias in the order ``dense_tile`` takes them, None for what is absent."""
    names = ("SCALE_A", "SCALE_B", "PARTIALS", "UP", "BIAS")
    return ", ".join(name if name in (*parts, "SCALE_B") else "None" for name in names)


def _store(indent: str, columns: str = "BLOCK_N") -> str:
    """The store of acc at offs_m and offs_n, with Inductor's fused epilogue before it."""
    store = '{{store_output(("idx_m", "idx_n"), "acc", "mask", indent_width=%d, val_shape=("BLOCK_M", "%s"))}}'
    lines = [
        # 64 bits where the result has 2**31 elements or more.
        "idx_m = offs_m.to(INDEX_DTYPE)[:, None]",
        "idx_n = offs_n.to(INDEX_DTYPE)[None, :]",
        "mask = (idx_m < M) & (idx_n < N)",
        store % (len(indent), columns),
    ]
    return "".join(f"{indent}{line}\n" for line in lines)


@functools.cache
def dense(parts: tuple[str, ...], tma: bool) -> TritonTemplate:
    """``y = (x_q @ w_q.T) * scales + h @ L1.T + bias`` on dense operands.

    Inputs X [M, K] and W [N, K] (one dtype), SCALE_B, then those of :data:`OPTIONAL` that are present.

    Args:
        parts: the optional inputs present.
        tma: whether tiles are loaded by tensor descriptors.
    """
    names = ", ".join(f'"{name}"' for name in ("X", "W", "SCALE_B", *parts))
    operands = "x, w = X, W"
    if tma:
        operands = """rows = descriptor_rows(M, BLOCK_M, WHOLE_TILES)
    x = tl.make_tensor_descriptor(X, [rows, K], [stride_xm, 1], [BLOCK_M, BLOCK_K])
    w = tl.make_tensor_descriptor(W, [N, K], [stride_wn, 1], [BLOCK_N, BLOCK_K])"""
    source = f"""{{{{def_kernel({names})}}}}
    M = {{{{size("X", 0)}}}}
    N = {{{{size("W", 0)}}}}
    K = {{{{size("X", 1)}}}}
    stride_xm = {{{{stride("X", 0)}}}}
    stride_wn = {{{{stride("W", 0)}}}}
    {operands}
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS, num_stages=1):
        origin_m, origin_n = tile_origin(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        y = dense_tile(
            x, w, {arguments(parts)}, origin_m, origin_n, M, N, K, stride_xm, stride_wn,
            PER_TOKEN, FACTOR_A, FACTOR_B, RANK, SPLITS, CHUNK, BLOCK_M, BLOCK_N, BLOCK_K, TMA
        )
        offs_m = origin_m + tl.arange(0, BLOCK_M)
        columns = column_parts(y, BLOCK_M, BLOCK_N, PARTS)
        for i in tl.static_range(PARTS):
            acc = columns[i]
            offs_n = origin_n + i * (BLOCK_N // PARTS) + tl.arange(0, BLOCK_N // PARTS)
{_store(" " * 12, columns="BLOCK_N // PARTS")}
from svdq_kernels.dense import column_parts, dense_tile, descriptor_rows, tile_origin
"""
    return TritonTemplate(name=_name("svdq_dense", parts, tma), grid=persistent_grid, source=source)


@functools.cache
def blockscaled(parts: tuple[str, ...]) -> TritonTemplate:
    """The same on packed 4-bit operands, for block-scaled tensor cores.

    Inputs X uint8 [M, K/2], XS e4m3 [M, K/16], W and WS likewise for N, SCALE_B, then those of :data:`OPTIONAL`,
    among which SCALE_A always is.

    Args:
        parts: the optional inputs present.
    """
    names = ", ".join(f'"{name}"' for name in ("X", "XS", "W", "WS", "SCALE_B", *parts))
    partials, up = ("PARTIALS", "UP") if "UP" in parts else ("None", "None")
    bias = "BIAS" if "BIAS" in parts else "None"
    source = f"""{{{{def_kernel({names})}}}}
    M = {{{{size("X", 0)}}}}
    N = {{{{size("W", 0)}}}}
    K = 2 * {{{{size("X", 1)}}}}
    origin_m, origin_n = tile_origin(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    acc = blockscaled_product(
        X, XS, W, WS, origin_m, origin_n, M, N, K, K // 2, K // 16, K // 2, K // 16, 16, BLOCK_M, BLOCK_N, BLOCK_K,
        EVEN_K, True
    )
    left, right = finish_product(
        acc, SCALE_A, SCALE_B, {partials}, {up}, {bias}, origin_m, origin_n, M, N, RANK, SPLITS, PER_TOKEN, CHUNK
    )
    acc = tl.reshape(tl.permute(tl.join(left, right), (0, 2, 1)), (BLOCK_M, BLOCK_N))
    offs_m = origin_m + tl.arange(0, BLOCK_M)
    offs_n = origin_n + tl.arange(0, BLOCK_N)
{_store(" " * 4)}
from svdq_kernels.blockscaled import blockscaled_product, finish_product
from svdq_kernels.dense import tile_origin
"""
    return TritonTemplate(name=_name("svdq_blockscaled", parts, False), grid=tile_grid, source=source)


@SymbolicGridFn
def column_grid(m, n, meta, *, cdiv):
    """One program per tile, no order among them."""
    return (cdiv(n, meta["BLOCK_N"]), cdiv(m, meta["BLOCK_M"]), 1)


@functools.cache
def gemv(parts: tuple[str, ...]) -> TritonTemplate:
    """The same for a few tokens on the packed weight.

    Inputs X [M, K], W uint8 [N, K/2], WS e4m3 [N, K/16], SCALE_B, then those of :data:`OPTIONAL`.

    Args:
        parts: the optional inputs present.
    """
    names = ", ".join(f'"{name}"' for name in ("X", "W", "WS", "SCALE_B", *parts))
    scale_a = "SCALE_A" if "SCALE_A" in parts else "None"
    more = ""
    if "UP" in parts:
        more += "    acc = add_low_rank_of_few(acc, PARTIALS, UP, offs_m, offs_n, M, N, RANK)\n"
    if "BIAS" in parts:
        more += "    acc = add_bias(acc, BIAS, offs_n, N)\n"
    source = f"""{{{{def_kernel({names})}}}}
    M = {{{{size("X", 0)}}}}
    N = {{{{size("W", 0)}}}}
    origin_n, origin_m = tl.program_id(0) * BLOCK_N, tl.program_id(1) * BLOCK_M
    words = W.to(tl.pointer_type(tl.int32), bitcast=True)
    acc = few_tokens_product(
        X, words, WS, origin_m, origin_n, M, N, IN_FEATURES, BLOCK_M, BLOCK_N, UNROLL, WARPS, EVEN_K
    )
    offs_m = origin_m + tl.arange(0, BLOCK_M)
    offs_n = origin_n + tl.arange(0, BLOCK_N)
    acc = scaled(acc, {scale_a}, SCALE_B, offs_m, M, PER_TOKEN, 1.0, FACTOR)
{more}{_store(" " * 4)}
from svdq_kernels.dense import add_bias, scaled
from svdq_kernels.gemv import add_low_rank_of_few, few_tokens_product
"""
    return TritonTemplate(name=_name("svdq_gemv", parts, False), grid=column_grid, source=source)


def _name(stem: str, parts: tuple[str, ...], tma: bool) -> str:
    return "_".join((stem, *(part.lower() for part in parts), *(["tma"] if tma else [])))
