"""Three linears of each of two streams' activations, finished as the operands of one attention over both.

    y    = (x_q @ w_q.T) * (scale_a * scale_b) + h @ L1.T + bias           of each linear
    q, k = rotate(y / sqrt(mean(y**2) + eps) * norm)                       the mean over a head
    v    = y

rotate multiplies elements 2 i and 2 i + 1 of a head, as a complex number, with cos + i sin of their row. Everything is
float32 from the sums of the GEMM to the only rounding, that of the stored result.

One launch computes both streams, because the tiles of a short one (text) fill the multiprocessors that the last wave of
a long one's (image) would leave idle.
"""

import torch
import triton
import triton.language as tl

from . import dense, scratch
from .dense import column_parts, dense_tile, next_tile, tile_origin


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
def stream_heads(
    start,
    x,
    w,
    scale_a_ptr,
    scale_b_ptr,
    partials_ptr,
    up_ptr,
    bias_ptr,
    norm_ptr,
    freqs_ptr,
    out_ptr,
    M,
    N,
    K,
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
    """One program's tiles of one stream: of rows ``first`` to ``first + tokens`` of every sequence of q, k and v.

    Args:
        start: the program's first tile, counted from the stream's first.
        x: x_q [M, K], e4m3 and contiguous, M = B * tokens.
        w: w_q [N, K] of q, k and v, likewise.
        scale_b_ptr, up_ptr, bias_ptr: of q, k and v.
        norm_ptr: of q and k; with freqs_ptr as in :func:`normalize_and_rotate`.
        out_ptr: q, k and v [B, sequence, N], contiguous.
        TMA: whether tiles are loaded by tensor descriptors.
        The rest: as in :func:`svdq_kernels.dense._dense_kernel`.

    Returns:
        The program's next tile, counted from the first one behind the stream.
    """
    HEADS: tl.constexpr = BLOCK_N // HEAD_DIM
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    # A program makes descriptors only of what it has tiles of.
    if start < 3 * tiles:
        begin = start
        x_rows = tl.make_tensor_descriptor(x, [M, K], [K, 1], [BLOCK_M, BLOCK_K]) if TMA else x
        for member in tl.static_range(3):
            if begin < tiles:
                w_rows = tl.make_tensor_descriptor(w[member], [N, K], [K, 1], [BLOCK_N, BLOCK_K]) if TMA else w[member]
                for tile in tl.range(begin, tiles, tl.num_programs(0), num_stages=1):
                    origin_m, origin_n = tile_origin(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
                    acc = dense_tile(
                        x_rows,
                        w_rows,
                        scale_a_ptr,
                        scale_b_ptr[member],
                        partials_ptr,
                        up_ptr[member],
                        bias_ptr[member],
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
                        BIAS_FIRST=True,
                    )
                    offs_m = origin_m + tl.arange(0, BLOCK_M)
                    rows = offs_m % tokens
                    out_rows = (offs_m // tokens).to(tl.int64) * sequence + (first + rows)
                    heads = column_parts(acc, BLOCK_M, BLOCK_N, HEADS)
                    for i in tl.static_range(HEADS):
                        y = heads[i]
                        if member < 2:
                            y = normalize_and_rotate(y, norm_ptr[member], freqs_ptr, rows, EPS, BLOCK_M, HEAD_DIM)
                        offs_n = origin_n + i * HEAD_DIM + tl.arange(0, HEAD_DIM)
                        where = out_rows[:, None] * N + offs_n[None, :]
                        mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
                        out = out_ptr[member]
                        tl.store(out + where, y.to(out.dtype.element_ty), mask=mask)
            begin = next_tile(begin, tiles)
    return next_tile(start, 3 * tiles)


# A multiple of 16 tokens gains nothing, and each combination of streams would be compiled anew.
@triton.jit(do_not_specialize=["first_M", "first_tokens", "second_M", "second_tokens"])
def _heads_kernel(
    first_x,
    first_w0,
    first_w1,
    first_w2,
    first_scale_a_ptr,
    first_scale_b0_ptr,
    first_scale_b1_ptr,
    first_scale_b2_ptr,
    first_partials_ptr,
    first_up0_ptr,
    first_up1_ptr,
    first_up2_ptr,
    first_bias0_ptr,
    first_bias1_ptr,
    first_bias2_ptr,
    first_norm_q_ptr,
    first_norm_k_ptr,
    first_freqs_ptr,
    second_x,
    second_w0,
    second_w1,
    second_w2,
    second_scale_a_ptr,
    second_scale_b0_ptr,
    second_scale_b1_ptr,
    second_scale_b2_ptr,
    second_partials_ptr,
    second_up0_ptr,
    second_up1_ptr,
    second_up2_ptr,
    second_bias0_ptr,
    second_bias1_ptr,
    second_bias2_ptr,
    second_norm_q_ptr,
    second_norm_k_ptr,
    second_freqs_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    first_M,
    first_K,
    first_tokens,
    second_M,
    second_K,
    second_tokens,
    N,
    first_PER_TOKEN: tl.constexpr,
    first_FACTOR_A: tl.constexpr,
    first_FACTOR_B: tl.constexpr,
    first_R: tl.constexpr,
    first_SPLITS: tl.constexpr,
    first_CHUNK: tl.constexpr,
    second_PER_TOKEN: tl.constexpr,
    second_FACTOR_A: tl.constexpr,
    second_FACTOR_B: tl.constexpr,
    second_R: tl.constexpr,
    second_SPLITS: tl.constexpr,
    second_CHUNK: tl.constexpr,
    EPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """q, k and v [B, first_tokens + second_tokens, N] of two streams, whose tiles the programs share evenly.

    Arguments as in :func:`stream_heads`, of either stream with its name ahead, of q, k and v with their number.
    """
    sequence = first_tokens + second_tokens
    start = stream_heads(
        tl.program_id(0),
        first_x,
        (first_w0, first_w1, first_w2),
        first_scale_a_ptr,
        (first_scale_b0_ptr, first_scale_b1_ptr, first_scale_b2_ptr),
        first_partials_ptr,
        (first_up0_ptr, first_up1_ptr, first_up2_ptr),
        (first_bias0_ptr, first_bias1_ptr, first_bias2_ptr),
        (first_norm_q_ptr, first_norm_k_ptr),
        first_freqs_ptr,
        (q_ptr, k_ptr, v_ptr),
        first_M,
        N,
        first_K,
        first_tokens,
        0,
        sequence,
        first_PER_TOKEN,
        first_FACTOR_A,
        first_FACTOR_B,
        EPS,
        HEAD_DIM,
        first_R,
        first_SPLITS,
        first_CHUNK,
        TMA,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        GROUP_M,
    )
    stream_heads(
        start,
        second_x,
        (second_w0, second_w1, second_w2),
        second_scale_a_ptr,
        (second_scale_b0_ptr, second_scale_b1_ptr, second_scale_b2_ptr),
        second_partials_ptr,
        (second_up0_ptr, second_up1_ptr, second_up2_ptr),
        (second_bias0_ptr, second_bias1_ptr, second_bias2_ptr),
        (second_norm_q_ptr, second_norm_k_ptr),
        second_freqs_ptr,
        (q_ptr, k_ptr, v_ptr),
        second_M,
        N,
        second_K,
        second_tokens,
        first_tokens,
        sequence,
        second_PER_TOKEN,
        second_FACTOR_A,
        second_FACTOR_B,
        EPS,
        HEAD_DIM,
        second_R,
        second_SPLITS,
        second_CHUNK,
        TMA,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        GROUP_M,
    )


HEAD_DIMS = (64, 128)
"""Sizes of a head that a tile holds whole heads of."""


def configuration(m: int, n: int, head_dim: int, capability: tuple[int, int]) -> dict[str, int]:
    """Constants of the kernel, ``num_warps`` and ``num_stages``.

    Args:
        m: rows of the larger stream, may be a hint.
        n: columns of one linear.
        head_dim: one of :data:`HEAD_DIMS`.
        capability: of the device.
    """
    choices = dense.configurations(m, 3 * n, 1, capability)
    chosen = next(config for config in choices if config["BLOCK_N"] % head_dim == 0)
    # Tiles are walked member by member.
    return chosen | {"GROUP_M": dense.configurations(m, n, 1, capability)[0]["GROUP_M"]}


def multiply_heads(first: dict[str, object], second: dict[str, object], out: list[torch.Tensor], eps: float) -> None:
    """Writes two streams' heads into q, k and v, in every sequence the first one's rows ahead of the second one's.

    Args:
        first, second: by their names, the arguments of :func:`stream_arguments` but out. K, R and what is absent may
            differ.
        out: q, k and v, bfloat16 or float16 [B, S_1 + S_2, N / D, D], contiguous.
        eps: of all norms.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    check_out(out)
    streams = [stream_arguments(out=out, **stream) for stream in (first, second)]
    _, sequence, heads, head_dim = out[0].shape
    tokens = [stream["tokens"] for stream in streams]
    if sum(tokens) != sequence:
        raise ValueError(f"streams of {tokens} tokens do not fit sequences of {sequence}")
    if not out[0].numel():
        return
    n, device, rows = heads * head_dim, out[0].device, [stream["M"] for stream in streams]
    capability = torch.cuda.get_device_capability(device)
    config = configuration(max(rows), n, head_dim, capability)
    tiles = sum(3 * triton.cdiv(m, config["BLOCK_M"]) * triton.cdiv(n, config["BLOCK_N"]) for m in rows)
    with torch.cuda.device_of(out[0]):
        scratch.provide()
        _heads_kernel[(min(tiles, dense.multiprocessors(device)),)](
            **both(*streams),
            q_ptr=out[0],
            k_ptr=out[1],
            v_ptr=out[2],
            N=n,
            EPS=eps,
            HEAD_DIM=head_dim,
            TMA=dense.uses_tma(capability),
            **config,
        )


def stream_arguments(
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
    factor_a: float = 1.0,
    factor_b: float = 1.0,
) -> dict[str, object]:
    """What the kernel takes of one stream, as :func:`both` takes it.

    Args:
        x_q: float8_e4m3fn [B * S_i, K], contiguous, K a multiple of 16.
        w_q: of q, k and v, float8_e4m3fn [N, K], contiguous.
        scale_a, partials, factor_a, factor_b: as in :func:`svdq_kernels.dense.multiply`, the same for all three.
        scale_b, lora_up, bias: as there, one each.
        norms: weights [D] of q's and k's RMSNorm, None for ones.
        freqs: float32 [S_i, D / 2, 2], contiguous: cos and sin of every row.
        out: as of :func:`multiply_heads`.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    check_stream(x_q, w_q, scale_a, scale_b, partials, lora_up, bias, norms, freqs, out)
    finish = dense.finish_arguments(scale_a, scale_b[0], partials, lora_up[0], bias[0])
    own = {"w": w_q, "scale_b_ptr": scale_b, "up_ptr": lora_up, "bias_ptr": bias}
    return {
        "x": x_q,
        **{name: value for name, value in finish.items() if name not in own},
        **members(own),
        "norm_q_ptr": norms[0],
        "norm_k_ptr": norms[1],
        "freqs_ptr": freqs,
        "M": x_q.shape[0],
        "K": x_q.shape[1],
        "tokens": freqs.shape[0],
        "FACTOR_A": factor_a,
        "FACTOR_B": factor_b,
        "CHUNK": dense.rank_chunk(finish["R"]),
    }


def members(own: dict[str, list]) -> dict[str, object]:
    """A stream's arguments that there are three of, by parameter name, of lists for q, k and v."""
    return {
        name.replace("_ptr", f"{i}_ptr") if "_ptr" in name else f"{name}{i}": value
        for name, values in own.items()
        for i, value in enumerate(values)
    }


def both(first: dict[str, object], second: dict[str, object]) -> dict[str, object]:
    """The kernel's arguments that each stream has, by parameter name."""
    streams = {"first": first, "second": second}
    return {f"{which}_{name}": value for which, stream in streams.items() for name, value in stream.items()}


def check_out(out) -> None:
    """Raises ValueError unless q, k and v are as :func:`multiply_heads` writes them."""
    if len(out) != 3:
        raise ValueError("needs q, k and v")
    size = tuple(out[0].shape)
    if any(tuple(each.shape) != size or not each.is_contiguous() or each.dtype != out[0].dtype for each in out):
        raise ValueError("q, k and v need one shape and dtype, contiguous")


def check_stream(x_q, w_q, scale_a, scale_b, partials, lora_up, bias, norms, freqs, out) -> None:
    """Raises ValueError unless the arguments of :func:`stream_arguments` fit together."""
    if (*map(len, (w_q, scale_b, lora_up, bias, norms)),) != (3, 3, 3, 3, 2):
        raise ValueError("needs three of each for q, k and v, and two norms")
    if x_q.dtype != torch.float8_e4m3fn:
        raise ValueError(f"operands are {x_q.dtype}, needs e4m3")
    for own in zip(w_q, scale_b, lora_up, bias, strict=True):
        dense.check(x_q, own[0], scale_a, own[1], partials, *own[2:])
        if own[0].shape != w_q[0].shape:
            raise ValueError("the weights of q, k and v differ in shape")
    batch, _, heads, head_dim = out[0].shape
    if head_dim not in HEAD_DIMS or heads * head_dim != w_q[0].shape[0]:
        raise ValueError(f"heads are {(heads, head_dim)} for {w_q[0].shape[0]} columns, needs head_dim in {HEAD_DIMS}")
    tokens, rest = divmod(x_q.shape[0], batch)
    if rest:
        raise ValueError(f"{x_q.shape[0]} rows are no {batch} sequences")
    if freqs.dtype != torch.float32 or not freqs.is_contiguous() or tuple(freqs.shape) != (tokens, head_dim // 2, 2):
        raise ValueError(f"freqs are {freqs.dtype} {tuple(freqs.shape)}, need float32 ({tokens}, {head_dim // 2}, 2)")
    if any(norm is not None and tuple(norm.shape) != (head_dim,) for norm in norms):
        raise ValueError(f"norms need ({head_dim},)")
