"""Narrow formats, exhaustively: every code, every scale, every bfloat16 value, every tie."""

import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from svdq_compile.ops import codec
from svdq_compile.spec import E2M1_MAX, E4M3_MAX, E4M3_MIN
from svdq_compile.testing.oracle import assert_bits_equal

# OCP MX v1.0, table 5, written out by hand.
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
ALL_BF16 = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
ALL_E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)


def nearest_by_search(value: float) -> int:
    """The nearest e2m1 code, ties to the even code, by looking at all of them."""
    sign = 8 if struct.pack(">f", value)[0] & 0x80 else 0
    distance = [abs(abs(value) - m) for m in E2M1[:8]]
    best = min(distance)
    return sign | min((c for c in range(8) if distance[c] == best), key=lambda c: c % 2)


def test_decode_every_code():
    assert_bits_equal(codec.decode_e2m1(torch.arange(16, dtype=torch.uint8)), torch.tensor(E2M1))


def test_every_code_survives_a_round_trip():
    codes = torch.arange(16, dtype=torch.uint8)
    assert_bits_equal(codec.encode_e2m1(codec.decode_e2m1(codes)), codes)


def test_encode_every_bfloat16_value():
    values = ALL_BF16[~ALL_BF16.isnan()].float()
    # Beyond 100 all distances round to the same float.
    finite = values.clamp(-100, 100)
    expected = torch.tensor([nearest_by_search(v) for v in finite.tolist()], dtype=torch.uint8)
    assert_bits_equal(codec.encode_e2m1(values), expected)


@pytest.mark.parametrize(("tie", "code"), [(0.25, 0), (0.75, 2), (1.25, 2), (1.75, 4), (2.5, 4), (3.5, 6), (5.0, 6)])
def test_ties_go_to_the_even_code_and_one_ulp_decides(tie, code):
    below, above = torch.nextafter(torch.tensor(tie), torch.tensor([0.0, 9.0]))
    values = torch.stack((torch.tensor(tie), below, above))
    lower = E2M1.index(max(m for m in E2M1[:8] if m < tie))
    assert codec.encode_e2m1(values).tolist() == [code, lower, lower + 1]
    assert codec.encode_e2m1(-values).tolist() == [code | 8, lower | 8, (lower + 1) | 8]


@pytest.mark.parametrize("value", [5.0000005, 6.0, 7.0, 448.0, 1e30, float("inf")])
def test_encode_saturates_at_six(value):
    assert codec.encode_e2m1(torch.tensor([value, -value])).tolist() == [7, 15]


def test_packing_is_a_bijection_with_the_even_column_low():
    packed = torch.arange(256, dtype=torch.uint8).reshape(8, 32)
    codes = codec.unpack_codes(packed)
    assert_bits_equal(codec.pack_codes(codes), packed)
    assert codec.unpack_codes(torch.tensor([[0x20, 0x42, 0x64, 0x76]], dtype=torch.uint8)).tolist() == [
        [0, 2, 2, 4, 4, 6, 6, 7]
    ]


def test_e4m3_of_every_bfloat16_value_is_the_nearest_e4m3():
    values = ALL_BF16[ALL_BF16.isfinite()].float()
    table = ALL_E4M3.float()
    magnitudes = table[:127].double()
    clamped = values.abs().clamp(max=E4M3_MAX).double()
    distance = (clamped[:, None] - magnitudes[None, :]).abs()
    best = distance.min(1, keepdim=True).values
    # The code of an e4m3 magnitude is its rank, so among equally near ones the even rank is the even code.
    penalty = (torch.arange(127) % 2).double()
    index = torch.where(distance == best, penalty, torch.full_like(distance, 9.0)).argmin(1)
    expected = torch.copysign(magnitudes[index], values.double()).float()
    assert_bits_equal(codec.round_e4m3(values).float(), expected)


def test_every_finite_e4m3_scale_decodes_exactly_in_bfloat16():
    """code * scale has at most 6 significant bits, so bfloat16 holds every product."""
    scales = ALL_E4M3[ALL_E4M3.float().isfinite()]
    codes = torch.arange(16, dtype=torch.uint8).repeat(len(scales), 1)
    narrow = codec.decode_nvfp4(codes, scales[:, None], torch.bfloat16)
    assert_bits_equal(narrow.double(), codec.decode_nvfp4(codes, scales[:, None], torch.float64))


@pytest.mark.parametrize("scale", ALL_E4M3[1:127].float().tolist())
def test_requantising_what_was_decoded_changes_nothing(scale):
    """For every positive finite scale, a block that uses the largest code comes back with its codes and scale."""
    codes = torch.arange(16, dtype=torch.uint8)[None]
    stored = torch.tensor([[scale]]).to(torch.float8_e4m3fn)
    again, scale_again = codec.quantize_nvfp4(codec.decode_nvfp4(codes, stored), torch.tensor(1.0))
    assert_bits_equal(again, codes)
    assert_bits_equal(scale_again, stored)


def test_known_block():
    """amax 12 with t = 1: s = 2, so 12 -> 6, 5 -> 2.5 -> 2 (tie), -0.9 -> -0.45 -> -0.5, 0.5 -> 0.25 -> 0 (tie)."""
    block = torch.zeros(16)
    block[:5] = torch.tensor([12.0, 5.0, -0.9, 0.5, -0.5])
    codes, scale = codec.quantize_nvfp4(block, torch.tensor(1.0))
    assert scale.float().tolist() == [2.0]
    assert codes.tolist() == [7, 4, 9, 0, 8] + [0] * 11


def test_a_zero_block_has_zero_codes():
    codes, scale = codec.quantize_nvfp4(torch.zeros(32), torch.tensor(0.5))
    assert not codes.any()
    assert not scale.float().any()


def test_the_exporters_floor_keeps_tiny_blocks():
    """With ModelOpt's lower clamp a block far below the tensor's scale keeps the smallest scale, not zero."""
    block = torch.full((16,), 1e-6)
    assert codec.quantize_nvfp4(block, torch.tensor(1.0))[1].float().item() == 0.0
    assert codec.quantize_nvfp4(block, torch.tensor(1.0), min_block_scale=E4M3_MIN)[1].float().item() == E4M3_MIN


def blocks(seed: int, rows: int = 64) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    spread = torch.exp2(torch.randint(-6, 7, (rows, 1), generator=g).float())
    return torch.randn(rows, 48, generator=g) * spread


@given(seed=st.integers(0, 2**32), exponent=st.integers(-3, 3))
def test_power_of_two_scaling_moves_only_the_scales(seed, exponent):
    x = blocks(seed)
    t = torch.tensor(0.03)
    codes, scale = codec.quantize_nvfp4(x, t)
    # Subnormal or saturated scales have less precision, so those rows may differ.
    moved = scale.float() * 2.0**exponent
    safe = ((scale.float() >= 2**-6) & (moved >= 2**-6) & (moved < E4M3_MAX) & (scale.float() < E4M3_MAX)).all(-1)
    codes_2, scale_2 = codec.quantize_nvfp4(x * 2.0**exponent, t)
    assert safe.any()
    assert_bits_equal(codes_2[safe], codes[safe])
    assert_bits_equal(scale_2[safe].float(), moved[safe])


@given(seed=st.integers(0, 2**32))
def test_scaling_the_tensor_scale_moves_nothing(seed):
    x = blocks(seed)
    codes, scale = codec.quantize_nvfp4(x, torch.tensor(0.03))
    codes_2, scale_2 = codec.quantize_nvfp4(x * 8, torch.tensor(0.03) * 8)
    assert_bits_equal(codes_2, codes)
    assert_bits_equal(scale_2, scale)


@given(seed=st.integers(0, 2**32))
def test_rows_are_independent(seed):
    x = blocks(seed)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    codes, scale = codec.quantize_nvfp4(x, torch.tensor(0.03))
    codes_2, scale_2 = codec.quantize_nvfp4(x[order], torch.tensor(0.03))
    assert_bits_equal(codes_2, codes[order])
    assert_bits_equal(scale_2, scale[order])


@given(seed=st.integers(0, 2**32))
def test_quantisation_is_odd(seed):
    x = blocks(seed)
    x[x == 0] = 1.0
    codes, scale = codec.quantize_nvfp4(x, torch.tensor(0.03))
    codes_2, scale_2 = codec.quantize_nvfp4(-x, torch.tensor(0.03))
    zero_scale = (scale.float() == 0).repeat_interleave(16, -1)
    assert_bits_equal(codes_2[~zero_scale], codes[~zero_scale] ^ 8)
    assert_bits_equal(scale_2, scale)


@given(seed=st.integers(0, 2**32))
def test_an_unsaturated_value_is_at_most_half_a_step_off(seed):
    x = blocks(seed)
    t = torch.tensor(x.abs().max().item() / (E2M1_MAX * E4M3_MAX))
    codes, scale = codec.quantize_nvfp4(x.double(), t.double())
    step = (scale.double() * t.double()).repeat_interleave(16, -1)
    error = (codec.decode_nvfp4(codes, scale, torch.float64) * t.double() - x.double()).abs()
    # The widest gap between magnitudes is 2 (4 to 6); rounding the scale down to e4m3 by 1/16 adds 6/16 at the top.
    assert (error <= step * (1 + 6 / 16) + E4M3_MIN * t.double() * E2M1_MAX).all()
