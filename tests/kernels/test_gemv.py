"""The linear of a few tokens on the packed weight: exact where float32 is, else within the budget of float64."""

import pathlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from svdq_compile.ops.codec import decode_nvfp4, unpack_codes
from svdq_compile.testing.oracle import assert_bits_equal, assert_within_budget
from svdq_compile.testing.tensors import run_script

pytest.importorskip("triton")

from svdq_kernels import gemv
from svdq_kernels.gemv import MAX_TOKENS, multiply_few

APPLY = pathlib.Path(__file__).with_name("apply_kernels.py")
TOKENS = (1, 2, 7, 8, 9, 15, MAX_TOKENS, 17, 40)
FEATURES = (1, 8, 16, 17, 40, 130)
INPUTS = (16, 48, 80, 128, 272, 512, 1040, 2048)
RANKS = (0, 5, 16, 32, 256)


def gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")(test))


def make(m, n, k, dtype, rank, scale, bias, seed, device="cuda", exact=False):
    """Arguments of multiply_few; scale is ``none``, ``one`` or ``tokens``. All codes, and block scales of all e4m3
    magnitudes. If exact, small integers and powers of two, so that no sum is rounded.
    """
    g = torch.Generator(device).manual_seed(seed)

    def randn(*size):
        value = torch.randn(size, generator=g, device=device)
        return (value * 2).round().clamp(-4, 4) if exact else value

    codes = torch.randint(0, 256, (n, k // 2), generator=g, device=device, dtype=torch.uint8)
    low, high = (0x30, 0x40) if exact else (0, 0x7F)
    bits = torch.randint(low, high, (n, k // 16), generator=g, device=device, dtype=torch.uint8)
    if exact:
        bits &= 0x78
    span = 1.0 if exact else 300 * k**0.5
    scale_a = {"none": None, "one": randn(1)[0].abs() + 1, "tokens": randn(m, 1).abs() + 1}[scale]
    return {
        "x": randn(m, k).to(dtype),
        "qweight": codes,
        "weight_scale": bits.view(torch.float8_e4m3fn),
        "scale_a": scale_a,
        "scale_b": torch.tensor(0.25 / span, device=device),
        "partials": randn(1, m, rank) if rank else None,
        "lora_up": (randn(n, rank) if exact else randn(n, rank) / rank**0.5).to(dtype) if rank else None,
        "bias": randn(n).to(dtype) if bias else None,
    }


def formula(args, wide):
    """multiply_few in one floating dtype, h rounded as it is for the tensor cores."""
    weight = decode_nvfp4(unpack_codes(args["qweight"]), args["weight_scale"], torch.float32).to(wide)
    scale = args["scale_b"].to(wide)
    if args["scale_a"] is not None:
        scale = scale * args["scale_a"].to(wide)
    y = args["x"].to(wide) @ weight.t() * scale
    if args["partials"] is not None:
        up = args["lora_up"]
        y = y + args["partials"].to(wide).sum(0).to(up.dtype).to(wide) @ up.to(wide).t()
    return y if args["bias"] is None else y + args["bias"].to(wide)


def assert_right(actual, args):
    low = formula(args, torch.float32).to(args["x"].dtype)
    assert_within_budget(actual, formula(args, torch.float64), low_precision=low)


SIZES = (
    st.sampled_from(TOKENS),
    st.sampled_from(FEATURES),
    st.sampled_from(INPUTS),
    st.sampled_from((torch.bfloat16, torch.float16)),
    st.sampled_from(RANKS),
    st.sampled_from(("none", "one", "tokens")),
    st.booleans(),
    st.integers(0, 2**32),
)
ARGUMENTS = st.builds(make, *SIZES)

# Sizes on both sides of a tile and a step; the interpreter multiplies float16, but bits of bfloat16.
INTERPRETED = [
    (1, 1, 16, 0, "none", False),
    (8, 17, 512, 16, "one", True),
    (9, 40, 1040, 5, "tokens", True),
    (40, 16, 272, 32, "none", False),
]


def test_in_the_interpreter(tmp_path):
    both = [
        [make(m, n, k, torch.float16, *rest, seed, "cpu", exact) for seed, (m, n, k, *rest) in enumerate(INTERPRETED)]
        for exact in (True, False)
    ]
    cases = [("multiply_few", tuple(args.values())) for args in both[0] + both[1]]
    results = run_script(APPLY, cases, tmp_path, "cpu")
    for args, actual in zip(both[0], results):
        assert_bits_equal(actual, formula(args, torch.float64).half())
    for args, actual in zip(both[1], results[len(both[0]) :]):
        assert_right(actual, args)


def test_every_code_at_every_place_is_its_value(tmp_path):
    codes = torch.arange(16).repeat(8, 16)
    codes[4:] = codes[4:].reshape(4, 16, 16).transpose(1, 2).flatten(1)
    words = (codes << 4 * torch.arange(8)[:, None]).sum(0).to(torch.uint32).view(torch.int32)
    dtypes = {torch.bfloat16: 2.0**126, torch.float16: 2.0**14}
    results = run_script(APPLY, [("pair_bits", (words, dtype)) for dtype in dtypes], tmp_path, "cpu")
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])[codes & 7] * (1 - 2 * (codes >> 3))
    for (dtype, factor), bits in zip(dtypes.items(), results, strict=True):
        pairs = bits.view(dtype).reshape(4, -1, 2).double() * factor
        assert torch.equal(pairs[..., 0], values[:4].double())
        assert torch.equal(pairs[..., 1], values[4:].double())


@gpu
@given(st.builds(make, *SIZES, exact=st.just(True)))
def test_exact_sums(args):
    assert_bits_equal(multiply_few(**args), formula(args, torch.float64).to(args["x"].dtype))


@gpu
@given(ARGUMENTS)
def test_within_the_budget_and_the_same_every_time(args):
    y = multiply_few(**args)
    assert_right(y, args)
    assert_bits_equal(multiply_few(**args), y)


@gpu
@given(ARGUMENTS, st.integers(0, 2**32))
def test_tokens_are_independent(args, seed):
    order = torch.randperm(args["x"].shape[0], generator=torch.Generator().manual_seed(seed)).cuda()
    shuffled = args | {"x": args["x"][order]}
    if args["partials"] is not None:
        shuffled["partials"] = args["partials"][:, order].contiguous()
    if args["scale_a"] is not None and args["scale_a"].dim():
        shuffled["scale_a"] = args["scale_a"][order]
    assert_bits_equal(multiply_few(**shuffled), multiply_few(**args)[order])


@gpu
@pytest.mark.parametrize("block_m", [8, 16])
@pytest.mark.parametrize("block_n", [16, 32])
@pytest.mark.parametrize(("unroll", "warps"), [(1, 4), (2, 4), (1, 8)])
def test_every_tile(block_m, block_n, unroll, warps):
    args = make(13, 70, 1040, torch.bfloat16, 16, "tokens", True, 0)
    config = {"BLOCK_M": block_m, "BLOCK_N": block_n, "UNROLL": unroll, "WARPS": warps, "EVEN_K": False}
    assert_right(multiply_few(**args, config=config | {"num_warps": warps}), args)


@gpu
def test_a_block_scale_that_is_nan_reaches_its_row_alone():
    args = make(3, 40, 272, torch.bfloat16, 0, "none", False, 0)
    clean = multiply_few(**args)
    args["weight_scale"].view(torch.uint8)[7, 2] = 0x7F
    dirty = multiply_few(**args)
    assert dirty[:, 7].isnan().all()
    others = torch.arange(40, device="cuda") != 7
    assert_bits_equal(dirty[:, others], clean[:, others])


@pytest.mark.parametrize("n", [1, 3072, 18432])
@pytest.mark.parametrize("k", [16, 272, 3072, 12288])
@pytest.mark.parametrize("m", [1, 8, 9, MAX_TOKENS, 100])
def test_configurations_fit_the_kernel(m, n, k):
    config = gemv.configuration(m, n, k)
    assert config["BLOCK_M"] % 8 == 0
    assert config["BLOCK_N"] % 16 == 0
    assert config["num_warps"] == config["WARPS"]
    assert config["EVEN_K"] == (k % (128 * config["UNROLL"] * config["WARPS"]) == 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 32)}, "float32"),
        ({"x": torch.zeros(32, 2).half().t()}, "contiguous"),
        ({"x": torch.zeros(2, 48).half()}, "48 columns"),
        ({"bias": torch.zeros(3)}, "bias"),
        ({"lora_up": torch.zeros(4, 16).half()}, "come together"),
        ({"lora_up": torch.zeros(4, 16).half(), "partials": torch.zeros(3, 2, 16)}, "sum"),
    ],
)
def test_refuses(change, message):
    args = make(2, 4, 32, torch.float16, 0, "none", False, 0, "cpu")
    with pytest.raises(ValueError, match=message):
        multiply_few(**args | change)
