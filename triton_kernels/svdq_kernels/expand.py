"""Packed NVFP4 weights as dense GEMM operands.

16-bit values are code times block scale. Those of e4m3 are looked up: a block has eight magnitudes, which are scaled
and rounded once, and a code's three bits say which byte of the table it is.
"""

import torch
import triton
import triton.language as tl

from .fp4 import GROUP, decode_e4m3

E4M3_DIVISOR = 8.0
"""The power of two that brings the largest product, e2m1's 6 times e4m3's 448, below e4m3's 448."""

DTYPES = (torch.bfloat16, torch.float16, torch.float8_e4m3fn)


@triton.jit
def look_up(low, high, selector):
    """Four bytes of the eight of low (0 to 3) and high (4 to 7), the first for the selector's lowest nibble.

    Args:
        low, high, selector: int32. Each of the selector's four lowest nibbles is 0 to 7, the others are ignored.
    """
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, selector], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def scaled_pair(PAIR: tl.constexpr, scale):
    """Both float16 numbers whose bits are in PAIR times a float16 scale, int32 as PAIR.

    One product for two; as tensor elements they would be taken apart.
    """
    pair = tl.full(scale.shape, PAIR, tl.int32)
    both = (scale.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) * 0x10001
    return tl.inline_asm_elementwise(
        "mul.rn.f16x2 $0, $1, $2;", "=r,r,r", [pair, both], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def narrow_pairs(low, high):
    """Bits of e4m3 of the float16 pairs in low and high, rounded to nearest, four to an int32."""
    return tl.inline_asm_elementwise(
        "{ .reg .b16 a, b; cvt.rn.satfinite.e4m3x2.f16x2 a, $1; cvt.rn.satfinite.e4m3x2.f16x2 b, $2;"
        " mov.b32 $0, {a, b}; }",
        "=r,r,r",
        [low, high],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def scaled_magnitudes(scale):
    """The magnitudes of e2m1 times ``scale / E4M3_DIVISOR``, rounded to e4m3.

    Args:
        scale: float16, which holds every product.

    Returns:
        Their bits, in two int32: 0, 0.5, 1 and 1.5 from the lowest byte on, and 2, 3, 4 and 6.
    """
    # 0 and 0.5, 1 and 1.5, 2 and 3, 4 and 6, each over eight.
    a, b = scaled_pair(0x2C000000, scale), scaled_pair(0x32003000, scale)
    c, d = scaled_pair(0x36003400, scale), scaled_pair(0x3A003800, scale)
    return narrow_pairs(a, b), narrow_pairs(c, d)


@triton.jit
def four_e4m3(words, low, high, HALF: tl.constexpr):
    """Bits of e4m3 of codes 0 to 3 of each word, or 4 to 7 where HALF is 1.

    Args:
        words: int32, eight codes each, the first in the lowest nibble.
        low, high: what :func:`scaled_magnitudes` returns, of the codes' scale.
    """
    # An odd code's sign is the highest bit of its byte, an even one's is that once codes have moved up by one.
    signs = look_up(words << 4, words, tl.full(words.shape, 0x7362 if HALF else 0x5140, tl.int32))
    return look_up(low, high, (words & 0x77777777) >> (16 * HALF)) ^ (signs & -0x7F7F7F80)


@triton.jit
def expand_blocks(
    first,
    qweight_ptr,
    scale_ptr,
    out_ptr,
    num_groups,
    DIVISOR: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """``out = code * block scale / DIVISOR`` of BLOCK_G consecutive blocks, from block ``first`` on."""
    WORDS: tl.constexpr = GROUP // 8
    offs_g = tl.arange(0, BLOCK_G)
    mask_g = offs_g < num_groups - first
    words_ptr = qweight_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + first * WORDS
    offs_w = offs_g[:, None] * WORDS + tl.arange(0, WORDS)[None, :]  # [BLOCK_G, words of a block]
    words = tl.load(words_ptr + offs_w, mask=mask_g[:, None], other=0)
    if out_ptr.dtype.element_ty == tl.float8e4nv:
        tl.static_assert(DIVISOR == 8)
        # A block's values are eight magnitudes, made once. One scale a load, so that a thread has those of its codes.
        scale = tl.load(scale_ptr + first + tl.max_contiguous(offs_g, 1), mask=mask_g, other=0.0)
        low, high = scaled_magnitudes(scale.to(tl.float8e4nv, bitcast=True).to(tl.float16))
        low, high = low[:, None], high[:, None]
        values = tl.join(four_e4m3(words, low, high, 0), four_e4m3(words, low, high, 1))
        ELEMENTS: tl.constexpr = GROUP // 4
        out_ptr = out_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
        values = tl.reshape(values, (BLOCK_G, ELEMENTS))
    else:
        # float16 holds every product exactly, and GPUs multiply two of its numbers at once.
        scale = tl.load(scale_ptr + first + offs_g, mask=mask_g, other=0.0).to(tl.uint8, bitcast=True)
        scale = (decode_e4m3(scale) * (1.0 / DIVISOR)).to(tl.float16)
        codes = tl.reshape(words[:, :, None] >> (4 * tl.arange(0, 8))[None, None, :], (BLOCK_G, GROUP))
        # As bits of float16 a code is its value times 2**-14: both formats count 0.5 as a subnormal.
        bits = ((codes & 7) << 9) | ((codes & 8) << 12)
        values = bits.to(tl.int16).to(tl.float16, bitcast=True) * 16384.0 * scale[:, None]
        ELEMENTS: tl.constexpr = GROUP
    where = offs_g[:, None] * ELEMENTS + tl.arange(0, ELEMENTS)[None, :]  # [BLOCK_G, elements of a block]
    tl.store(out_ptr + first * ELEMENTS + where, values.to(out_ptr.dtype.element_ty), mask=mask_g[:, None])


@triton.jit
def _expand_kernel(
    qweight0_ptr,
    qweight1_ptr,
    qweight2_ptr,
    qweight3_ptr,
    qweight4_ptr,
    qweight5_ptr,
    scale0_ptr,
    scale1_ptr,
    scale2_ptr,
    scale3_ptr,
    scale4_ptr,
    scale5_ptr,
    out0_ptr,
    out1_ptr,
    out2_ptr,
    out3_ptr,
    out4_ptr,
    out5_ptr,
    groups0,
    groups1,
    groups2,
    groups3,
    groups4,
    groups5,
    MEMBERS: tl.constexpr,
    DIVISOR: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """The whole of the first MEMBERS weights, of ``groups`` blocks; all tensors are contiguous.

    Program (i, j) takes BLOCK_G blocks of weight j, or has nothing to do.
    """
    qweight_ptr = (qweight0_ptr, qweight1_ptr, qweight2_ptr, qweight3_ptr, qweight4_ptr, qweight5_ptr)
    scale_ptr = (scale0_ptr, scale1_ptr, scale2_ptr, scale3_ptr, scale4_ptr, scale5_ptr)
    out_ptr = (out0_ptr, out1_ptr, out2_ptr, out3_ptr, out4_ptr, out5_ptr)
    groups = (groups0, groups1, groups2, groups3, groups4, groups5)
    first = tl.program_id(0).to(tl.int64) * BLOCK_G
    for i in tl.static_range(MEMBERS):
        if tl.program_id(1) == i and first < groups[i]:
            expand_blocks(first, qweight_ptr[i], scale_ptr[i], out_ptr[i], groups[i], DIVISOR, GROUP, BLOCK_G)


MAX_MEMBERS = 6
"""Weights a launch takes at most: q, k and v of two streams."""

BLOCK_G, NUM_WARPS = 1024, 8
"""As measured; a few thousand bytes a program, many of them in flight."""


def divisor(dtype: torch.dtype) -> float:
    """What an expanded weight of a dtype is to be multiplied with: 8 for e4m3, 1 for 16 bits."""
    return E4M3_DIVISOR if dtype == torch.float8_e4m3fn else 1.0


def arguments(qweight: list[object], scale: list[object], out: list[object], groups: list[int]) -> dict[str, object]:
    """What a launch takes of its weights, by the kernel's parameters' names; absent ones are None.

    Args:
        qweight, scale, out: the tensors of at most :data:`MAX_MEMBERS` weights.
        groups: blocks of each.
    """
    own = {"qweight{}_ptr": qweight, "scale{}_ptr": scale, "out{}_ptr": out, "groups{}": groups}
    places = range(MAX_MEMBERS)
    given = {name.format(i): values[i] if i < len(out) else None for name, values in own.items() for i in places}
    return given | {"MEMBERS": len(out)}


def grid(groups: list[int]) -> tuple[int, int]:
    """The programs of a launch; groups as in :func:`arguments`."""
    return triton.cdiv(max(groups), BLOCK_G), len(groups)


def expand_nvfp4(
    qweight: torch.Tensor, weight_scale: torch.Tensor, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """``code * block scale``, without the tensor scale.

    At most 6 significant bits and between 2**-10 and 2688, so exact in bfloat16 and float16. In float8_e4m3fn it is
    divided by 8 and rounded to nearest.

    Args:
        qweight: packed codes uint8 [N, K/2], even column in the low nibble.
        weight_scale: float8_e4m3fn [N, K/16].
        dtype: bfloat16, float16, or float8_e4m3fn (sm_89 and later).

    Returns:
        dtype [N, K], contiguous.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    return expand_weights([(qweight, weight_scale)], dtype)[0]


def expand_weights(
    weights: list[tuple[torch.Tensor, torch.Tensor]], dtype: torch.dtype = torch.bfloat16
) -> list[torch.Tensor]:
    """:func:`expand_nvfp4` of several weights on one device, :data:`MAX_MEMBERS` a launch.

    Args:
        weights: qweight and weight_scale of each.
        dtype: of all results.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    for qweight, weight_scale in weights:
        check(qweight, weight_scale, dtype)
    out = [torch.empty(q.shape[0], 2 * q.shape[1], dtype=dtype, device=q.device) for q, _ in weights]
    # Bits rather than e4m3 values: Triton has no e4m3 loads below sm_89.
    given = [(q.contiguous(), scale.contiguous().view(torch.uint8)) for q, scale in weights]
    for i in range(0, len(weights), MAX_MEMBERS):
        part = slice(i, i + MAX_MEMBERS)
        groups = [scale.numel() for _, scale in given[part]]
        if not max(groups):
            continue
        with torch.cuda.device_of(out[i]):
            _expand_kernel[grid(groups)](
                **arguments(*zip(*given[part], strict=True), out[part], groups),
                DIVISOR=divisor(dtype),
                GROUP=GROUP,
                BLOCK_G=BLOCK_G,
                num_warps=NUM_WARPS,
            )
    return out


def check(qweight: torch.Tensor, weight_scale: torch.Tensor, dtype: torch.dtype) -> None:
    """Raises ValueError unless the arguments of :func:`expand_nvfp4` fit together."""
    n, half_k = qweight.shape
    if qweight.dtype != torch.uint8 or weight_scale.dtype != torch.float8_e4m3fn:
        raise ValueError(f"dtypes {qweight.dtype} and {weight_scale.dtype}, needs uint8 and float8_e4m3fn")
    if half_k % 8 or tuple(weight_scale.shape) != (n, half_k // 8):
        raise ValueError(f"weight_scale {tuple(weight_scale.shape)} does not fit {tuple(qweight.shape)} codes")
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype}, needs one of {DTYPES}")
