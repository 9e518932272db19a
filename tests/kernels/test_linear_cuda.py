"""linear_cuda against a float64 oracle of the same quantised operands."""

import os
import pathlib
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from svdq_compile.ops import codec, reference
from svdq_compile.ops.cuda import linear_cuda
from svdq_compile.ops.linear import linear_reference
from svdq_compile.testing.oracle import assert_bits_equal, assert_within_budget

pytest.importorskip("triton")

HALF_DTYPES = (torch.bfloat16, torch.float16)
SHAPES = ((16, 16), (48, 32), (16, 272), (272, 48), (129, 3072), (3072, 256))
LEADING = ((0,), (1,), (17,), (129,), (2, 65), (), (1, 3, 5))


def make(leading, shape, rank, x_dtype, model_dtype, smooth, dynamic, bias, seed):
    """Arguments of svdq::linear; rank None has no low-rank branch."""
    g = torch.Generator().manual_seed(seed)
    n, k = shape

    def randn(*size, dtype=model_dtype):
        return torch.randn(size, generator=g).to(dtype)

    codes, scale = codec.quantize_nvfp4(randn(n, k, dtype=torch.float32), torch.tensor(1e-3))
    return (
        randn(*leading, k, dtype=x_dtype),
        codec.pack_codes(codes),
        scale,
        torch.tensor(1e-3 / k**0.5),
        None if dynamic else torch.tensor(2.5e-3),
        (torch.rand(k, generator=g) + 0.5).to(model_dtype) if smooth else None,
        None if rank is None else randn(rank, k) / k**0.5,
        None if rank is None else randn(n, rank) / max(rank, 1) ** 0.5,
        randn(n) if bias else None,
    )


def oracle(x, qweight, weight_scale, weight_scale_2, input_scale, s, lora_down, lora_up, bias):
    """Float64 sums of the operands that float32 arithmetic quantises to.

    Not linear_reference of x.double(): smoothing in float64 is not rounded to the dtype of x.
    """
    x_hat = reference.smooth(x, s)
    t = reference.dynamic_input_scale(x_hat) if input_scale is None else input_scale
    x_q = codec.decode_nvfp4(*codec.quantize_nvfp4(x_hat.float(), t), torch.float64)
    w_q = codec.decode_nvfp4(codec.unpack_codes(qweight), weight_scale, torch.float64)
    y = x_q @ w_q.t() * (t.double() * weight_scale_2.double())
    if lora_down is not None:
        y = y + reference.low_rank(x_hat.double(), lora_down.double(), lora_up.double())
    return y if bias is None else y + bias.double()


def to(args, device):
    return tuple(a if a is None else a.to(device) for a in args)


def check(args):
    actual = linear_cuda(*to(args, "cuda"))
    assert actual.dtype == args[0].dtype
    assert actual.is_contiguous()
    assert_within_budget(actual, oracle(*args), low_precision=linear_reference(*args))


gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def interpreted_cases():
    half = [
        make((2, 3), (48, 32), 5, dtype, dtype, False, dynamic, bias, 0)
        for dtype in HALF_DTYPES
        for dynamic in (False, True)
        for bias in (False, True)
    ]
    return [
        *half,
        make((5,), (16, 272), 4, torch.float32, torch.float32, True, False, True, 1),
        make((5,), (16, 272), 4, torch.float32, torch.bfloat16, True, True, True, 2),
        make((5,), (16, 32), 0, torch.float32, torch.bfloat16, True, True, False, 3),
        make((5,), (16, 32), 3, torch.bfloat16, torch.float32, False, True, True, 4),
        make((), (16, 32), None, torch.bfloat16, torch.bfloat16, False, False, True, 5),
        make((0,), (16, 32), 3, torch.bfloat16, torch.bfloat16, True, True, True, 6),
    ]


def test_in_the_interpreter(tmp_path):
    cases = interpreted_cases()
    torch.save([("linear_cuda", args) for args in cases], tmp_path / "cases.pt")
    script = pathlib.Path(__file__).with_name("apply_kernels.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "cases.pt"), str(tmp_path / "results.pt"), "cpu"],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for args, actual in zip(cases, torch.load(tmp_path / "results.pt")):
        assert actual.dtype == args[0].dtype
        assert_within_budget(actual, oracle(*args), low_precision=linear_reference(*args))


@gpu
@needs_gpu
@given(
    st.builds(
        make,
        st.sampled_from(LEADING),
        st.sampled_from(SHAPES),
        st.sampled_from((None, 0, 1, 7, 32, 128)),
        st.sampled_from(HALF_DTYPES),
        st.sampled_from((*HALF_DTYPES, torch.float32)),
        st.booleans(),
        st.booleans(),
        st.booleans(),
        st.integers(0, 2**32),
    )
)
def test_within_budget(args):
    check(args)


@gpu
@needs_gpu
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("model_dtype", [torch.bfloat16, torch.float32])
def test_float32_activations(model_dtype, dynamic):
    check(make((129,), (129, 272), 32, torch.float32, model_dtype, True, dynamic, True, 0))


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_tf32_stays_within_budget(dtype):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        actual = [make((129,), (3072, 256), 128, dtype, dtype, True, True, True, seed) for seed in range(3)]
        actual = [(args, linear_cuda(*to(args, "cuda"))) for args in actual]
    finally:
        torch.set_float32_matmul_precision(before)
    for args, y in actual:
        assert_within_budget(y, oracle(*args), low_precision=linear_reference(*args))


@gpu
@needs_gpu
def test_real_shape():
    check(make((1000,), (12288, 3072), 32, torch.bfloat16, torch.bfloat16, True, False, True, 0))


@gpu
@needs_gpu
def test_strided_activations():
    args = to(make((2, 40), (48, 272), 8, torch.bfloat16, torch.bfloat16, True, True, True, 0), "cuda")
    expected = linear_cuda(*args)
    padded = torch.cat([args[0], args[0]], -1)[..., :272]
    swapped = args[0].transpose(0, 1).contiguous().transpose(0, 1)
    for x in (padded, swapped):
        assert not x.is_contiguous()
        assert_bits_equal(linear_cuda(x, *args[1:]), expected)


@gpu
@needs_gpu
def test_nan_stays_in_its_token():
    args = to(make((129,), (272, 256), 8, torch.bfloat16, torch.bfloat16, True, True, True, 0), "cuda")
    clean = linear_cuda(*args)
    args[0][70, 3] = torch.nan
    dirty = linear_cuda(*args)
    others = torch.arange(129, device="cuda") != 70
    assert dirty[70].isnan().all()
    assert_bits_equal(dirty[others], clean[others])


@gpu
@needs_gpu
def test_zero_lora_up_is_no_lora():
    args = to(make((17,), (48, 272), 8, torch.bfloat16, torch.bfloat16, True, False, True, 0), "cuda")
    args[7].zero_()
    without = (*args[:6], None, None, args[8])
    assert_bits_equal(linear_cuda(*args), linear_cuda(*without))


@gpu
@needs_gpu
def test_declined_cases_are_the_references():
    args = to(make((17,), (48, 272), 8, torch.bfloat16, torch.bfloat16, True, False, True, 0), "cuda")
    assert_bits_equal(linear_cuda(*args, compute="modelopt"), linear_reference(*args, compute="modelopt"))
    wide = (args[0].double(), *args[1:])
    assert_bits_equal(linear_cuda(*wide), linear_reference(*wide))
    fp8 = torch.randn(48, 272, device="cuda").to(torch.float8_e4m3fn)
    fp8 = (args[0], fp8, torch.tensor(0.1, device="cuda"), None, args[4], None, None, None, args[8])
    assert_bits_equal(linear_cuda(*fp8), linear_reference(*fp8))


@gpu
@needs_gpu
def test_refuses_like_the_reference():
    args = to(make((17,), (48, 272), 8, torch.bfloat16, torch.bfloat16, True, False, True, 0), "cuda")
    with pytest.raises(RuntimeError, match="256 features"):
        linear_cuda(args[0][:, :256], *args[1:])
