"""fp8 and bf16 arithmetic: their operands to the bit, their sums against float64."""

import numpy
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from svdq_compile.ops import codec, reference
from svdq_compile.ops.linear import linear
from svdq_compile.ops.modes import FP8_MIN_TOKENS, arithmetic
from svdq_compile.ops.storage import expand
from svdq_compile.spec import COMPONENTS, Format
from svdq_compile.testing.oracle import assert_bits_equal, assert_within_budget, relative_error
from svdq_compile.testing.weights import random_linear

FORMATS = [Format.NVFP4_SVD, Format.NVFP4, Format.FP8, Format.FP8_SVD]
MANY = FP8_MIN_TOKENS + 2

seeds = st.integers(0, 2**32)
tokens = st.sampled_from([0, 1, 17, FP8_MIN_TOKENS - 1, FP8_MIN_TOKENS, MANY])
features = st.sampled_from([16, 48, 128])
dtypes = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])
formats = st.sampled_from(FORMATS)


def case(seed, m, n, k, **kwargs):
    g = torch.Generator().manual_seed(seed)
    layer = random_linear(n, k, generator=g, **kwargs)
    return layer, torch.randn(m, k, generator=g).to(layer.weight.dtype)


def call(layer, x, compute, **changed):
    parts = {name: getattr(layer.weight, name) for name in COMPONENTS} | {"bias": layer.bias} | changed
    return linear(x, **parts, compute=compute)


def stored_weight(weight):
    """What a weight's bytes say, without tensor scale: float64 [N, K], and its tensor scale."""
    if weight.qweight.dtype == torch.uint8:
        codes = codec.unpack_codes(weight.qweight)
        return codec.decode_nvfp4(codes, weight.weight_scale, torch.float64), weight.weight_scale_2
    return weight.qweight.double(), weight.weight_scale


def fp8_operands(weight, x_hat):
    """Operands and scales of fp8 arithmetic, the float32 steps in numpy: x_q, its scale, w_q, its scale."""
    products, t = stored_weight(weight)
    packed = weight.qweight.dtype == torch.uint8
    wide = x_hat.float().numpy()
    if weight.input_scale is not None:
        a = numpy.float32(weight.input_scale.item()) * numpy.float32(6 if packed else 1)
        a = numpy.full((len(wide), 1), a)
    else:
        a = numpy.abs(wide).max(-1, keepdims=True) / numpy.float32(448)
        a = numpy.where(a == 0, numpy.float32(1), a)
    x_q = codec.round_e4m3(torch.from_numpy(wide * (numpy.float32(1) / a)))
    shift = 8 if packed else 1
    return x_q.double(), torch.from_numpy(a).double(), codec.round_e4m3(products / shift).double(), t.double() * shift


def low_precision(weight, x_hat, bias, compute):
    """The same operands multiplied out and summed in x_hat's dtype."""
    dtype = x_hat.dtype
    products, t = stored_weight(weight)
    x_q, w = x_hat, products * t.double()
    if compute == "fp8":
        x_q, a, w_q, t = fp8_operands(weight, x_hat)
        x_q, w = x_q * a, w_q * t
    y = F.linear(x_q.to(dtype), w.to(dtype), bias)
    return y if weight.lora_down is None else y + reference.low_rank(x_hat, weight.lora_down, weight.lora_up)


@given(seeds, tokens, features, features, st.sampled_from([0, 1, 16]), dtypes, formats, st.booleans(), st.booleans())
def test_within_the_budget_of_float64(seed, m, n, k, rank, dtype, format, bias, dynamic):
    layer, x = case(seed, m, n, k, rank=rank, dtype=dtype, format=format, bias=bias, dynamic=dynamic)
    x_hat = reference.smooth(x, layer.weight.pre_quant_scale)
    for compute in ("fp8", "bf16"):
        oracle = call(layer, x_hat.double(), compute, pre_quant_scale=None)
        used = arithmetic(compute, m, layer.weight.qweight.dtype == torch.uint8)
        low = low_precision(layer.weight, x_hat, layer.bias, used)
        assert_within_budget(call(layer, x, compute), oracle, low_precision=low)


@given(seeds, features, features, formats, st.booleans())
def test_the_oracle_is_the_formula(seed, n, k, format, dynamic):
    """In float64 nothing but the operands is rounded."""
    layer, x = case(seed, MANY, n, k, format=format, dynamic=dynamic)
    w = layer.weight
    x_hat = reference.smooth(x, w.pre_quant_scale).double()
    x_q, a, w_q, t = fp8_operands(w, x_hat)
    products, t_stored = stored_weight(w)
    rest = layer.bias.double()
    if w.lora_down is not None:
        rest = rest + x_hat @ w.lora_down.double().t() @ w.lora_up.double().t()
    expected = {"fp8": (x_q @ w_q.t()) * (a * t), "bf16": (x_hat @ products.t()) * t_stored.double()}
    for compute, product in expected.items():
        actual = call(layer, x_hat, compute, pre_quant_scale=None)
        torch.testing.assert_close(actual, product + rest, rtol=1e-12, atol=1e-12)


@given(seeds, features, st.sampled_from([Format.NVFP4_SVD, Format.FP8, Format.FP8_SVD]), st.booleans())
def test_activation_operands_are_the_codecs(seed, k, format, dynamic):
    layer, x = case(seed, MANY, 16, k, format=format, dynamic=dynamic)
    w = layer.weight
    x[0] = 0
    x[1] *= 2**20
    _, _, scale = reference.fp8_weight(w.qweight, w.weight_scale, w.weight_scale_2, w.input_scale)
    scale = reference.dynamic_input_scale_fp8(x) if scale is None else scale
    x_q, a, _, _ = fp8_operands(w, x)
    assert_bits_equal(reference.quantize_fp8(x, scale).double(), x_q)
    assert_bits_equal(scale.double().expand(MANY, 1), a)


def test_every_product_of_code_and_block_scale():
    """The divisor is a power of two, so nothing saturates and only e4m3's own rounding is left."""
    scales = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn)
    codes = torch.arange(16, dtype=torch.uint8).repeat(len(scales), 1)
    w_q, scale, none = reference.fp8_weight(codec.pack_codes(codes), scales[:, None], torch.tensor(0.75), None)
    exact = codec.decode_e2m1(codes, torch.float64) * scales.double()[:, None] / 8
    assert exact.abs().max() == 336
    assert_bits_equal(w_q, codec.round_e4m3(exact))
    error = (w_q.double() - exact).abs()
    normal = exact.abs() >= 2**-6
    assert (error[normal] / exact.abs()[normal]).max() <= 2**-4
    assert error[~normal].max() <= 2**-10
    assert scale == 6.0
    assert none is None


@given(seeds, features, features, st.booleans(), st.booleans())
def test_operands_of_a_row_do_not_depend_on_other_rows(seed, n, k, dynamic, smooth):
    layer, x = case(seed, MANY, n, k, dynamic=dynamic, smooth=smooth)
    order = torch.randperm(MANY, generator=torch.Generator().manual_seed(seed))
    scale = layer.weight.input_scale

    def operands(rows):
        x_hat = reference.smooth(rows, layer.weight.pre_quant_scale)
        a = reference.dynamic_input_scale_fp8(x_hat) if scale is None else scale
        return reference.quantize_fp8(x_hat, a)

    assert_bits_equal(operands(x[order]), operands(x)[order])


packed_formats = st.sampled_from([Format.NVFP4, Format.NVFP4_SVD])


@given(seeds, st.integers(0, FP8_MIN_TOKENS - 1), features, features, packed_formats)
def test_few_tokens_of_fp8_are_bf16(seed, m, n, k, format):
    layer, x = case(seed, m, n, k, format=format)
    assert_bits_equal(call(layer, x, "fp8"), call(layer, x, "bf16"))


@given(seeds, tokens, features, features)
def test_nvfp4_of_an_fp8_checkpoint_is_its_own_operands(seed, m, n, k):
    """However few tokens there are; fp8 is the same."""
    layer, x = case(seed, m, n, k, format=Format.FP8)
    x_q, a, w_q, t = fp8_operands(layer.weight, x)
    own = call(layer, x.double(), "nvfp4")
    torch.testing.assert_close(own, (x_q @ w_q.t()) * (a * t) + layer.bias.double(), rtol=1e-12, atol=1e-12)
    assert_bits_equal(call(layer, x, "fp8"), call(layer, x, "nvfp4"))


@given(seeds, features, features, st.sampled_from(FORMATS))
def test_bf16_quantises_no_activation(seed, n, k, format):
    """Without an activation's rounding the linear is linear, even where a calibrated scale would saturate."""
    layer, x = case(seed, MANY, n, k, format=format, bias=False)
    x = x.double()
    total = call(layer, x * 1e4 + x.flip(0), "bf16", pre_quant_scale=None)
    parts = call(layer, x, "bf16", pre_quant_scale=None) * 1e4 + call(layer, x.flip(0), "bf16", pre_quant_scale=None)
    torch.testing.assert_close(total, parts, rtol=1e-9, atol=1e-9)


@given(seeds, tokens, features, features, st.sampled_from(["fp8", "bf16"]))
def test_rank_zero_is_no_low_rank_branch(seed, m, n, k, compute):
    layer, x = case(seed, m, n, k, rank=0)
    y = call(layer, x, compute)
    assert_bits_equal(y, call(layer, x, compute, lora_down=None, lora_up=None))


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_infinities_and_zeros(format):
    """A static scale saturates an infinity, a dynamic one makes its token NaN; a token of zeros is the bias."""
    for dynamic in (False, True):
        layer, x = case(5, MANY, 32, 48, format=format, dynamic=dynamic, rank=0)
        x[3], x[4, 5] = 0, float("inf")
        y = call(layer, x, "fp8", pre_quant_scale=None)
        assert_bits_equal(y[3], layer.bias.detach())
        assert y[4].isnan().all() if dynamic else y[4].isfinite().all()
        assert y[torch.arange(MANY) != 4].isfinite().all()


def test_what_each_mode_gives_up():
    """Of the product with the stored weight: bf16 nothing, fp8 a few percent, nvfp4 more."""
    layer, x = case(6, MANY, 64, 128, format=Format.NVFP4, bias=False)
    products, t = stored_weight(layer.weight)
    exact = x.double() @ (products * t.double()).t()
    errors = {mode: relative_error(call(layer, x.double(), mode), exact) for mode in ("bf16", "fp8", "nvfp4")}
    assert errors["bf16"] < 1e-12
    assert 0.01 < errors["fp8"] < 0.05 < errors["nvfp4"] < 0.15


def test_a_weight_is_expanded_to_what_fp8_multiplies():
    layer, x = case(7, MANY, 32, 48)
    _, _, w_q, t = fp8_operands(layer.weight, x)
    made = expand(layer.weight)
    assert_bits_equal(made.qweight.double(), w_q)
    assert_bits_equal(made.weight_scale.double(), t)
