"""The operator's contract: schema, fake implementation, errors, no mutation."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from svdq_compile.errors import SvdqError
from svdq_compile.ops.linear import linear
from svdq_compile.ops.modes import COMPUTE_MODES, NEEDS_CODES
from svdq_compile.ops.weight import COMPONENTS
from svdq_compile.spec import Format
from svdq_compile.testing.oracle import assert_bits_equal
from svdq_compile.testing.weights import random_linear

# test_schema compares outputs with torch.allclose, which has no float8; test_nothing_is_mutated covers it.
OPCHECKS = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def arguments(layer, x):
    w = layer.weight
    return (x, *(getattr(w, name) for name in COMPONENTS), layer.bias, w.operator_compute)


@pytest.mark.parametrize("format", [Format.NVFP4_SVD, Format.NVFP4, Format.FP8, Format.FP8_SVD])
@pytest.mark.parametrize("compute", COMPUTE_MODES)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_opcheck(format, compute, dynamic):
    if format is Format.FP8_SVD and compute in NEEDS_CODES:
        pytest.skip("gave up the codes")
    layer = random_linear(32, 48, format=format, compute=compute, dynamic=dynamic)
    x = torch.randn(2, 5, 48, dtype=torch.bfloat16)
    torch.library.opcheck(linear, arguments(layer, x), test_utils=OPCHECKS)


@given(
    st.sampled_from([(), (0,), (1,), (7,), (2, 3), (2, 0, 3)]),
    st.sampled_from([(32, 48), (16, 16), (80, 128)]),
    st.sampled_from([Format.NVFP4_SVD, Format.NVFP4, Format.FP8, Format.FP8_SVD]),
    st.sampled_from([0, 1, 16]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
)
def test_fake_metadata_is_the_real_metadata(lead, sizes, format, rank, bias, dynamic, dtype):
    layer = random_linear(*sizes, format=format, rank=rank, bias=bias, dynamic=dynamic, dtype=dtype)
    args = arguments(layer, torch.randn(*lead, sizes[1], dtype=dtype))
    real = linear(*args)
    with FakeTensorMode() as mode:
        fake = linear(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args))
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


def test_nothing_is_mutated():
    layer = random_linear(32, 48)
    args = arguments(layer, torch.randn(5, 48, dtype=torch.bfloat16))
    before = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
    linear(*args)
    for now, then in zip(args, before, strict=True):
        if isinstance(then, torch.Tensor):
            assert_bits_equal(now, then)


def broken(format=Format.NVFP4_SVD, **changes):
    layer = random_linear(32, 48, format=format)
    names = ("x", *COMPONENTS, "bias", "compute")
    args = dict(zip(names, arguments(layer, torch.randn(5, 48, dtype=torch.bfloat16)), strict=True))
    return args | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.randn(5, 32)}, "x has 32 features, the weight 48"),
        ({"x": torch.zeros(5, 48, dtype=torch.int64)}, "x is torch.int64"),
        ({"qweight": torch.zeros(32, 24)}, "qweight is torch.float32"),
        ({"weight_scale": torch.ones(32, 2)}, "weight_scale is \\(32, 2\\)"),
        ({"weight_scale_2": None}, "NVFP4 needs weight_scale_2"),
        ({"lora_up": None}, "come together"),
        ({"lora_up": torch.zeros(32, 3)}, "LoRA factors do not fit"),
        ({"pre_quant_scale": torch.ones(16)}, "pre_quant_scale does not fit"),
        ({"bias": torch.ones(16)}, "bias does not fit"),
        ({"compute": "fast"}, "compute='fast'"),
        ({"compute": "modelopt", "format": Format.FP8_SVD}, "compute='modelopt' needs the 4-bit codes"),
        ({"compute": "nvfp4", "format": Format.FP8_SVD}, "compute='nvfp4' needs the 4-bit codes"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(RuntimeError, match=message):
        linear(**broken(**changes))
    args = broken(**changes)
    with FakeTensorMode() as mode:
        fakes = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in args.items()}
        with pytest.raises(RuntimeError, match=message):
            linear(**fakes)


def test_backward_says_that_codes_cannot_be_trained():
    layer = random_linear(32, 48)
    x = torch.randn(5, 48, dtype=torch.bfloat16, requires_grad=True)
    with torch.enable_grad():
        y = layer(x)
        with pytest.raises(SvdqError, match="cannot be trained"):
            y.sum().backward()
