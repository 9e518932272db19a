"""Packed NVFP4 weights as dense GEMM operands."""

import torch
import triton
import triton.language as tl

from .fp4 import GROUP, decode_e4m3

E4M3_DIVISOR = 8.0
"""The power of two that brings the largest product, e2m1's 6 times e4m3's 448, below e4m3's 448."""

DTYPES = (torch.bfloat16, torch.float16, torch.float8_e4m3fn)


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
    """``out = code * block scale / DIVISOR`` of BLOCK_G consecutive blocks, from block ``first`` on.

    float16 holds every product exactly, and GPUs multiply two of its numbers at once.
    """
    WORDS: tl.constexpr = GROUP // 8
    offs_g = tl.arange(0, BLOCK_G)
    mask_g = offs_g < num_groups - first
    words_ptr = qweight_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + first * WORDS
    offs_w = offs_g[:, None] * WORDS + tl.arange(0, WORDS)[None, :]  # [BLOCK_G, words of a block]
    words = tl.load(words_ptr + offs_w, mask=mask_g[:, None], other=0)
    scale = tl.load(scale_ptr + first + offs_g, mask=mask_g, other=0.0).to(tl.uint8, bitcast=True)
    scale = (decode_e4m3(scale) * (1.0 / DIVISOR)).to(tl.float16)
    codes = tl.reshape(words[:, :, None] >> (4 * tl.arange(0, 8))[None, None, :], (BLOCK_G, GROUP))
    # As bits of float16 a code is its value times 2**-14: both formats count 0.5 as a subnormal.
    bits = ((codes & 7) << 9) | ((codes & 8) << 12)
    values = bits.to(tl.int16).to(tl.float16, bitcast=True) * 16384.0 * scale[:, None]
    offs_k = offs_g[:, None] * GROUP + tl.arange(0, GROUP)[None, :]  # [BLOCK_G, G]
    tl.store(out_ptr + first * GROUP + offs_k, values.to(out_ptr.dtype.element_ty), mask=mask_g[:, None])


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
