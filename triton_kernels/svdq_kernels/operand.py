"""GEMM operands, value by value: smoothed, modulated, quantised."""

import triton
import triton.language as tl

from .fp4 import magnitude_bits, round_e4m3, round_magnitude

OPERANDS = ("none", "plain", "nvfp4", "fp8")
"""none: projections only. plain: x_hat itself. nvfp4: e2m1 code times block scale, exact in 16 bits. fp8:
e4m3(x_hat / a)."""

TOKEN_RANGE = {"nvfp4": 6.0 * 448.0, "fp8": 448.0}
"""Largest magnitude an operand can hold, in units of its tensor scale: e2m1's 6 times e4m3's 448, and e4m3's 448."""


@triton.jit
def smooth(x, s):
    """``x * s``, rounded once to x's dtype.

    Args:
        x: 16- or 32-bit float [BLOCK_M, BLOCK_K].
        s: [BLOCK_K].
    """
    return (x.to(tl.float32) * s.to(tl.float32)[None, :]).to(x.dtype)


@triton.jit
def modulated(x, mean, deviation, gain, shift):
    """``(x - mean) * deviation * gain + shift``, rounded once to x's dtype.

    Args:
        x: 16-bit float [BLOCK_M, BLOCK_K].
        mean, deviation: float32 [BLOCK_M].
        gain, shift: float32 [BLOCK_K], the same for all tokens.
    """
    normalised = (x.to(tl.float32) - mean[:, None]) * deviation[:, None]
    return (normalised * gain[None, :] + shift[None, :]).to(x.dtype)


@triton.jit
def quotients(a, b):
    """``a / b`` rounded as IEEE demands, with one division for all that share a b.

    b's reciprocal and two steps of Newton's method, whose remainders a fused multiply-add leaves exact, as a division
    in hardware proceeds.

    Args:
        a: float32 [..., n], each at most 8 times its b. Where it is less than a fifth of b the quotient may be off.
        b: float32 [..., 1], 0 or between 2**-100 and 2**100. 0 makes 0.
    """
    reciprocal = tl.where(b > 0, tl.div_rn(tl.full(b.shape, 1.0, tl.float32), b), 0.0)
    reciprocal, b = tl.broadcast_to(reciprocal, a.shape), tl.broadcast_to(b, a.shape)
    q = a * reciprocal
    q = tl.fma(tl.fma(-q, b, a), reciprocal, q)
    return tl.fma(tl.fma(-q, b, a), reciprocal, q)


@triton.jit
def nvfp4_values(x_hat, t):
    """``e2m1(x_hat / (b * t)) * b`` with block scales ``b = e4m3(amax / (6 * t))``; 0 where ``b * t`` is 0.

    Args:
        x_hat: float32 [BLOCK_M, BLOCK_K], BLOCK_K a multiple of 16.
        t: tensor scale, float32 [BLOCK_M, 1, 1] or scalar.

    Returns:
        float32 [BLOCK_M, BLOCK_K] with at most 6 significant bits.
    """
    blocks = tl.reshape(x_hat, (x_hat.shape[0], x_hat.shape[1] // 16, 16))
    # A power of two that keeps remainders of the division from underflow; no value depends on it.
    power = tl.where(t < 2.0**-60, 2.0**64, tl.where(t > 2.0**60, 2.0**-64, 1.0))
    bits = magnitude_bits(blocks * power)
    amax = tl.max(bits, axis=2, keep_dims=True).to(tl.float32, bitcast=True)
    # Triton's / is not rounded as IEEE demands, and one ulp decides a tie.
    scale = round_e4m3(tl.div_rn(amax, tl.broadcast_to(6.0 * t * power, amax.shape)))
    step = scale * t * power
    # NaN, of a scale that is NaN or of one whose t is infinite, takes 0.
    step = tl.where(step > 0, step, 0.0)
    a = tl.minimum(bits.to(tl.float32, bitcast=True), 6.0 * step)
    values = round_magnitude(quotients(a, step), 1, 0) * scale
    sign = tl.where(step > 0, -0x80000000, 0) & blocks.to(tl.int32, bitcast=True)
    values = (values.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    return tl.reshape(values, x_hat.shape)
