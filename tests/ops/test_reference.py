"""What must hold for any quantised linear, whatever its numbers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from svdq_compile.ops import codec, reference
from svdq_compile.ops.linear import linear
from svdq_compile.ops.modes import COMPUTE_MODES, NEEDS_CODES
from svdq_compile.ops.weight import take
from svdq_compile.spec import Format
from svdq_compile.testing.oracle import assert_bits_equal, assert_within_budget
from svdq_compile.testing.weights import random_linear
from svdq_compile.testing.wide import wide_linear

FORMATS = [Format.NVFP4_SVD, Format.NVFP4, Format.FP8, Format.FP8_SVD]
KINDS = [(f, c) for f in FORMATS for c in COMPUTE_MODES if f is not Format.FP8_SVD or c not in NEEDS_CODES]
"""Every format with every compute mode it can have."""

seeds = st.integers(0, 2**32)
tokens = st.sampled_from([0, 1, 2, 15, 16, 17, 33, 130])
features = st.sampled_from([16, 32, 48, 80, 128])
ranks = st.sampled_from([0, 1, 3, 16, 32, 48])
dtypes = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])
formats = st.sampled_from(FORMATS)
modes = st.sampled_from(COMPUTE_MODES)
kinds = st.sampled_from(KINDS)


def case(seed, m, n, k, **kwargs):
    """A quantised layer and its input."""
    g = torch.Generator().manual_seed(seed)
    layer = random_linear(n, k, generator=g, **kwargs)
    dtype = layer.weight.dtype
    return layer, torch.randn(m, k, generator=g).to(dtype)


def with_parts(layer, **changed):
    """The operator's arguments behind x, some of them exchanged."""
    w = layer.weight
    args = dict(
        qweight=w.qweight,
        weight_scale=w.weight_scale,
        weight_scale_2=w.weight_scale_2,
        input_scale=w.input_scale,
        pre_quant_scale=w.pre_quant_scale,
        lora_down=w.lora_down,
        lora_up=w.lora_up,
        bias=layer.bias,
        compute=w.fingerprint.compute,
    )
    return args | changed


@given(
    seeds,
    tokens,
    features,
    features,
    ranks,
    dtypes,
    st.sampled_from([Format.NVFP4_SVD, Format.NVFP4, Format.FP8]),
    st.booleans(),
    st.booleans(),
)
def test_nvfp4_mode_is_within_the_budget_of_float64(seed, m, n, k, rank, dtype, format, bias, dynamic):
    """Against the same operands summed in float64; ModelOpt's rounding of every operand is the low-precision run."""
    kind = {"rank": rank, "dtype": dtype, "format": format, "bias": bias, "dynamic": dynamic}
    layer, x = case(seed, m, n, k, compute="nvfp4", **kind)
    args = with_parts(layer)
    low = linear(x, **(args | {"compute": "modelopt"}))
    assert_within_budget(layer(x), wide_linear(layer, x, torch.float64), low_precision=low)


@given(seeds, features, features, st.booleans(), st.booleans())
def test_operands_of_a_row_do_not_depend_on_other_rows(seed, n, k, dynamic, smooth):
    """Everything before the sums is bitwise per token: smoothing, scales, codes."""
    layer, x = case(seed, 33, n, k, dynamic=dynamic, smooth=smooth)
    order = torch.randperm(33, generator=torch.Generator().manual_seed(seed))
    scale = layer.weight.input_scale

    def operands(rows):
        x_hat = reference.smooth(rows, layer.weight.pre_quant_scale)
        t = reference.dynamic_input_scale(x_hat) if scale is None else scale
        return codec.quantize_nvfp4(x_hat.float(), t)

    for whole, permuted in zip(operands(x), operands(x[order]), strict=True):
        assert_bits_equal(permuted, whole[order])


@given(seeds, tokens, features, features, modes)
def test_rank_zero_is_no_low_rank_branch(seed, m, n, k, compute):
    layer, x = case(seed, m, n, k, rank=0, compute=compute)
    args = with_parts(layer)
    assert args["lora_down"].shape == (0, k)
    assert_bits_equal(linear(x, **args), linear(x, **(args | {"lora_down": None, "lora_up": None})))


@given(seeds, tokens, features, features, st.sampled_from([1, 16, 32]), st.integers(1, 16))
def test_zero_padded_rank_changes_nothing(seed, m, n, k, rank, extra):
    """Zero rows of lora_down and whatever columns of lora_up they meet: the same sum, in float64 the same bits."""
    layer, x = case(seed, m, n, k, rank=rank)
    args = with_parts(layer)
    down = torch.cat((args["lora_down"], torch.zeros(extra, k, dtype=x.dtype)))
    up = torch.cat((args["lora_up"], torch.ones(n, extra, dtype=x.dtype)), 1)
    padded = args | {"lora_down": down, "lora_up": up}
    assert_within_budget(linear(x, **padded), linear(x.double(), **args), low_precision=linear(x, **args))
    narrow = linear(x.double(), **args)
    torch.testing.assert_close(linear(x.double(), **padded), narrow, rtol=1e-12, atol=1e-12)


@given(seeds, tokens, features, features)
def test_zero_lora_up_gives_the_residual(seed, m, n, k):
    layer, x = case(seed, m, n, k, rank=16)
    args = with_parts(layer)
    zero = args | {"lora_up": torch.zeros_like(args["lora_up"])}
    assert_bits_equal(linear(x, **zero), linear(x, **(args | {"lora_down": None, "lora_up": None})))


@given(seeds, tokens, features, features, ranks, modes)
def test_power_of_two_smoothing_folded_into_the_input_is_the_identity(seed, m, n, k, rank, compute):
    """(x / s, s) and (x, 1) are the same numbers when s is a power of two."""
    layer, x = case(seed, m, n, k, rank=rank, compute=compute)
    g = torch.Generator().manual_seed(seed)
    s = torch.exp2(torch.randint(-3, 4, (k,), generator=g).float()).to(x.dtype)
    smoothed = with_parts(layer, pre_quant_scale=s)
    plain = with_parts(layer, pre_quant_scale=None)
    assert_bits_equal(linear(x / s, **smoothed), linear(x, **plain))


@given(seeds, tokens, features, features, ranks, st.sampled_from(["nvfp4", "fp8", "bf16"]))
def test_scaling_input_and_its_scale_scales_the_output(seed, m, n, k, rank, compute):
    """Powers of two commute with everything once the calibrated scale follows."""
    layer, x = case(seed, m, n, k, rank=rank, bias=False, compute=compute)
    args = with_parts(layer)
    scaled = args | {"input_scale": args["input_scale"] * 4}
    assert_bits_equal(linear(x * 4, **scaled), linear(x, **args) * 4)


@given(seeds, tokens, features, features, st.sampled_from(["nvfp4", "fp8", "bf16"]))
def test_dynamic_scale_follows_each_token(seed, m, n, k, compute):
    """Scaling one token by a power of two scales its output and no other's."""
    layer, x = case(seed, m + 2, n, k, rank=16, bias=False, dynamic=True, compute=compute)
    factor = torch.ones(m + 2, 1, dtype=x.dtype)
    factor[1] = 8
    assert_bits_equal(layer(x * factor), layer(x) * factor)


@given(seeds, tokens, features, features, ranks, kinds)
def test_row_slices_compute_slices_of_the_output(seed, m, n, k, rank, kind):
    format, compute = kind
    layer, x = case(seed, m, n, k, rank=rank, format=format, compute=compute)
    cut = n // 2
    wide = torch.nn.functional.linear(x.double(), layer.weight, layer.bias)
    for rows in (slice(0, cut), slice(cut, n)):
        part = torch.nn.functional.linear(x.double(), layer.weight[rows], layer.bias[rows])
        torch.testing.assert_close(part, wide[:, rows], rtol=1e-12, atol=1e-12)


@given(seeds, tokens, features, st.sampled_from([32, 48, 80, 128]), ranks, formats)
def test_column_slices_sum_to_the_output(seed, m, n, k, rank, format):
    """With a calibrated activation scale every block is quantised alike in a slice and in the whole."""
    layer, x = case(seed, m, n, k, rank=rank, format=format, bias=False)
    cut = k // 32 * 16
    wide = torch.nn.functional.linear(x.double(), layer.weight)
    parts = [
        torch.nn.functional.linear(x[:, a:b].double(), take(layer.weight, 1, a, b)) for a, b in ((0, cut), (cut, k))
    ]
    torch.testing.assert_close(parts[0] + parts[1], wide, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("format", "compute"), KINDS)
@pytest.mark.parametrize("m", [17, 130])
def test_nan_stays_in_its_row(format, compute, m):
    layer, x = case(3, m, 32, 48, format=format, compute=compute)
    clean = layer(x)
    x[5, 7] = float("nan")
    y = layer(x)
    assert y[5].isnan().all()
    keep = torch.arange(m) != 5
    assert not y[keep].isnan().any()
    assert_bits_equal(y[keep], clean[keep])


@pytest.mark.parametrize(("format", "compute"), [kind for kind in KINDS if kind[1] in ("nvfp4", "fp8")])
def test_saturation_is_clean(format, compute):
    """Activations far beyond the calibrated range saturate; they do not wrap, overflow or turn into NaN."""
    layer, x = case(4, 130, 32, 48, format=format, rank=0, bias=False, compute=compute)
    x = x + x.sign()
    big, bigger = layer(x * 2**14), layer(x * 2**15)
    assert big.isfinite().all()
    assert_bits_equal(big, bigger)


def test_non_contiguous_input_and_leading_dimensions():
    layer, x = case(5, 24, 32, 48)
    y = layer(x)
    assert_bits_equal(layer(x.reshape(2, 3, 4, 48)), y.reshape(2, 3, 4, 32))
    strided = torch.empty(48, 24, dtype=x.dtype).t()
    strided.copy_(x)
    assert not strided.is_contiguous()
    assert_bits_equal(layer(strided), y)
    assert_bits_equal(layer(x[0]), layer(x[:1])[0])
