"""The linear of a few tokens: a read of the packed weight, decoded in the registers the tensor core takes it from.

    y = (x @ (code * block scale).T) * (scale_a * scale_b) + h @ L1.T + bias

The weight's rows are the tensor core's tall side and the tokens its short one. Warps take slices of K, and their sums
meet at the end. Any order of K will do as long as both operands have it, so a thread loads 16 bytes of codes and the
32 elements of x that meet them, and no data crosses threads before the final sums.
"""

import torch
import triton
import triton.language as tl

from .dense import add_bias, check_low_rank, finish_arguments, load_low_rank, scaled
from .fp4 import GROUP, decode_e4m3

MAX_TOKENS = 16
"""More tokens are better off with a GEMM: every program reads all of x."""

K_WIDTH = tl.constexpr(4 if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8) else 2)
"""Consecutive elements of K a thread holds of a 16-bit operand in Triton's layout: another order, equally good."""

FACTOR = 128.0
"""What :func:`few_tokens_product` is to be multiplied with."""


@triton.jit
def shift_left(words, BITS: tl.constexpr):
    """``words << BITS``, to the right where BITS is negative."""
    if BITS >= 0:
        return words << BITS
    else:
        return words >> -BITS


@triton.jit
def pair_bits(words, PLACE: tl.constexpr, dtype: tl.constexpr):
    """Codes PLACE and PLACE + 4 of each word as 16-bit floats, 16 bits apart: each its value times a power of two.

    A code moved to the lowest exponent bits of a float is that, subnormals included, and one pass over a word does it
    for two. In bfloat16 sign and magnitude lie so far apart that one product moves both.
    """
    if dtype == tl.bfloat16:
        part = words if PLACE < 2 else words >> 8
        ODD: tl.constexpr = PLACE % 2
        bits = (part & (0x000F000F << 4 * ODD)) * (2 ** (6 - 4 * ODD) + 2 ** (12 - 4 * ODD)) & -0x7E3F7E40
    else:
        bits = shift_left(words, 9 - 4 * PLACE) & 0x0E000E00 | shift_left(words, 12 - 4 * PLACE) & -0x7FFF8000
    return bits


@triton.jit
def decode_pairs(words, scale, PLACE: tl.constexpr):
    """Values of codes PLACE and PLACE + 4 of each word, times its block scale.

    Args:
        words: int32 [..., W], eight codes each, the first in the lowest nibble.
        scale: bfloat16 or float16 [..., W], as :func:`scale_operand` returns it.

    Returns:
        scale's dtype [..., W, 2], ``code * block scale / FACTOR``, exact: 6 significant bits.
    """
    dtype: tl.constexpr = scale.dtype
    bits = pair_bits(words, PLACE, dtype)
    if dtype == tl.bfloat16:
        # Two products at once; as tensor elements they would be taken apart and put together again on either side.
        pair = (scale.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) * 0x10001
        bits = tl.inline_asm_elementwise(
            "{ .reg .b32 zero; mov.b32 zero, 0x80008000; fma.rn.bf16x2 $0, $1, $2, zero; }",
            "=r,r,r",
            [bits, pair],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    low, high = bits.to(tl.int16).to(dtype, bitcast=True), (bits >> 16).to(tl.int16).to(dtype, bitcast=True)
    values = tl.join(low, high)
    return values if dtype == tl.bfloat16 else values * tl.join(scale, scale)


@triton.jit
def scale_operand(block_scale, dtype: tl.constexpr):
    """Block scales times what :func:`pair_bits` lacks: 2**126 in bfloat16, 2**14 in float16, less FACTOR.

    Args:
        block_scale: e4m3, or its bits as uint8 where Triton has no e4m3.
    """
    value = decode_e4m3(block_scale) if block_scale.dtype == tl.uint8 else block_scale.to(tl.float32)
    return (value * (2.0**119 if dtype == tl.bfloat16 else 2.0**7)).to(dtype)


@triton.jit
def row_words(words, UNROLL: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr):
    """A step's words of the weight, or their scales, by warp and row, in the order of the threads that hold them.

    Args:
        words: four a lane, lanes as :func:`few_tokens_product` loads them, [UNROLL * ROWS * WARPS * 32, 4].

    Returns:
        [WARPS, 8 * ROWS, 16 * UNROLL].
    """
    parts = tl.reshape(words, (UNROLL, ROWS, WARPS, 8, 4, 2, 2))
    parts = tl.permute(parts, (2, 1, 3, 0, 5, 4, 6)) if K_WIDTH == 4 else tl.permute(parts, (2, 1, 3, 0, 5, 6, 4))
    return tl.reshape(parts, (WARPS, 8 * ROWS, 16 * UNROLL))


@triton.jit
def token_columns(columns, UNROLL: tl.constexpr, TOKENS: tl.constexpr, WARPS: tl.constexpr):
    """A step's columns of x, likewise.

    Args:
        columns: a word's eight a row, [UNROLL * 4 * TOKENS * WARPS * 32, 8].

    Returns:
        [WARPS, 8 * TOKENS, 128 * UNROLL].
    """
    parts = tl.reshape(columns, (UNROLL, 2, 2, TOKENS, WARPS, 8, 4, 8))
    parts = tl.permute(parts, (4, 3, 5, 0, 1, 6, 2, 7)) if K_WIDTH == 4 else tl.permute(parts, (4, 3, 5, 0, 1, 2, 6, 7))
    return tl.reshape(parts, (WARPS, 8 * TOKENS, 128 * UNROLL))


@triton.jit
def load_step(ptr, columns, step, rows, row_count, live, STEP: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    """Elements of a step of K; zeros beyond the edges and where not live.

    Args:
        ptr: [row_count, WIDTH] contiguous.
        columns: int32 [F, C], in the first step.
        rows: int32 [F, 1].
        STEP: columns from a step to the next.
        EVEN: whether steps divide WIDTH.
    """
    columns += step * STEP
    mask = rows < (row_count if live else 0)
    if not EVEN:
        mask &= columns < WIDTH
    where = rows.to(tl.int64) * WIDTH + columns
    if ptr.dtype.element_ty.is_int():
        return tl.load(ptr + where, mask=mask, other=0)
    else:
        return tl.load(ptr + where, mask=mask, other=0.0)


@triton.jit
def few_tokens_product(
    x_ptr,
    words_ptr,
    block_scale_ptr,
    origin_m,
    origin_n,
    M,
    N,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNROLL: tl.constexpr,
    WARPS: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """``x @ (code * block scale).T / FACTOR`` of one tile.

    Args:
        x_ptr: 16-bit [M, K] contiguous.
        words_ptr: codes, int32 [N, K/8] contiguous, first column in the lowest nibble.
        block_scale_ptr: [N, K/16] contiguous, e4m3 or its bits as uint8.
        origin_m, origin_n: first token and first row of the weight.
        BLOCK_M, BLOCK_N: tokens and rows, multiples of 8 and of 16.
        UNROLL: a warp takes 128 * UNROLL columns a step.
        WARPS: the program's warps.
        EVEN_K: whether 128 * UNROLL * WARPS divides K.

    Returns:
        float32 [BLOCK_M, BLOCK_N].
    """
    ROWS: tl.constexpr = BLOCK_N // 8
    TOKENS: tl.constexpr = BLOCK_M // 8
    WORDS: tl.constexpr = 16 * UNROLL
    STEP: tl.constexpr = WORDS * WARPS
    # The order of a tensor core's operand: 8 rows times 4 lanes are a warp. Flat, because Triton's versions differ in
    # how they lay out more dimensions: [UNROLL, ROWS, WARPS, 8, 4].
    flat = tl.arange(0, UNROLL * ROWS * WARPS * 32)
    rows = (origin_n + flat // (32 * WARPS) % ROWS * 8 + flat // 4 % 8)[:, None]
    lane = (flat // 32 % WARPS * UNROLL + flat // (32 * WARPS * ROWS)) * 4 + flat % 4
    offs_w = lane[:, None] * 4 + tl.arange(0, 4)[None, :]
    offs_b = lane[:, None] * 2 + tl.arange(0, 2)[None, :]
    # x: [UNROLL, 2, 2, TOKENS, WARPS, 8, 4], a word's 8 columns each; 2 and 2 are the 4 words of a lane.
    flat = tl.arange(0, UNROLL * 4 * TOKENS * WARPS * 32)
    tokens = (origin_m + flat // (32 * WARPS) % TOKENS * 8 + flat // 4 % 8)[:, None]
    word = flat // (32 * WARPS * TOKENS) % 4 + flat % 4 * 4
    word += (flat // 32 % WARPS * UNROLL + flat // (128 * WARPS * TOKENS)) * 16
    offs_k = word[:, None] * 8 + tl.arange(0, 8)[None, :]

    acc = tl.zeros((WARPS, BLOCK_N, BLOCK_M), dtype=tl.float32)
    steps = tl.cdiv(K // 8, STEP)
    words = load_step(words_ptr, offs_w, 0, rows, N, True, STEP, K // 8, EVEN_K)
    block_scale = load_step(block_scale_ptr, offs_b, 0, rows, N, True, STEP // 2, K // 16, EVEN_K)
    columns = load_step(x_ptr, offs_k, 0, tokens, M, True, STEP * 8, K, EVEN_K)
    for step in tl.range(0, steps):
        # The next step's operands are under way while this one's are multiplied.
        live = step + 1 < steps
        next_columns = load_step(x_ptr, offs_k, step + 1, tokens, M, live, STEP * 8, K, EVEN_K)
        next_words = load_step(words_ptr, offs_w, step + 1, rows, N, live, STEP, K // 8, EVEN_K)
        next_scale = load_step(block_scale_ptr, offs_b, step + 1, rows, N, live, STEP // 2, K // 16, EVEN_K)
        a = row_words(words, UNROLL, ROWS, WARPS)
        scale = scale_operand(block_scale, columns.dtype)
        scale = row_words(tl.join(scale, scale), UNROLL, ROWS, WARPS)
        x = token_columns(columns, UNROLL, TOKENS, WARPS)
        even, odd = tl.split(tl.reshape(x, (WARPS, BLOCK_M, WORDS * 4, 2)))
        x_0, x_2 = tl.split(tl.reshape(even, (WARPS, BLOCK_M, WORDS * 2, 2)))
        x_1, x_3 = tl.split(tl.reshape(odd, (WARPS, BLOCK_M, WORDS * 2, 2)))
        for place in tl.static_range(4):
            x_j = x_0 if place == 0 else x_1 if place == 1 else x_2 if place == 2 else x_3
            w_j = tl.reshape(decode_pairs(a, scale, place), (WARPS, BLOCK_N, 2 * WORDS))
            acc = tl.dot(w_j, tl.permute(x_j, (0, 2, 1)), acc)
        words, block_scale, columns = next_words, next_scale, next_columns
    return tl.trans(tl.sum(acc, 0))


@triton.jit
def add_low_rank_of_few(acc, h_ptr, up_ptr, offs_m, offs_n, M, N, R: tl.constexpr):
    """``acc + h @ L1.T``, h rounded to L1's dtype as every other kernel does.

    Args:
        acc: float32 [BLOCK_M, BLOCK_N].
        h_ptr: [M, R] contiguous.
        up_ptr: L1 [N, R] contiguous.
    """
    CHUNK: tl.constexpr = 32 if R > 16 else 16
    # Transposed, because a tensor core takes 8 columns but not 8 rows.
    low = tl.trans(acc)
    for first in tl.static_range(0, R, CHUNK):
        h, up = load_low_rank(h_ptr, up_ptr, offs_m, offs_n, M, N, first, R, 1, CHUNK)
        low = tl.dot(up, tl.trans(h), low)
    return tl.trans(low)


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
    K: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    R: tl.constexpr,
    FACTOR: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNROLL: tl.constexpr,
    WARPS: tl.constexpr,
):
    """One tile of y [M, N], contiguous; pointers as in the functions above, None for an absent part."""
    origin_n, origin_m = tl.program_id(0) * BLOCK_N, tl.program_id(1) * BLOCK_M
    acc = few_tokens_product(
        x_ptr, words_ptr, block_scale_ptr, origin_m, origin_n, M, N, K, BLOCK_M, BLOCK_N, UNROLL, WARPS, EVEN_K
    )
    offs_m = origin_m + tl.arange(0, BLOCK_M)
    offs_n = origin_n + tl.arange(0, BLOCK_N)
    acc = scaled(acc, scale_a_ptr, scale_b_ptr, offs_m, M, PER_TOKEN, 1.0, FACTOR)
    if R > 0:
        acc = add_low_rank_of_few(acc, partials_ptr, up_ptr, offs_m, offs_n, M, N, R)
    if bias_ptr is not None:
        acc = add_bias(acc, bias_ptr, offs_n, N)
    where = offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    tl.store(out_ptr + where, acc.to(out_ptr.dtype.element_ty), mask=mask)


def configuration(m: int, n: int, k: int) -> dict[str, int | bool]:
    """Constants of :func:`few_tokens_product` and ``num_warps``, as measured on sm_90 for 3072 inputs.

    Args:
        m: tokens, or a hint.
        n, k: N and K.
    """
    if m <= 8:
        # A narrow result has few programs, so each keeps more bytes in flight.
        block_m, block_n, warps = 8, 16, 8 if n <= 4096 or k > 4096 else 4
        unroll = 2 if n <= 4096 < k else 1
    else:
        block_m, block_n, warps, unroll = 16, 32, 4 if n >= 8192 else 8, 1
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "UNROLL": unroll,
        "WARPS": warps,
        "EVEN_K": k % (128 * unroll * warps) == 0,
        "num_warps": warps,
    }


def multiply_few(
    x: torch.Tensor,
    qweight: torch.Tensor,
    weight_scale: torch.Tensor,
    scale_a: torch.Tensor | None,
    scale_b: torch.Tensor,
    partials: torch.Tensor | None,
    lora_up: torch.Tensor | None,
    bias: torch.Tensor | None,
    config: dict[str, int | bool] | None = None,
) -> torch.Tensor:
    """``(x @ (code * block scale).T) * (scale_a * scale_b) + h @ L1.T + bias``, sums in float32.

    Args:
        x: bfloat16 or float16 [M, K], contiguous. Any M; made for up to :data:`MAX_TOKENS`.
        qweight: packed codes uint8 [N, K/2], even column in the low nibble.
        weight_scale: float8_e4m3fn [N, K/16].
        scale_a: float32, one value, [M, 1] for one per token, or None for 1.
        scale_b: float32, one value.
        partials: h as [1, M, R], float32 or L1's dtype; None without a low-rank branch.
        lora_up: L1 [N, R], bfloat16 or float16; None without a low-rank branch.
        bias: [N] or None.
        config: what :func:`configuration` returns, to override it.

    Returns:
        x's dtype [M, N], contiguous.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    m, k = x.shape
    n = qweight.shape[0]
    if x.dtype not in (torch.bfloat16, torch.float16) or not x.is_contiguous():
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}, needs contiguous rows of 16 bits")
    if k % GROUP or tuple(qweight.shape) != (n, k // 2) or tuple(weight_scale.shape) != (n, k // GROUP):
        raise ValueError(f"weight {tuple(qweight.shape)}, {tuple(weight_scale.shape)} does not fit {k} columns")
    check_low_rank(m, n, partials, lora_up, bias)
    if partials is not None and partials.shape[0] != 1:
        raise ValueError(f"partials are {tuple(partials.shape)}, needs their sum")
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    finish = finish_arguments(scale_a, scale_b, partials, lora_up, bias)
    del finish["SPLITS"]
    chosen = dict(config or configuration(m, n, k))
    # Bits rather than e4m3 values below sm_89, where Triton has none.
    old = torch.cuda.get_device_capability(x.device) < (8, 9)
    scale = weight_scale.contiguous()
    with torch.cuda.device_of(x):
        _gemv_kernel[(triton.cdiv(n, chosen["BLOCK_N"]), triton.cdiv(m, chosen["BLOCK_M"]))](
            x,
            qweight.contiguous().view(torch.int32),
            scale.view(torch.uint8) if old else scale,
            out_ptr=out,
            M=m,
            N=n,
            K=k,
            **finish,
            FACTOR=FACTOR,
            num_stages=1,
            **chosen,
        )
    return out
