"""quantize_nvfp4 against the specification on the CPU, bit for bit."""

import os
import pathlib
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from svdq_compile.ops import codec, reference
from svdq_compile.spec import E2M1_MAX, E4M3_MAX
from svdq_compile.testing.oracle import assert_bits_equal

pytest.importorskip("triton")

from svdq_kernels.activation import quantize_nvfp4

ROWS = (0, 1, 15, 16, 17, 127, 128, 129)
COLUMNS = (16, 32, 48, 256, 272, 3072)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
STATIC_SCALES = (1.0, 2.0**-9, 0.0123, 3e-7, 400.0)


def normal(shape, g):
    return torch.randn(shape, generator=g)


def wide_range(shape, g):
    """Magnitudes from 1e-4 to 1e4 in one block."""
    return normal(shape, g) * 10 ** (normal(shape, g) * 2).clamp(-4, 4)


def quarters(shape, g):
    """Multiples of 1/4 up to 6: half of them are ties where block and tensor scale are powers of two."""
    return torch.randint(-24, 25, shape, generator=g) / 4


def zero_blocks(shape, g):
    """Blocks of +0 and -0 between others; the first token has nothing else."""
    x = normal(shape, g).unflatten(-1, (-1, 16))
    x = torch.where(torch.rand(*x.shape[:-1], 1, generator=g) < 0.5, x * 0, x).flatten(-2)
    x[:1] *= 0
    return x


def not_finite(shape, g):
    """A NaN or an infinity in some of the tokens."""
    x = normal(shape, g)
    special = torch.tensor([torch.nan, torch.inf, -torch.inf])[torch.randint(3, shape, generator=g)]
    return torch.where(torch.rand(shape, generator=g) < 1 / (4 * shape[1]), special, x)


FILLS = (normal, wide_range, quarters, zero_blocks, not_finite)


def contiguous(x):
    return x


def padded_rows(x):
    return torch.cat([x, torch.full((x.shape[0], 24), torch.nan, dtype=x.dtype)], 1)[:, : x.shape[1]]


def unaligned(x):
    """Rows start 1 element past an aligned address, and their stride is odd."""
    return torch.cat([torch.full((x.shape[0], 1), torch.nan, dtype=x.dtype), x], 1)[:, 1:]


def transposed(x):
    return x.t().contiguous().t()


LAYOUTS = (contiguous, padded_rows, unaligned, transposed)


def make(m, k, dtype, fill, layout, smooth, static, seed):
    """Arguments of quantize_nvfp4."""
    g = torch.Generator().manual_seed(seed)
    x = layout(fill((m, k), g).to(dtype))
    s = (torch.rand(k, generator=g) * 2 + 0.1).to(dtype) if smooth else None
    t = torch.tensor(static, dtype=torch.float32) if static else None
    return x, s, t


def expected(x, s, t):
    """The specification's result."""
    x_hat = reference.smooth(x, s)
    if t is None:
        t = reference.dynamic_input_scale(x_hat)
    codes, scale = codec.quantize_nvfp4(x_hat.float(), t)
    return codec.decode_nvfp4(codes, scale, torch.bfloat16), t, x_hat


def assert_same(actual, wanted):
    """Equal bits; NaN is NaN whatever its payload, and zeros in a token that is not finite have no sign."""
    for a, b in zip(actual, wanted):
        a, b = a.cpu(), b.cpu()
        assert torch.equal(a.isnan(), b.isnan())
        finite = wanted[2].cpu().isfinite().all(-1, keepdim=True)
        if a.dim() == 2:
            a, b = (torch.where(~finite & ((v == 0) | v.isnan()), 0, v) for v in (a, b))
        assert_bits_equal(a, b)


arguments = st.builds(
    make,
    st.sampled_from(ROWS),
    st.sampled_from(COLUMNS),
    st.sampled_from(DTYPES),
    st.sampled_from(FILLS),
    st.sampled_from(LAYOUTS),
    st.booleans(),
    st.sampled_from((None, *STATIC_SCALES)),
    st.integers(0, 2**32),
)

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def cuda(args):
    """Arguments on the GPU, strides and offset kept."""

    def move(t):
        storage = t.new_empty(0).set_(t.untyped_storage())
        return storage.cuda().as_strided(t.shape, t.stride(), t.storage_offset())

    return tuple(None if t is None else move(t) for t in args)


def interpreted_cases():
    """Arguments the interpreter computes exactly: its own rounding to 16 bits is not to nearest even."""
    result = []
    for seed, fill in enumerate(FILLS):
        for static in (None, *STATIC_SCALES):
            layout = LAYOUTS[len(result) % len(LAYOUTS)]
            for m, k in ((3, 48), (2, 272), (1, 1040)):
                result.append(make(m, k, torch.float32, fill, layout, True, static, seed))
                result.append(make(m, k, DTYPES[len(result) % 3], fill, layout, False, static, seed))
    for dtype in DTYPES:
        x, _, _ = make(5, 64, dtype, normal, contiguous, False, None, 99)
        result.append((x, 2.0 ** torch.arange(-32, 32).div(8, rounding_mode="floor").to(dtype), None))
    result.append(make(0, 64, torch.bfloat16, normal, contiguous, True, None, 0))
    return result


def test_every_bit_in_the_interpreter(tmp_path):
    cases = interpreted_cases()
    torch.save([("quantize_nvfp4", args) for args in cases], tmp_path / "cases.pt")
    script = pathlib.Path(__file__).with_name("apply_kernels.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "cases.pt"), str(tmp_path / "results.pt"), "cpu"],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for args, actual in zip(cases, torch.load(tmp_path / "results.pt")):
        assert_same(actual, expected(*args))


@gpu
@needs_gpu
@given(arguments)
def test_every_bit(args):
    assert_same(quantize_nvfp4(*cuda(args)), expected(*args))


@gpu
@needs_gpu
@given(arguments, st.integers(0, 2**32))
def test_tokens_are_independent(args, seed):
    x, s, t = cuda(args)
    order = torch.randperm(x.shape[0], generator=torch.Generator().manual_seed(seed)).cuda()
    permuted = quantize_nvfp4(x[order], s, t)
    for actual, whole in zip(permuted, quantize_nvfp4(x, s, t)):
        assert_bits_equal(actual, whole[order] if whole.dim() == 2 else whole)


@gpu
@needs_gpu
@pytest.mark.parametrize("static", [None, 0.02])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_where_it_is(dtype, static):
    clean = cuda(make(17, 3072, dtype, normal, contiguous, True, static, 0))
    dirty = (clean[0].clone(), *clean[1:])
    dirty[0][5, 40] = torch.nan
    x_q, t, x_hat = quantize_nvfp4(*dirty)
    others = torch.arange(17, device="cuda") != 5
    for actual, without in zip((x_q, x_hat), quantize_nvfp4(*clean)[::2]):
        assert_bits_equal(actual[others], without[others])
    block = torch.arange(3072, device="cuda") // 16 == 2
    assert x_q[5, block].isnan().all()
    # A dynamic scale is the whole token's; a calibrated one leaves the other blocks alone.
    assert x_q[5, ~block].isnan().all() == (static is None)
    assert t.isnan().sum() == (static is None)


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_tokens_are_zeros_with_scale_one(dtype):
    x = torch.zeros(3, 48, dtype=dtype, device="cuda")
    x[1] = -0.0
    x_q, t, _ = quantize_nvfp4(x, None, None)
    assert_bits_equal(x_q, torch.zeros(3, 48, dtype=torch.bfloat16))
    assert_bits_equal(t, torch.ones(3, 1))


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_saturates(dtype):
    sign = torch.where(torch.arange(48, device="cuda") % 3 == 0, -1.0, 1.0).expand(3, 48)
    x_q, _, _ = quantize_nvfp4((sign * 5000).to(dtype), None, torch.tensor(1e-3, device="cuda"))
    assert_bits_equal(x_q, (sign * E2M1_MAX * E4M3_MAX).bfloat16())


@gpu
@needs_gpu
@pytest.mark.parametrize("exponent", [-20, -1, 1, 20])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_powers_of_two_move_only_the_token_scale(dtype, exponent):
    x, s, _ = cuda(make(129, 272, dtype, wide_range, contiguous, True, None, 1))
    x_q, t, _ = quantize_nvfp4(x, s, None)
    scaled_q, scaled_t, _ = quantize_nvfp4(x * 2.0**exponent, s, None)
    assert_bits_equal(scaled_q, x_q)
    assert_bits_equal(scaled_t, t * 2.0**exponent)


@gpu
@needs_gpu
def test_outputs_are_fully_written(monkeypatch):
    args = cuda(make(17, 272, torch.bfloat16, normal, contiguous, True, None, 2))
    wanted = quantize_nvfp4(*args)
    empty, empty_like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(torch.nan))
    for actual, without in zip(quantize_nvfp4(*args), wanted):
        assert_bits_equal(actual, without)


@gpu
@needs_gpu
def test_beyond_32_bit_offsets():
    m, k = 2**31 // 3072 + 2, 3072
    if torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GiB of GPU memory")
    x = torch.empty(m, k, dtype=torch.bfloat16, device="cuda").normal_()
    s = torch.full((k,), 0.7, dtype=torch.bfloat16, device="cuda")
    for actual, last in zip(quantize_nvfp4(x, s, None), quantize_nvfp4(x[-1:].clone(), s, None)):
        assert_bits_equal(actual[-1:], last)


@gpu
@needs_gpu
def test_without_smoothing_x_hat_is_x():
    x = torch.randn(4, 32, device="cuda")
    t = torch.tensor(0.1, device="cuda")
    _, scale, x_hat = quantize_nvfp4(x, None, t)
    assert x_hat is x
    assert scale is t


@pytest.mark.parametrize(
    ("x", "s", "t", "message"),
    [
        (torch.zeros(2, 32).double(), None, None, "float64"),
        (torch.zeros(2, 24), None, None, "24 columns"),
        (torch.zeros(2, 32), torch.ones(2, 16), None, r"\(2, 16\)"),
        (torch.zeros(2, 32), None, torch.ones(2, 1), "2 values"),
        (torch.zeros(2, 32), None, torch.ones(()).bfloat16(), "bfloat16"),
    ],
)
def test_refuses(x, s, t, message):
    with pytest.raises(ValueError, match=message):
        quantize_nvfp4(x, s, t)
