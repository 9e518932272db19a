"""expand_nvfp4: every code under every block scale, and every shape; expand_weights: the same, in few launches."""

import pathlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from svdq_compile.ops import codec
from svdq_compile.testing.oracle import assert_bits_equal
from svdq_compile.testing.tensors import contiguous, move, run_script, transposed

pytest.importorskip("triton")

from svdq_kernels.expand import BLOCK_G, DTYPES, MAX_MEMBERS, divisor, expand_nvfp4, expand_weights

APPLY = pathlib.Path(__file__).with_name("apply_kernels.py")
EVERY_BYTE = torch.arange(256, dtype=torch.uint8)

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def weight(n, blocks, layout=contiguous, seed=None):
    """Codes and block scales: the bytes in turn, or random ones."""
    if seed is None:
        codes, scale = (
            EVERY_BYTE.repeat(n * size // 256 + 1)[: n * size].view(n, size) for size in (8 * blocks, blocks)
        )
    else:
        g = torch.Generator().manual_seed(seed)
        codes, scale = (torch.randint(256, (n, size), generator=g, dtype=torch.uint8) for size in (8 * blocks, blocks))
    return layout(codes), layout(scale).view(torch.float8_e4m3fn)


def every_pair():
    """Row n has every byte under scale n."""
    codes, scale = EVERY_BYTE.expand(256, 256).contiguous(), EVERY_BYTE.view(256, 1).expand(256, 32).contiguous()
    return codes, scale.view(torch.float8_e4m3fn)


def products(codes, scale):
    return codec.decode_nvfp4(codec.unpack_codes(codes), scale)


def expected(codes, scale, dtype):
    """By the specification, which rounds to e4m3 alone."""
    wide = products(codes, scale) / divisor(dtype)
    return codec.round_e4m3(wide) if dtype == torch.float8_e4m3fn else wide.to(dtype)


def assert_same(actual, wanted, where=None):
    """Equal bits; NaN is NaN, whatever its payload."""
    assert actual.is_contiguous()
    assert actual.dtype == wanted.dtype
    a, b = actual.cpu().float(), wanted.float()
    if where is not None:
        a, b = a[where], b[where]
    assert torch.equal(a.isnan(), b.isnan())
    assert_bits_equal(a.nan_to_num(0), b.nan_to_num(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_hold_every_product(dtype):
    wide = products(*every_pair())
    assert torch.equal(wide.to(dtype).float().nan_to_num(1e9), wide.nan_to_num(1e9))


def test_in_the_interpreter(tmp_path):
    weights = (
        every_pair(),
        weight(11, 13),
        weight(11, 13, transposed),
        weight(0, 13),
        weight(1, 1),
        weight(2, BLOCK_G),
    )
    cases = [(*given_weight, dtype) for given_weight in weights for dtype in DTYPES]
    for args, actual in zip(cases, run_script(APPLY, [("expand_nvfp4", args) for args in cases], tmp_path, "cpu")):
        wanted = expected(*args)
        exact = None
        if args[2] == torch.float8_e4m3fn:
            # The interpreter rounds to e4m3 in its own way.
            exact = wanted.float() == products(*args[:2]) / divisor(args[2])
        assert_same(actual, wanted, exact)


def test_several_weights_in_the_interpreter(tmp_path):
    weights = [
        weight(n, blocks, seed=seed)
        for seed, (n, blocks) in enumerate([(11, 13), (3, 5), (0, 5), (90, 13), *[(3, 4)] * 5])
    ]
    (actual,) = run_script(APPLY, [("expand_weights", (weights, torch.bfloat16))], tmp_path, "cpu")
    for own, given_weight in zip(actual, weights, strict=True):
        assert_same(own, expected(*given_weight, torch.bfloat16))


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_and_every_scale(dtype):
    assert_same(expand_nvfp4(*move(every_pair(), "cuda"), dtype), expected(*every_pair(), dtype))


WEIGHTS = st.builds(
    weight,
    st.integers(0, 70),
    st.one_of(st.integers(1, 20), st.sampled_from((BLOCK_G - 1, BLOCK_G, BLOCK_G + 1, 192))),
    st.sampled_from((contiguous, transposed)),
    st.integers(0, 2**32),
)


@gpu
@needs_gpu
@given(WEIGHTS, st.sampled_from(DTYPES))
def test_every_shape(args, dtype):
    assert_same(expand_nvfp4(*move(args, "cuda"), dtype), expected(*args, dtype))


@gpu
@needs_gpu
@given(st.lists(WEIGHTS, max_size=2 * MAX_MEMBERS), st.sampled_from(DTYPES))
def test_several_weights(weights, dtype):
    weights = [move(own, "cuda") for own in weights + weights[:3]]
    for own, actual in zip(weights, expand_weights(weights, dtype), strict=True):
        assert_bits_equal(actual, expand_nvfp4(*own, dtype))


@gpu
@needs_gpu
@given(WEIGHTS, st.sampled_from(DTYPES), st.integers(0, 70), st.integers(0, 70))
def test_rows_are_independent(args, dtype, first, last):
    codes, scale = move(args, "cuda")
    rows = slice(min(first, last), max(first, last))
    part = expand_nvfp4(codes[rows], scale.view(torch.uint8)[rows].view(scale.dtype), dtype)
    assert_bits_equal(part, expand_nvfp4(codes, scale, dtype)[rows])


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_beyond_32_bit_offsets(dtype, gpu_memory):
    n, k = 2**31 // 3072 + 2, 3072
    gpu_memory(12)
    row = torch.randint(256, (1, k // 2), dtype=torch.uint8, device="cuda")
    scale = torch.ones(n, k // 16, device="cuda").to(torch.float8_e4m3fn)
    out = expand_nvfp4(row.expand(n, -1).contiguous(), scale, dtype)
    assert_bits_equal(out[-1:], expand_nvfp4(row, scale[:1], dtype))


@pytest.mark.parametrize(
    ("codes", "scale", "dtype", "message"),
    [
        (torch.zeros(4, 16, dtype=torch.int8), torch.zeros(4, 2).to(torch.float8_e4m3fn), torch.bfloat16, "int8"),
        (torch.zeros(4, 16).byte(), torch.zeros(4, 2), torch.bfloat16, "float32"),
        (torch.zeros(4, 16).byte(), torch.zeros(4, 4).to(torch.float8_e4m3fn), torch.bfloat16, r"\(4, 4\)"),
        (torch.zeros(4, 12).byte(), torch.zeros(4, 1).to(torch.float8_e4m3fn), torch.bfloat16, r"\(4, 12\)"),
        (torch.zeros(4, 16).byte(), torch.zeros(4, 2).to(torch.float8_e4m3fn), torch.float32, "dtype torch.float32"),
    ],
)
def test_refuses(codes, scale, dtype, message):
    with pytest.raises(ValueError, match=message):
        expand_nvfp4(codes, scale, dtype)
