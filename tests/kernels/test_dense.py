"""The GEMM on dense operands: exact where float32 is, else within the budget of float64; any sizes and parts."""

import pathlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from svdq_compile.testing.oracle import assert_bits_equal, assert_within_budget
from svdq_compile.testing.tensors import run_script

pytest.importorskip("triton")

from svdq_kernels import activation, dense
from svdq_kernels.dense import multiply

APPLY = pathlib.Path(__file__).with_name("apply_kernels.py")
DTYPES = (torch.float8_e4m3fn, torch.bfloat16, torch.float16)
TOKENS = (1, 2, 15, 16, 17, 63, 64, 65, 127, 129, 255, 257, 513, 700)
FEATURES = (1, 8, 16, 63, 64, 72, 255, 256, 257, 400)
INPUTS = (16, 32, 48, 64, 112, 128, 144, 272, 528)
RANKS = (0, 16, 32, 48, 128, 256)


def gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")(test))


def make(m, n, k, dtype, rank, splits, scale, bias, seed, device="cuda"):
    """Arguments of multiply; scale is ``none``, ``one`` or ``tokens``."""
    g = torch.Generator(device).manual_seed(seed)

    def randn(*size):
        return torch.randn(size, generator=g, device=device)

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


def make_exact(m, n, k, dtype, rank, splits, scale, bias, seed, device="cuda"):
    """The same with small integers: no sum needs more than the 13 bits that sm_90 keeps of sums of e4m3 products."""
    g = torch.Generator(device).manual_seed(seed)

    def integers(low, high, *size):
        return torch.randint(low, high + 1, size, generator=g, device=device).float()

    args = make(m, n, k, dtype, rank, splits, scale, bias, seed, device)
    lora = args["out_dtype"]
    args |= {"x_q": integers(-2, 2, m, k).to(dtype), "w_q": integers(-2, 2, n, k).to(dtype)}
    scales = {"none": None, "one": 2.0 ** integers(-1, 0), "tokens": 2.0 ** integers(-1, 0, m, 1)}
    args |= {"scale_a": scales[scale], "scale_b": torch.tensor(0.25, device=device)}
    args |= {"bias": integers(-100, 100, n).to(lora) if bias else None}
    if rank:
        args |= {"partials": integers(-4, 4, splits, m, rank), "lora_up": integers(-4, 4, n, rank).to(lora)}
    return args


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


def assert_right(actual, args):
    low = formula(args, torch.float32).to(args["out_dtype"])
    assert_within_budget(actual, formula(args, torch.float64), low_precision=low)


SIZES = (
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
ARGUMENTS = st.builds(make, *SIZES)


def rounded(args):
    """h [1, M, R] in L1's dtype."""
    h = args["partials"][0].clone()
    for part in args["partials"][1:]:
        h += part
    return h[None].to(args["lora_up"].dtype)


def before_rubbish(x_q):
    """The same operand with memory for whole tiles, NaN behind it."""
    m, k = x_q.shape
    rows = torch.full((-(-m // 128) * 128, k), float("nan"), device=x_q.device).to(x_q.dtype)
    rows[:m] = x_q
    return rows[:m]


def interpreted(make):
    """Arguments for Triton's interpreter, which multiplies float16 and e4m3, but bits of bfloat16."""
    shapes = [
        (1, 1, 16, 0, 1, "none", True),
        (130, 66, 80, 16, 2, "one", True),
        (65, 129, 272, 48, 8, "tokens", False),
        (3, 260, 144, 32, 3, "tokens", True),
        (129, 5, 32, 128, 1, "one", False),
        (70, 140, 48, 32, 1, "tokens", True),
    ]
    cases = []
    for seed, (m, n, k, *rest) in enumerate(shapes):
        for dtype in (torch.float16, torch.float8_e4m3fn):
            args = make(m, n, k, dtype, *rest, seed, device="cpu")
            if rest[0]:
                args["lora_up"] = args["lora_up"].half()
            cases.append({**args, "out_dtype": torch.float16})
    return cases


# With tensor descriptors, and without.
@pytest.mark.parametrize("major", [8, 9])
def test_in_the_interpreter(major, tmp_path):
    exact, close = interpreted(make_exact), interpreted(make)
    exact += [{**args, "partials": rounded(args)} for args in exact if args["partials"] is not None]
    exact += [{**args, "x_q": before_rubbish(args["x_q"])} for args in exact]
    cases = [("multiply", tuple(args.values())) for args in exact + close]
    results = run_script(APPLY, cases, tmp_path, "cpu", str(major))
    for args, actual in zip(exact, results):
        assert_bits_equal(actual, formula(args, torch.float64).to(torch.float16))
    for args, actual in zip(close, results[len(exact) :]):
        assert_right(actual, args)


@gpu
@given(st.builds(make_exact, *SIZES))
def test_exact_sums(args):
    assert_bits_equal(multiply(**args), formula(args, torch.float64).to(args["out_dtype"]))


@gpu
@given(st.builds(make_exact, *SIZES))
def test_rows_behind_the_operand_do_not_matter(args):
    padded = {**args, "x_q": before_rubbish(args["x_q"])}
    assert_bits_equal(multiply(**padded), formula(args, torch.float64).to(args["out_dtype"]))


def test_an_operand_has_memory_for_whole_tiles_of_every_size():
    for block_m, *_ in (*dense.HOPPER_TILES.values(), *dense.OTHER_TILES.values()):
        assert activation.ROWS % block_m == 0
    assert [activation.padded_rows(m) for m in (0, 1, 128, 129)] == [0, 128, 128, 256]


@pytest.mark.parametrize(("first", "rows"), [(0, 128), (1, 70), (58, 70)])
def test_a_descriptor_stays_inside_the_storage(first, rows):
    x_q = torch.empty(128, 16, dtype=torch.bfloat16)[first : first + 70]
    assert dense.rows_in_memory(x_q, 64) == rows


@gpu
@given(ARGUMENTS)
def test_within_the_budget_and_the_same_every_time(args):
    y = multiply(**args)
    assert_right(y, args)
    assert_bits_equal(multiply(**args), y)


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
@given(ARGUMENTS, st.data())
def test_every_tile(dtype, args, data):
    if args["x_q"].dtype != dtype:
        args["x_q"], args["w_q"] = args["x_q"].to(dtype), args["w_q"].to(dtype)
    capability = torch.cuda.get_device_capability()
    config = data.draw(st.sampled_from(dense.configurations(1, 1, dtype.itemsize, capability)))
    assert_right(multiply(**args, config=config), args)


@gpu
@given(ARGUMENTS, st.integers(0, 2**32))
def test_tokens_are_independent(args, seed):
    m = args["x_q"].shape[0]
    order = torch.randperm(m, generator=torch.Generator().manual_seed(seed)).cuda()
    mixed = {**args, "x_q": args["x_q"].view(torch.uint8).view(m, -1)[order].contiguous().view(args["x_q"].dtype)}
    mixed["partials"] = None if args["partials"] is None else args["partials"][:, order].contiguous()
    if args["scale_a"] is not None and args["scale_a"].numel() > 1:
        mixed["scale_a"] = args["scale_a"][order]
    assert_bits_equal(multiply(**mixed), multiply(**args)[order])


@gpu
@given(ARGUMENTS, st.integers(0, 2**32))
def test_features_are_independent(args, seed):
    n = args["w_q"].shape[0]
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).cuda()
    mixed = {**args, "w_q": args["w_q"].view(torch.uint8)[order].view(args["w_q"].dtype)}
    for name in ("lora_up", "bias"):
        mixed[name] = None if args[name] is None else args[name][order]
    assert_bits_equal(multiply(**mixed), multiply(**args)[:, order])


@gpu
@given(ARGUMENTS)
def test_parts_of_h_are_added_in_order_and_rounded(args):
    """h may come as the tensor cores take it; of many tokens it is summed and rounded ahead of the GEMM."""
    if args["partials"] is None:
        return
    y = multiply(**args)
    h = args["partials"][0].clone()
    for part in args["partials"][1:]:
        h += part
    assert_bits_equal(multiply(**{**args, "partials": h[None]}), y)
    assert_bits_equal(multiply(**{**args, "partials": rounded(args)}), y)


@gpu
@given(ARGUMENTS)
def test_zero_lora_up_adds_nothing(args):
    if args["lora_up"] is None:
        return
    # Without a branch in between, the product with the scales and the sum with the bias become one operation.
    args["bias"] = None
    zero = {**args, "lora_up": torch.zeros_like(args["lora_up"])}
    assert_bits_equal(multiply(**zero), multiply(**{**args, "lora_up": None, "partials": None}))


@gpu
@given(ARGUMENTS, st.sampled_from((-4, -1, 1, 5)))
def test_powers_of_two_scale_exactly(args, exponent):
    args = {**args, "lora_up": None, "partials": None, "bias": None, "out_dtype": torch.float32}
    scaled = multiply(**{**args, "scale_b": args["scale_b"] * 2.0**exponent})
    assert_bits_equal(scaled, multiply(**args) * 2.0**exponent)


@gpu
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


@gpu
@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="needs e4m3")
@pytest.mark.parametrize("k", [3072, 12288])
def test_long_sums_of_e4m3_products(k):
    """The tensor cores of sm_90 add them with 14 bits; float16 results show that, cuBLAS's too."""
    args = {**make(256, 512, k, torch.float8_e4m3fn, 0, 1, "one", False, 0), "out_dtype": torch.float16}
    scales = 6.0 * args["scale_a"], 8.0 * args["scale_b"]
    low = torch._scaled_mm(args["x_q"], args["w_q"].t(), *scales, out_dtype=torch.float16, use_fast_accum=True)
    assert_within_budget(multiply(**args), formula(args, torch.float64), low_precision=low)


@gpu
def test_output_is_fully_written(monkeypatch):
    args = make(130, 72, 80, torch.bfloat16, 16, 2, "one", True, 0)
    wanted = multiply(**args)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))
    assert_bits_equal(multiply(**args), wanted)


@gpu
def test_no_tokens_and_no_features():
    args = make(4, 32, 64, torch.bfloat16, 16, 2, "one", True, 0)
    none = {**args, "x_q": args["x_q"][:0], "partials": args["partials"][:, :0]}
    assert multiply(**none).shape == (0, 32)
    narrow = {**args, "w_q": args["w_q"][:0], "lora_up": args["lora_up"][:0], "bias": args["bias"][:0]}
    assert multiply(**narrow).shape == (4, 0)


@gpu
@pytest.mark.parametrize(("m", "n", "k"), [(2**16, 2**15 + 16, 16), (2**15 + 1, 16, 2**16)])
def test_beyond_32_bit_offsets(m, n, k, gpu_memory):
    gpu_memory(16)
    x = torch.zeros(m, k, dtype=torch.bfloat16, device="cuda")
    x[-1] = 1
    w = torch.ones(n, k, dtype=torch.bfloat16, device="cuda")
    y = multiply(x, w, None, torch.ones((), device="cuda"), None, None, None, torch.bfloat16)
    assert (y[-1] == k).all()
    assert not y[:-1].any()


@pytest.mark.parametrize(
    "wrong",
    [
        {"w_q": torch.zeros(4, 32, dtype=torch.float16)},
        {"w_q": torch.zeros(4, 16, dtype=torch.bfloat16)},
        {"bias": torch.zeros(5)},
        {"lora_up": torch.zeros(4, 8)},
        {"scale_a": torch.zeros(3)},
        {"scale_b": torch.zeros(2)},
        {"x_q": torch.zeros(4, 32, dtype=torch.bfloat16)[::2]},
        {"partials": torch.zeros(1, 3, 8), "lora_up": torch.zeros(4, 8)},
    ],
)
def test_what_does_not_fit_is_refused(wrong):
    args = make(2, 4, 32, torch.bfloat16, 0, 1, "none", False, 0, "cpu")
    with pytest.raises(ValueError, match=r"need|fit|come together"):
        multiply(**{**args, **wrong})
