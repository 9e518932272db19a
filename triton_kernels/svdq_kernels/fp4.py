"""Device functions of the narrow formats: e2m1 values and e4m3 block scales, exact in float32.

Sources: OCP Microscaling Formats v1.0 (e2m1), OCP 8-bit Floating Point v1.0 (e4m3).
"""

import triton
import triton.language as tl

GROUP = 16
"""G, inputs that share one block scale."""


@triton.jit
def magnitude_bits(values):
    """Bits of |v|, int32. They order as magnitudes do, NaN above infinity, so their maximum propagates NaN.

    Args:
        values: float32, any shape.
    """
    return values.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def round_magnitude(a, FRACTION_BITS: tl.constexpr, MIN_EXPONENT: tl.constexpr):
    """Nearest value with FRACTION_BITS bits after the leading one, ties to even; NaN stays NaN.

    Below 2**MIN_EXPONENT the step stays that of 2**MIN_EXPONENT, as it does for subnormals.

    Args:
        a: float32, any shape, not negative and at most 2**100.
    """
    exponent = tl.maximum(a.to(tl.int32, bitcast=True) >> 23, MIN_EXPONENT + 127)
    # From anchor to 2 * anchor one float32 ulp is the wanted step, so the addition rounds to it.
    anchor = ((exponent + (23 - FRACTION_BITS)) << 23).to(tl.float32, bitcast=True)
    return (a + anchor) - anchor


@triton.jit
def round_e4m3(a):
    """Nearest e4m3 value, ties to even, saturating at 448; NaN stays NaN.

    Args:
        a: float32, any shape, not negative.

    Returns:
        float32, same shape.
    """
    # Comparing rather than tl.minimum: NaN has to stay.
    return round_magnitude(tl.where(a > 448.0, 448.0, a), 3, -6)


@triton.jit
def decode_e4m3(codes):
    """Value of e4m3 ("fn" variant) bit patterns.

    Args:
        codes: uint8, any shape.

    Returns:
        float32, same shape.
    """
    codes = codes.to(tl.int32)
    magnitude = codes & 0x7F
    # The exponent moves from bias 7 to bias 127: 120 * 8 codes up, then to the top of the float32 fraction.
    normal = ((magnitude + 960) << 20).to(tl.float32, bitcast=True)
    a = tl.where(magnitude < 8, magnitude.to(tl.float32) * 0.001953125, normal)
    a = tl.where(magnitude == 0x7F, float("nan"), a)
    return (a.to(tl.int32, bitcast=True) | ((codes & 0x80) << 24)).to(tl.float32, bitcast=True)


@triton.jit
def encode_e4m3(a):
    """Bits of e4m3 values, the inverse of :func:`decode_e4m3`; every NaN becomes 0x7F.

    Args:
        a: float32, any shape, not negative, each an e4m3 value as :func:`round_e4m3` returns them.

    Returns:
        uint8, same shape.
    """
    normal = (a.to(tl.int32, bitcast=True) >> 20) - 960
    subnormal = (a * 512.0).to(tl.int32)
    # Comparing so that NaN takes the last branch.
    magnitude = tl.where(a < 0.015625, subnormal, tl.where(a <= 448.0, normal, 0x7F))
    return magnitude.to(tl.uint8)


@triton.jit
def round_e2m1(values):
    """Nearest e2m1 value, ties to the even code, saturating at 6; NaN becomes 0. The sign bit is kept.

    Args:
        values: float32, any shape, already divided by their scale.

    Returns:
        float32, same shape.
    """
    a = magnitude_bits(values).to(tl.float32, bitcast=True)
    a = tl.where(a > 6.0, 6.0, tl.where(a == a, a, 0.0))
    sign = values.to(tl.int32, bitcast=True) & -0x80000000
    return (round_magnitude(a, 1, 0).to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def encode_e2m1(values):
    """Nearest e2m1 code, ties to the even code, saturating at 6; NaN encodes as 0. The sign bit is kept.

    Args:
        values: float32, any shape, already divided by their scale.

    Returns:
        uint8, same shape, each 0 to 15.
    """
    bits = magnitude_bits(round_e2m1(values))
    # From 1 on a code is the exponent and the first fraction bit, with 1 (bits 127 << 23) at code 2.
    normal = (bits >> 22) - 252
    half = (bits != 0).to(tl.int32)
    magnitude = tl.where(bits < 0x3F800000, half, normal)
    return (magnitude | ((values.to(tl.int32, bitcast=True) >> 28) & 8)).to(tl.uint8)


@triton.jit
def decode_e2m1(codes):
    """Value of e2m1 codes.

    Args:
        codes: integer, any shape, each 0 to 15.

    Returns:
        float32, same shape.
    """
    codes = codes.to(tl.int32)
    magnitude = codes & 7
    normal = ((magnitude + 252) << 22).to(tl.float32, bitcast=True)
    a = tl.where(magnitude < 2, magnitude.to(tl.float32) * 0.5, normal)
    return (a.to(tl.int32, bitcast=True) | ((codes & 8) << 28)).to(tl.float32, bitcast=True)


@triton.jit
def unpack_e2m1(packed):
    """Values of packed bytes; the low nibble is the even column.

    Args:
        packed: uint8 [..., K/2].

    Returns:
        float32 [..., K].
    """
    return tl.interleave(decode_e2m1(packed & 0xF), decode_e2m1(packed >> 4))
