"""Linears of two streams in one launch, each finished as its stream's next residual.

    y   = (x_q @ w_q.T) * (scale_a * scale_b) + h @ L1.T + bias
    out = residual + gate * y                                          of each stream

The tiles of both streams are dealt out in one row, so that those of a short stream fill multiprocessors that the last
wave of the other leaves idle. Everything is float32 from the sums of the GEMM to the only rounding, that of out.
"""

import torch
import triton
import triton.language as tl

from . import dense, scratch
from .dense import column_parts, dense_tile, next_tile, tile_origin


@triton.jit
def add_to_residual(
    y,
    residual_ptr,
    gate_ptr,
    out_ptr,
    offs_m,
    offs_n,
    M,
    N,
    stride_gate,
    tokens,
):
    """Stores ``residual + gate * y`` of one tile, or of some of its columns.

    Args:
        y: float32 [BLOCK_M, columns].
        residual_ptr, out_ptr: [M, N], contiguous.
        gate_ptr: [M / tokens, N], rows stride_gate apart, one for each ``tokens`` rows of y.
        offs_m, offs_n: rows and columns of y in the whole.
    """
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    where = offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
    gates = (offs_m // tokens).to(tl.int64)[:, None] * stride_gate + offs_n[None, :]
    residual = tl.load(residual_ptr + where, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + gates, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + where, (residual + gate * y).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def residual_tiles(
    start,
    x,
    w,
    scale_a_ptr,
    scale_b_ptr,
    partials_ptr,
    up_ptr,
    bias_ptr,
    residual_ptr,
    gate_ptr,
    out_ptr,
    M,
    N,
    stride_gate,
    tokens,
    K: tl.constexpr,
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
    """A program's share of one stream, beginning with tile ``start``; other arguments as the kernel's.

    Returns:
        The program's next tile, counted from the next stream's first.
    """
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    # A program makes descriptors only of what it has tiles of.
    if start < tiles:
        x_rows = tl.make_tensor_descriptor(x, [M, K], [K, 1], [BLOCK_M, BLOCK_K]) if TMA else x
        w_rows = tl.make_tensor_descriptor(w, [N, K], [K, 1], [BLOCK_N, BLOCK_K]) if TMA else w
        for tile in tl.range(start, tiles, tl.num_programs(0), num_stages=1):
            origin_m, origin_n = tile_origin(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
            acc = dense_tile(
                x_rows,
                w_rows,
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
                K,
                K,
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
                add_to_residual(parts[i], residual_ptr, gate_ptr, out_ptr, offs_m, offs_n, M, N, stride_gate, tokens)
    return next_tile(start, tiles)


@triton.jit
def _residual_kernel(
    x0,
    x1,
    w0,
    w1,
    scale_a0_ptr,
    scale_a1_ptr,
    scale_b0_ptr,
    scale_b1_ptr,
    partials0_ptr,
    partials1_ptr,
    up0_ptr,
    up1_ptr,
    bias0_ptr,
    bias1_ptr,
    residual0_ptr,
    residual1_ptr,
    gate0_ptr,
    gate1_ptr,
    out0_ptr,
    out1_ptr,
    N,
    M0,
    M1,
    stride_gate0,
    stride_gate1,
    tokens0,
    tokens1,
    K0: tl.constexpr,
    K1: tl.constexpr,
    PER_TOKEN0: tl.constexpr,
    PER_TOKEN1: tl.constexpr,
    FACTOR_A0: tl.constexpr,
    FACTOR_A1: tl.constexpr,
    FACTOR_B0: tl.constexpr,
    FACTOR_B1: tl.constexpr,
    R0: tl.constexpr,
    R1: tl.constexpr,
    SPLITS0: tl.constexpr,
    SPLITS1: tl.constexpr,
    CHUNK0: tl.constexpr,
    CHUNK1: tl.constexpr,
    TMA: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """The whole of out of both streams.

    Args:
        x0, x1: x_q [M, K] of each stream, e4m3 and contiguous; K is constant, which saves registers.
        w0, w1: w_q [N, K], likewise.
        residual, gate, out, stride_gate, tokens: as in :func:`add_to_residual`, per stream with its number.
        TMA: whether tiles are loaded by tensor descriptors.
        PARTS: in how many parts a tile is stored.
        The rest: as in :func:`svdq_kernels.dense._dense_kernel`, per stream with its number.
    """
    start = residual_tiles(
        tl.program_id(0),
        x0,
        w0,
        scale_a0_ptr,
        scale_b0_ptr,
        partials0_ptr,
        up0_ptr,
        bias0_ptr,
        residual0_ptr,
        gate0_ptr,
        out0_ptr,
        M0,
        N,
        stride_gate0,
        tokens0,
        K0,
        PER_TOKEN0,
        FACTOR_A0,
        FACTOR_B0,
        R0,
        SPLITS0,
        CHUNK0,
        TMA,
        PARTS,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        GROUP_M,
    )
    residual_tiles(
        start,
        x1,
        w1,
        scale_a1_ptr,
        scale_b1_ptr,
        partials1_ptr,
        up1_ptr,
        bias1_ptr,
        residual1_ptr,
        gate1_ptr,
        out1_ptr,
        M1,
        N,
        stride_gate1,
        tokens1,
        K1,
        PER_TOKEN1,
        FACTOR_A1,
        FACTOR_B1,
        R1,
        SPLITS1,
        CHUNK1,
        TMA,
        PARTS,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        GROUP_M,
    )


HALF_TILE = 0.6
"""Time of a tile of half the columns in units of the whole one's: 0.55 as measured on an H200, and a margin."""


def configuration(m: int, n: int, capability: tuple[int, int], multiprocessors: int) -> dict[str, int]:
    """Constants of the kernel, ``num_warps`` and ``num_stages``.

    Args:
        m: rows of both streams, may be a hint.
        n: columns.
        capability: of the device.
        multiprocessors: of the device.
    """

    def waves(tile: dict[str, int]) -> int:
        tiles = triton.cdiv(m, tile["BLOCK_M"]) * triton.cdiv(n, tile["BLOCK_N"])
        return triton.cdiv(tiles, multiprocessors)

    choices = dense.configurations(m, n, 1, capability)
    config = choices[0]
    halves = [each for each in choices if (each["BLOCK_M"], 2 * each["BLOCK_N"]) == (config["BLOCK_M"], 256)]
    # A last wave that is mostly empty takes as long as a full one.
    if config["BLOCK_N"] == 256 and HALF_TILE * waves(halves[0]) < waves(config):
        config = halves[0]
    return config | {"PARTS": dense.column_parts_of(config["BLOCK_N"])}


def multiply_residual(
    x_q: tuple[torch.Tensor, torch.Tensor],
    w_q: tuple[torch.Tensor, torch.Tensor],
    scale_a: tuple[torch.Tensor | None, torch.Tensor | None],
    scale_b: tuple[torch.Tensor, torch.Tensor],
    partials: tuple[torch.Tensor | None, torch.Tensor | None],
    lora_up: tuple[torch.Tensor | None, torch.Tensor | None],
    bias: tuple[torch.Tensor | None, torch.Tensor | None],
    residual: tuple[torch.Tensor, torch.Tensor],
    gate: tuple[torch.Tensor, torch.Tensor],
    factor_a: tuple[float, float] = (1.0, 1.0),
    factor_b: tuple[float, float] = (1.0, 1.0),
) -> tuple[torch.Tensor, torch.Tensor]:
    """``residual + gate * ((x_q @ w_q.T) * (factor_a * scale_a * factor_b * scale_b) + h @ L1.T + bias)`` of both.

    Args, one per stream:
        x_q: float8_e4m3fn [M, K], contiguous, K a multiple of 16, M at least 1.
        w_q: float8_e4m3fn [N, K], contiguous, of one N.
        scale_a, scale_b, partials, lora_up, bias, factor_a, factor_b: as in :func:`svdq_kernels.dense.multiply`.
        residual: bfloat16 or float16 [M, N], contiguous.
        gate: the same dtype [B, N] with unit stride along N, one row for each M / B rows of residual.

    Returns:
        The results, each as its residual.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    streams = list(zip(x_q, w_q, scale_a, scale_b, partials, lora_up, bias, residual, gate, strict=True))
    check(streams)
    outs = [torch.empty_like(each) for each in residual]
    n, device = w_q[0].shape[0], x_q[0].device
    capability = torch.cuda.get_device_capability(device)
    config = configuration(sum(each.shape[0] for each in x_q), n, capability, dense.multiprocessors(device))
    tiles = sum(triton.cdiv(each.shape[0], config["BLOCK_M"]) for each in x_q) * triton.cdiv(n, config["BLOCK_N"])
    own = [_arguments(*each) for each in zip(streams, factor_a, factor_b, outs, strict=True)]
    with torch.cuda.device_of(x_q[0]):
        scratch.provide()
        _residual_kernel[(min(tiles, dense.multiprocessors(device)),)](
            N=n, TMA=dense.uses_tma(capability), **numbered(own), **config
        )
    return outs[0], outs[1]


def _arguments(stream: tuple, factor_a: float, factor_b: float, out: torch.Tensor) -> dict[str, object]:
    """What the kernel takes of one stream, by its parameters' names without the number."""
    *operands, residual, gate = stream
    given = dense.tile_arguments(*operands, factor_a, factor_b)
    shared = {name: value for name, value in given.items() if name not in ("N", "stride_xm", "stride_wn")}
    return shared | {
        "x": operands[0],
        "w": operands[1],
        "residual_ptr": residual,
        "gate_ptr": gate,
        "out_ptr": out,
        "stride_gate": gate.stride(0),
        "tokens": residual.shape[0] // gate.shape[0],
    }


def numbered(own: list[dict[str, object]]) -> dict[str, object]:
    """The kernel's arguments that there are two of, by parameter name, of one mapping a stream."""
    return {
        f"{name.removesuffix('_ptr')}{i}{'_ptr' if name.endswith('_ptr') else ''}": value
        for i, arguments in enumerate(own)
        for name, value in arguments.items()
    }


def check(streams: list[tuple]) -> None:
    """Raises ValueError unless the streams' arguments of :func:`multiply_residual` but the factors fit together."""
    n, dtype = streams[0][1].shape[0], streams[0][7].dtype
    for x_q, w_q, scale_a, scale_b, partials, lora_up, bias, residual, gate in streams:
        if x_q.dtype != torch.float8_e4m3fn:
            raise ValueError(f"operands are {x_q.dtype}, needs e4m3")
        dense.check(x_q, w_q, scale_a, scale_b, partials, lora_up, bias)
        if w_q.shape[0] != n:
            raise ValueError(f"the streams have {n} and {w_q.shape[0]} columns")
        if residual.dtype != dtype or gate.dtype != dtype:
            raise ValueError("residuals and gates need one dtype")
        if tuple(residual.shape) != (x_q.shape[0], n) or not residual.is_contiguous():
            raise ValueError(f"residual is {tuple(residual.shape)}, needs contiguous {(x_q.shape[0], n)}")
        if gate.dim() != 2 or gate.shape[1] != n or gate.stride(1) != 1:
            raise ValueError(f"gate is {tuple(gate.shape)}, needs (B, {n}) with unit stride")
        if not residual.numel() or not gate.numel() or residual.shape[0] % gate.shape[0]:
            raise ValueError(f"{residual.shape[0]} rows are no multiple of the gate's {gate.shape[0]}, or none")
