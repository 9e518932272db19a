"""``svdq::linear`` on a GPU, every mode and format: within the budget of float64 on the same operands."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from svdq_compile.ops import reference
from svdq_compile.ops.linear import linear, linear_reference
from svdq_compile.ops.modes import FP8_MIN_TOKENS
from svdq_compile.spec import COMPONENTS, Format
from svdq_compile.testing.oracle import assert_bits_equal, assert_within_budget
from svdq_compile.testing.weights import random_linear
from svdq_compile.testing.wide import wide_linear

pytest.importorskip("triton")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

MODES = ("nvfp4", "fp8", "bf16")
FORMATS = (Format.NVFP4_SVD, Format.NVFP4, Format.FP8, Format.FP8_SVD)
SHAPES = ((16, 16), (48, 32), (16, 272), (272, 48), (129, 512), (520, 144))
TOKENS = (0, 1, 2, FP8_MIN_TOKENS - 1, FP8_MIN_TOKENS, 16, 17, 127, 128, 1500)
LEADING = (*((m,) for m in TOKENS), (), (2, 65), (1, 3, 5), (3, 200))


def make(shape, leading, format, mode, rank, dtype, smooth, dynamic, bias, seed):
    """A layer on the CPU, its activation and mode."""
    g = torch.Generator().manual_seed(seed)
    options = {"format": format, "rank": rank, "dtype": dtype, "smooth": smooth, "dynamic": dynamic, "bias": bias}
    mode = "fp8" if mode == "nvfp4" and format is Format.FP8_SVD else mode
    layer = random_linear(*shape, compute=mode, generator=g, **options)
    return layer, torch.randn(*leading, shape[1], generator=g).to(dtype), mode


def parts(layer, device):
    components = [getattr(layer.weight, name) for name in COMPONENTS]
    return [None if part is None else part.to(device) for part in (*components, layer.bias)]


def low_precision(layer, x, mode):
    """Float32 sums of the residual, the low-rank branch in x's dtype."""
    x_hat = reference.smooth(x, layer.weight.pre_quant_scale)
    operands = parts(layer, "cpu")
    for name in ("pre_quant_scale", "lora_down", "lora_up"):
        operands[COMPONENTS.index(name)] = None
    y = linear_reference(x_hat, *operands, mode)
    w = layer.weight
    return y if w.lora_down is None else y + reference.low_rank(x_hat, w.lora_down, w.lora_up)


def run(layer, x, mode):
    return linear(x.cuda(), *parts(layer, "cuda"), mode)


def check(case):
    layer, x, mode = case
    actual = run(layer, x, mode)
    assert actual.dtype == x.dtype
    assert actual.is_contiguous()
    oracle = wide_linear(layer, x, torch.float64)
    assert_within_budget(actual, oracle, low_precision=low_precision(layer, x, mode))


ANY_MODE = st.sampled_from(MODES)


def cases(mode=ANY_MODE, formats=FORMATS):
    return st.builds(
        make,
        st.sampled_from(SHAPES),
        st.sampled_from(LEADING),
        st.sampled_from(formats),
        mode,
        st.sampled_from((0, 16, 32, 48, 128)),
        st.sampled_from((torch.bfloat16, torch.float16)),
        st.booleans(),
        st.booleans(),
        st.booleans(),
        st.integers(0, 2**32),
    )


@pytest.mark.parametrize("mode", MODES)
@given(st.data())
def test_within_the_budget(mode, data):
    check(data.draw(cases(st.just(mode))))


@given(cases(st.just("auto"), (Format.NVFP4_SVD, Format.NVFP4, Format.FP8)))
def test_auto_is_the_devices_mode(case):
    layer, x, _ = case
    capability = torch.cuda.get_device_capability()
    mode = "nvfp4" if capability >= (10, 0) else "fp8" if capability >= (8, 9) else "bf16"
    assert_bits_equal(run(layer, x, "auto"), run(layer, x, mode))


@given(cases())
def test_runs_are_equal(case):
    assert_bits_equal(run(*case), run(*case))


@given(cases(), st.integers(0, 2**32))
def test_tokens_are_independent(case, seed):
    layer, x, mode = case
    x = x.reshape(-1, x.shape[-1])
    order = torch.randperm(x.shape[0], generator=torch.Generator().manual_seed(seed))
    assert_bits_equal(run(layer, x[order], mode), run(layer, x, mode)[order.cuda()])


@given(cases())
def test_strides_change_nothing(case):
    layer, x, mode = case
    padded = torch.cat([x, x], -1)[..., : x.shape[-1]]
    assert_bits_equal(linear(padded.cuda(), *parts(layer, "cuda"), mode), run(layer, x, mode))
    wide = torch.cat([x, x], -1).cuda()[..., : x.shape[-1]]
    assert_bits_equal(linear(wide, *parts(layer, "cuda"), mode), run(layer, x, mode))


@given(cases())
def test_nan_stays_in_its_token(case):
    layer, x, mode = case
    x = x.reshape(-1, x.shape[-1]).clone()
    if not len(x):
        return
    clean = run(layer, x, mode)
    row = len(x) // 2
    x[row, 3] = torch.nan
    dirty = run(layer, x, mode)
    others = torch.arange(len(x), device="cuda") != row
    assert dirty[row].isnan().all()
    assert_bits_equal(dirty[others], clean[others])


@given(cases())
def test_leading_dimensions_are_tokens(case):
    layer, x, mode = case
    flat = run(layer, x.reshape(-1, x.shape[-1]), mode)
    assert_bits_equal(run(layer, x, mode).reshape(flat.shape), flat)


@given(cases())
def test_zero_tokens_give_the_bias(case):
    layer, x, mode = case
    y = run(layer, torch.zeros_like(x), mode)
    bias = torch.zeros(y.shape[-1], dtype=y.dtype) if layer.bias is None else layer.bias
    # Not their bits: zeros of either sign are sums of zeros.
    assert torch.equal(y.cpu(), bias.expand(y.shape))


@given(cases(formats=(Format.NVFP4_SVD, Format.FP8_SVD)))
def test_zero_lora_up_is_no_low_rank_branch(case):
    layer, x, mode = case
    # Without a branch in between, the product with the scales and the sum with the bias become one operation.
    operands = [*parts(layer, "cuda")[:-1], None]
    up, down = COMPONENTS.index("lora_up"), COMPONENTS.index("lora_down")
    if operands[up] is None:
        return
    operands[up] = torch.zeros_like(operands[up])
    zero = linear(x.cuda(), *operands, mode)
    operands[up] = operands[down] = None
    assert_bits_equal(zero, linear(x.cuda(), *operands, mode))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tokens", [1, 64, 1000])
def test_real_shape(mode, tokens):
    check(make((12288, 3072), (tokens,), Format.NVFP4_SVD, mode, 32, torch.bfloat16, True, False, True, 0))


@pytest.mark.parametrize(
    ("mode", "dtype"), [("modelopt", torch.bfloat16), ("nvfp4", torch.float32), ("fp8", torch.float64)]
)
def test_what_no_kernel_takes_is_the_reference(mode, dtype):
    layer, x, _ = make((48, 272), (17,), Format.NVFP4_SVD, mode, 16, torch.bfloat16, True, False, True, 0)
    x = x.to("cuda", dtype)
    assert_bits_equal(linear(x, *parts(layer, "cuda"), mode), linear_reference(x, *parts(layer, "cuda"), mode))


def test_another_dtype_than_the_factors_is_the_reference():
    layer, x, mode = make((48, 272), (200,), Format.NVFP4_SVD, "fp8", 16, torch.bfloat16, True, False, True, 0)
    x = x.half().cuda()
    assert_bits_equal(linear(x, *parts(layer, "cuda"), mode), linear_reference(x, *parts(layer, "cuda"), mode))


def test_inputs_that_are_no_multiple_of_16_are_the_references():
    layer = random_linear(48, 40, format=Format.FP8, compute="fp8")
    x = torch.randn(200, 40, dtype=torch.bfloat16, device="cuda")
    assert_bits_equal(linear(x, *parts(layer, "cuda"), "fp8"), linear_reference(x, *parts(layer, "cuda"), "fp8"))
