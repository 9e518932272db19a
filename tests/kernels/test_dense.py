"""The GEMM on dense operands, on a GPU: within the budget of float64, whatever the sizes, tiles and parts."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from svdq_compile.testing.oracle import assert_bits_equal, assert_within_budget

pytest.importorskip("triton")

from svdq_kernels import dense
from svdq_kernels.dense import multiply
from svdq_kernels.expand import expand_nvfp4

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

DTYPES = (torch.float8_e4m3fn, torch.bfloat16, torch.float16)
TOKENS = (1, 2, 15, 16, 17, 63, 64, 65, 127, 129, 255, 257, 513, 700)
FEATURES = (1, 8, 16, 63, 64, 72, 255, 256, 257, 400)
INPUTS = (16, 32, 48, 64, 112, 128, 144, 272, 528)
RANKS = (0, 16, 32, 48, 128, 256)


def make(m, n, k, dtype, rank, splits, scale, bias, seed):
    """Arguments of multiply, on the GPU; scale is ``none``, ``one`` or ``tokens``."""
    g = torch.Generator("cuda").manual_seed(seed)

    def randn(*size):
        return torch.randn(size, generator=g, device="cuda")

    lora = torch.bfloat16 if dtype == torch.float8_e4m3fn else dtype
    scale_a = {"none": None, "one": randn(1)[0].abs() + 0.1, "tokens": randn(m, 1).abs() + 0.1}[scale]
    return {
        "x_q": randn(m, k).to(dtype),
        "w_q": randn(n, k).to(dtype),
        "scale_a": scale_a,
        "scale_b": randn(1)[0].abs() / k**0.5,
        "partials": randn(splits, m, rank) if rank else None,
        "lora_up": (randn(n, rank) / rank**0.5).to(lora) if rank else None,
        "bias": randn(n).to(lora) if bias else None,
        "out_dtype": lora,
        "factor_a": 6.0,
        "factor_b": 8.0,
    }


def formula(args, wide):
    """multiply in one floating dtype, h rounded as it is for the tensor cores."""
    scale = 8.0 * args["scale_b"].to(wide)
    if args["scale_a"] is not None:
        scale = scale * 6.0 * args["scale_a"].to(wide)
    y = args["x_q"].to(wide) @ args["w_q"].to(wide).t() * scale
    if args["partials"] is not None:
        up = args["lora_up"]
        y = y + args["partials"].to(wide).sum(0).to(up.dtype).to(wide) @ up.to(wide).t()
    return y if args["bias"] is None else y + args["bias"].to(wide)


def check(args, **options):
    actual = multiply(**args, **options)
    low = formula(args, torch.float32).to(args["out_dtype"])
    assert_within_budget(actual, formula(args, torch.float64), low_precision=low)


ARGUMENTS = st.builds(
    make,
    st.sampled_from(TOKENS),
    st.sampled_from(FEATURES),
    st.sampled_from(INPUTS),
    st.sampled_from(DTYPES),
    st.sampled_from(RANKS),
    st.sampled_from((1, 2, 3, 8)),
    st.sampled_from(("none", "one", "tokens")),
    st.booleans(),
    st.integers(0, 2**32),
)


@given(ARGUMENTS)
def test_within_the_budget(args):
    check(args)


@pytest.mark.parametrize("dtype", DTYPES)
@given(ARGUMENTS, st.data())
def test_every_tile(dtype, args, data):
    if args["x_q"].dtype != dtype:
        args["x_q"], args["w_q"] = args["x_q"].to(dtype), args["w_q"].to(dtype)
    capability = torch.cuda.get_device_capability()
    check(args, config=data.draw(st.sampled_from(dense.configurations(1, 1, dtype.itemsize, capability))))


@given(ARGUMENTS)
def test_runs_are_equal(args):
    assert_bits_equal(multiply(**args), multiply(**args))


@given(ARGUMENTS, st.integers(0, 2**32))
def test_tokens_are_independent(args, seed):
    m = args["x_q"].shape[0]
    order = torch.randperm(m, generator=torch.Generator().manual_seed(seed)).cuda()
    mixed = {**args, "x_q": args["x_q"].view(torch.uint8).view(m, -1)[order].contiguous().view(args["x_q"].dtype)}
    mixed["partials"] = None if args["partials"] is None else args["partials"][:, order].contiguous()
    if args["scale_a"] is not None and args["scale_a"].numel() > 1:
        mixed["scale_a"] = args["scale_a"][order]
    assert_bits_equal(multiply(**mixed), multiply(**args)[order])


@given(ARGUMENTS)
def test_zero_lora_up_adds_nothing(args):
    if args["lora_up"] is None:
        return
    zero = {**args, "lora_up": torch.zeros_like(args["lora_up"])}
    assert_bits_equal(multiply(**zero), multiply(**{**args, "lora_up": None, "partials": None}))


@given(ARGUMENTS, st.sampled_from((-4, -1, 1, 5)))
def test_powers_of_two_scale_exactly(args, exponent):
    args = {**args, "lora_up": None, "partials": None, "bias": None, "out_dtype": torch.float32}
    scaled = multiply(**{**args, "scale_b": args["scale_b"] * 2.0**exponent})
    assert_bits_equal(scaled, multiply(**args) * 2.0**exponent)


@given(ARGUMENTS, st.integers(0, 2**16))
def test_nan_stays_in_its_token(args, where):
    clean = multiply(**args)
    m, k = args["x_q"].shape
    row = where % m
    x = args["x_q"].to(torch.float32)
    x[row, where % k] = torch.nan
    dirty = multiply(**{**args, "x_q": x.to(args["x_q"].dtype)})
    assert dirty[row].isnan().all()
    others = torch.arange(m, device="cuda") != row
    assert_bits_equal(dirty[others], clean[others])


def test_no_tokens_and_no_features():
    args = make(4, 32, 64, torch.bfloat16, 16, 2, "one", True, 0)
    none = {**args, "x_q": args["x_q"][:0], "partials": args["partials"][:, :0]}
    assert multiply(**none).shape == (0, 32)
    narrow = {**args, "w_q": args["w_q"][:0], "lora_up": args["lora_up"][:0], "bias": args["bias"][:0]}
    assert multiply(**narrow).shape == (4, 0)


@pytest.mark.parametrize(("m", "n", "k"), [(2**16, 2**15 + 16, 16), (2**15 + 1, 16, 2**16)])
def test_beyond_32_bit_offsets(m, n, k):
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GiB of free memory")
    x = torch.zeros(m, k, dtype=torch.bfloat16, device="cuda")
    x[-1] = 1
    w = torch.ones(n, k, dtype=torch.bfloat16, device="cuda")
    y = multiply(x, w, None, torch.ones((), device="cuda"), None, None, None, torch.bfloat16)
    assert (y[-1] == k).all()
    assert not y[:-1].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_and_scale_expands_exactly(dtype):
    """All 256 bytes under all 256 block scales."""
    codes = torch.arange(256, dtype=torch.uint8, device="cuda").view(1, 32, 8).expand(256, -1, -1).reshape(256, 256)
    scale = torch.arange(256, dtype=torch.uint8, device="cuda").view(256, 1).expand(-1, 32).contiguous()
    from svdq_compile.ops import codec

    bits = scale.view(torch.float8_e4m3fn)
    wide = codec.decode_nvfp4(codec.unpack_codes(codes.cpu()), bits.cpu(), torch.float32)
    expected = (wide / 8 if dtype == torch.float8_e4m3fn else wide).to(dtype).float()
    actual = expand_nvfp4(codes.contiguous(), bits, dtype).float().cpu()
    assert_bits_equal(actual.nan_to_num(nan=1e9), expected.nan_to_num(nan=1e9))


@pytest.mark.parametrize(
    "wrong",
    [
        {"w_q": torch.zeros(4, 32, dtype=torch.float16)},
        {"w_q": torch.zeros(4, 16, dtype=torch.bfloat16)},
        {"bias": torch.zeros(5)},
        {"lora_up": torch.zeros(4, 8)},
        {"scale_a": torch.zeros(3)},
    ],
)
def test_what_does_not_fit_is_refused(wrong):
    args = make(2, 4, 32, torch.bfloat16, 0, 1, "none", False, 0)
    with pytest.raises(ValueError, match=r"need|fit|come together"):
        multiply(**{**args, **wrong})
