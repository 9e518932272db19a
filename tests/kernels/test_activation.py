"""prepare against the specification on the CPU: operands bit for bit, down-projections within the budget."""

import pathlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from svdq_compile.ops import codec, reference
from svdq_compile.spec import E2M1_MAX, E4M3_MAX
from svdq_compile.testing.oracle import assert_bits_equal, assert_within_budget
from svdq_compile.testing.tensors import (
    FILLS,
    FINITE_FILLS,
    LAYOUTS,
    contiguous,
    move,
    normal,
    run_script,
    wide_range,
)

pytest.importorskip("triton")

from svdq_kernels import activation
from svdq_kernels.activation import prepare
from svdq_kernels.projection import sum_partials

APPLY = pathlib.Path(__file__).with_name("apply_kernels.py")
HALF_DTYPES = (torch.bfloat16, torch.float16)
DTYPES = (*HALF_DTYPES, torch.float32)
STATIC_SCALES = (1.0, 2.0**-9, 0.0123, 3e-7, 400.0)
RANKS = (1, 16, 32, 48, 128, 256)


def make(size, dtype, fill, layout, smooth, static, rank, seed):
    """x, s, t and L2 of prepare."""
    m, k = size
    g = torch.Generator().manual_seed(seed)
    x = layout(fill((m, k), g).to(dtype))
    s = (torch.rand(k, generator=g) * 2 + 0.1).to(dtype) if smooth else None
    down = (normal((rank, k), g) / k**0.5).to(dtype) if rank else None
    return x, s, torch.tensor(static) if static else None, down


def make_exact(size, dtype, rank, smooth, seed):
    """Arguments whose every product and every sum float32 holds: multiples of 1/2 below 2**18."""
    m, k = size
    g = torch.Generator().manual_seed(seed)
    x, down = (torch.randint(-b, b + 1, (rows, k), generator=g).to(dtype) for b, rows in ((8, m), (4, rank)))
    s = 2.0 ** torch.randint(-1, 2, (k,), generator=g).to(dtype) if smooth else None
    return x, s, None, down


def expected(x, s, t, operand, factor=1.0):
    """The operand and its tensor scale by the specification."""
    x_hat = reference.smooth(x, s)
    if operand == "plain":
        return x_hat, None
    if operand == "fp8":
        scale = reference.dynamic_input_scale_fp8(x_hat) if t is None else t * factor
        return reference.quantize_fp8(x_hat, scale), scale if t is None else t
    t = reference.dynamic_input_scale(x_hat) if t is None else t
    dtype = torch.bfloat16 if x.dtype == torch.float32 else x.dtype
    return codec.decode_nvfp4(*codec.quantize_nvfp4(x_hat.float(), t), dtype), t


def assert_same(actual, wanted, finite):
    """Equal bits; NaN is NaN whatever its payload, and zeros in a token that is not finite have no sign.

    Args:
        finite: bool [M, 1].
    """
    assert (wanted is None) == (actual is None)
    if wanted is None:
        return
    assert actual.dtype == wanted.dtype
    a, b = actual.cpu().float(), wanted.float()
    assert torch.equal(a.isnan(), b.isnan())
    if a.dim() == 2:
        a, b = (torch.where(~finite & (v == 0) | v.isnan(), 0, v) for v in (a, b))
    assert_bits_equal(a.nan_to_num(0), b.nan_to_num(0))


def values(operand):
    """An operand as numbers that can be indexed and compared; float8 has few operators."""
    return operand.float() if operand.dtype == torch.float8_e4m3fn else operand


def check_operand(result, x, s, t, operand, factor=1.0):
    wanted, scale = expected(x, s, t, operand, factor)
    finite = reference.smooth(x, s).isfinite().all(-1, keepdim=True)
    assert result[0].is_contiguous()
    assert_same(result[0], wanted, finite)
    assert_same(result[1], scale, finite)


def check_partials(result, x, s, down):
    """Parts of h are held to the budget of x's dtype, which L2 * s is rounded to."""
    partials = result[2]
    assert partials.is_contiguous()
    assert partials.dtype == torch.float32 or (partials.dtype == x.dtype and partials.shape[0] == 1)
    x_hat = reference.smooth(x, s)
    oracle = x_hat.double() @ down.double().t()
    assert_within_budget(partials.sum(0).to(x.dtype), oracle, low_precision=F.linear(x_hat, down))


SIZES = st.one_of(
    st.tuples(
        st.sampled_from((0, 1, 4, 5, 16, 17, 64, 65)), st.one_of(st.integers(1, 70), st.sampled_from((192, 193, 257)))
    ),
    st.tuples(st.sampled_from((1023, 1024, 1025)), st.integers(1, 70)),
).map(lambda size: (size[0], 16 * size[1]))
SEEDS = st.integers(0, 2**32)
STATIC = st.sampled_from((None, *STATIC_SCALES))

OPERANDS = ("plain", "nvfp4", "fp8")

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


# Triton's interpreter: it truncates to bfloat16, rounds to e4m3 in its own way, and multiplies bits of bfloat16, so
# what it is given is float16, or needs no rounding.


def e4m3_values(shape, g):
    """Every one is an e4m3 value, 448 among each token's."""
    x = torch.randint(0, 0x7F, shape, generator=g, dtype=torch.uint8)
    x[:, 3] = 0x7E
    return x.view(torch.float8_e4m3fn).float() * torch.where(torch.rand(shape, generator=g) < 0.5, -1, 1)


def interpreted_operands():
    cases = []
    for seed, fill in enumerate(FILLS):
        for static in (None, *STATIC_SCALES):
            layout = LAYOUTS[len(cases) % len(LAYOUTS)]
            for dtype, smooth in ((torch.float32, True), (torch.float16, True), (torch.bfloat16, False)):
                # More columns than one step takes.
                size = (3, 48) if dtype == torch.float32 else (2, 144)
                args = make(size, dtype, fill, layout, smooth, static, 0, seed)
                cases += [(*args, operand, 1.0) for operand in ("nvfp4", "plain")]
    # More than the token scale takes at once.
    cases.append((*make((1, 1040), torch.float16, wide_range, contiguous, True, None, 0, 0), "nvfp4", 1.0))
    for dtype in DTYPES:
        for static, factor in ((None, 1.0), (2.0**-3, 1.0), (2.0**-4, 2.0)):
            scale = (static or 0.25) * factor
            x = e4m3_values((17, 144), torch.Generator().manual_seed(1)) * scale
            cases.append((x.to(dtype), None, torch.tensor(static) if static else None, None, "fp8", factor))
    cases += [(*make((0, 64), torch.float16, normal, contiguous, True, None, 0, 0), name, 1.0) for name in OPERANDS]
    return cases


def test_every_operand_bit_in_the_interpreter(tmp_path):
    cases = interpreted_operands()
    for args, result in zip(cases, run_script(APPLY, [("prepare", args) for args in cases], tmp_path, "cpu")):
        x, s, t, _, operand, factor = args
        check_operand(result, x, s, t, operand, factor)


def test_down_projections_in_the_interpreter(tmp_path):
    cases, exact = [], []
    shapes = [((17, 272), 1), ((64, 48), 16), ((65, 144), 48), ((3, 32), 256), ((129, 144), 16)]
    for seed, (size, rank) in enumerate(shapes):
        smooth = seed % 2 == 0
        args = make(size, torch.float16, FINITE_FILLS[seed % 3], LAYOUTS[seed % 4], smooth, None, rank, seed)
        cases.append((*args, ("nvfp4", "plain")[seed % 2]))
        exact.append((*make_exact(size, torch.float16, rank, smooth, seed), "plain"))
    results = run_script(APPLY, [("prepare", args) for args in cases + exact], tmp_path, "cpu")
    for args, result in zip(cases, results):
        check_operand(result, *args[:3], args[4])
        check_partials(result, *args[:2], args[3])
    for (x, s, _, down, _), result in zip(exact, results[len(cases) :]):
        wanted = reference.smooth(x, s).double() @ down.double().t()
        assert_bits_equal(result[2].sum(0), wanted.to(result[2].dtype))


# On a GPU


@gpu
@needs_gpu
@pytest.mark.parametrize("operand", OPERANDS)
@given(
    st.builds(
        make,
        SIZES,
        st.sampled_from(HALF_DTYPES),
        st.sampled_from(FILLS),
        st.sampled_from(LAYOUTS),
        st.booleans(),
        STATIC,
        st.sampled_from((0, 16)),
        SEEDS,
    ),
    st.sampled_from((1.0, 6.0)),
)
def test_every_operand_bit(operand, args, factor):
    x, s, t, _ = args
    factor = factor if operand == "fp8" and t is not None else 1.0
    check_operand(prepare(*move(args, "cuda"), operand, factor), x, s, t, operand, factor)


@gpu
@needs_gpu
@given(
    st.builds(make, SIZES, st.just(torch.float32), st.sampled_from(FILLS), st.sampled_from(LAYOUTS), st.booleans(),
              STATIC, st.just(0), SEEDS),
    st.sampled_from(OPERANDS),
)  # fmt: skip
def test_every_operand_bit_of_float32(args, operand):
    check_operand(prepare(*move(args, "cuda"), operand), *args[:3], operand)


@gpu
@needs_gpu
@given(
    st.builds(
        make,
        SIZES,
        st.sampled_from(HALF_DTYPES),
        st.sampled_from(FINITE_FILLS),
        st.sampled_from(LAYOUTS),
        st.booleans(),
        st.none(),
        st.sampled_from(RANKS),
        SEEDS,
    ),
    st.sampled_from(OPERANDS),
)
def test_down_projections(args, operand):
    x, s, _, down = args
    check_partials(prepare(*move(args, "cuda"), operand), x, s, down)


@gpu
@needs_gpu
@given(st.builds(make_exact, SIZES, st.sampled_from(HALF_DTYPES), st.sampled_from(RANKS), st.booleans(), SEEDS))
def test_exact_down_projections(args):
    x, s, _, down = args
    _, _, partials = prepare(*move(args, "cuda"), "plain")
    # Nothing was rounded, so neither tiles nor the order of sums can show.
    wanted = (reference.smooth(x, s).double() @ down.double().t()).float()
    assert_bits_equal(partials.sum(0), wanted.to(partials.dtype))


ARGUMENTS = st.builds(
    make,
    SIZES,
    st.sampled_from(HALF_DTYPES),
    st.sampled_from(FINITE_FILLS),
    st.just(contiguous),
    st.just(True),
    st.sampled_from((None, 0.02)),
    st.just(32),
    SEEDS,
)
"""Few kinds of kernels, many sizes."""


@gpu
@needs_gpu
@given(ARGUMENTS, st.sampled_from(OPERANDS))
def test_runs_are_equal(args, operand):
    args = move(args, "cuda")
    first, second = prepare(*args, operand), prepare(*args, operand)
    for a, b in zip(first, second):
        assert a is b or assert_bits_equal(a, b) is None


@gpu
@needs_gpu
@given(ARGUMENTS, st.sampled_from(OPERANDS), SEEDS)
def test_tokens_are_independent(args, operand, seed):
    x, *rest = move(args, "cuda")
    order = torch.randperm(x.shape[0], generator=torch.Generator().manual_seed(seed)).cuda()
    whole, permuted = prepare(x, *rest, operand), prepare(x[order], *rest, operand)
    assert_bits_equal(values(permuted[0]), values(whole[0])[order])
    assert_bits_equal(permuted[2], whole[2][:, order])
    if whole[1] is not None and whole[1].dim() == 2:
        assert_bits_equal(permuted[1], whole[1][order])


@gpu
@needs_gpu
@given(ARGUMENTS, st.sampled_from(OPERANDS), st.sampled_from(LAYOUTS[1:]))
def test_strides_change_nothing(args, operand, layout):
    x, *rest = args
    results = [prepare(*move((layout_of_x(x), *rest), "cuda"), operand) for layout_of_x in (contiguous, layout)]
    for a, b in zip(*results):
        assert a is None or assert_bits_equal(a, b) is None


@gpu
@needs_gpu
@given(ARGUMENTS, st.sampled_from(OPERANDS))
def test_the_low_rank_branch_does_not_touch_the_operand(args, operand):
    *rest, down = move(args, "cuda")
    for a, b in zip(prepare(*rest, down, operand)[:2], prepare(*rest, None, operand)[:2]):
        assert a is None or assert_bits_equal(a, b) is None


@gpu
@needs_gpu
@given(ARGUMENTS, st.sampled_from(OPERANDS), st.floats(0, 1, exclude_max=True), st.integers(0, 15))
def test_nan_stays_in_its_token(args, operand, where, column):
    x, *rest = move(args, "cuda")
    if not x.shape[0]:
        return
    row = int(where * x.shape[0])
    dirty = x.clone()
    dirty[row, column] = torch.nan
    clean, with_nan = prepare(x, *rest, operand), prepare(dirty, *rest, operand)
    others = torch.arange(x.shape[0], device="cuda") != row
    assert_bits_equal(values(with_nan[0])[others], values(clean[0])[others])
    assert_bits_equal(with_nan[2][:, others], clean[2][:, others])
    assert with_nan[2][:, row].sum(0).isnan().all()
    dynamic = operand != "plain" and rest[1] is None
    found = values(with_nan[0])[row].isnan()
    assert found[column]
    # A dynamic scale is the whole token's, a block scale its 16 columns'.
    expected_count = x.shape[1] if dynamic else 16 if operand == "nvfp4" else 1
    assert found.sum() == expected_count
    assert not dynamic or with_nan[1][row].isnan().all()


@gpu
@needs_gpu
@given(ARGUMENTS, st.sampled_from(("nvfp4", "fp8")), st.sampled_from((-6, -1, 1, 3)))
def test_powers_of_two_move_only_the_token_scale(args, operand, exponent):
    x, s, _, down = move(args, "cuda")
    x, down = x.bfloat16(), down.bfloat16()
    q, t, partials = prepare(x, s, None, down, operand)
    scaled_q, scaled_t, scaled_partials = prepare(x * 2.0**exponent, s, None, down, operand)
    assert_bits_equal(scaled_q, q)
    zero = (x == 0).all(-1, keepdim=True)
    assert_bits_equal(scaled_t, torch.where(zero, t, t * 2.0**exponent))
    assert_bits_equal(scaled_partials, partials * 2.0**exponent)


@gpu
@needs_gpu
@given(ARGUMENTS)
def test_projections_alone_are_the_same(args):
    args = move(args, "cuda")
    config = activation.configuration(*args[0].shape, 32, "plain")
    operand, t, partials = prepare(*args, "none", config=config)
    assert operand is None
    assert t is None
    plain = prepare(*args, "plain", config=config)[2]
    assert_bits_equal(partials if plain.shape == partials.shape else sum_partials(partials, plain.dtype), plain)


@gpu
@needs_gpu
@pytest.mark.parametrize("operand", OPERANDS)
def test_many_tokens_get_the_sum_of_their_projections(operand):
    args = move(make((1024, 2048), torch.bfloat16, normal, contiguous, True, 0.02, 32, 0), "cuda")
    config = activation.configuration(1024, 2048, 32, operand)
    summed, parts = (prepare(*args, name, config=config)[2] for name in (operand, "none"))
    assert (summed.dtype, len(summed)) == (torch.bfloat16, 1)
    assert len(parts) > 1
    parts = parts.to(activation.partials_dtype(operand, torch.bfloat16))
    assert_bits_equal(summed, sum_partials(parts, torch.bfloat16))


CONFIGURATIONS = (
    {"SPLIT_K": 128, "BLOCK_M": 16, "BLOCK_K": 128, "STAGES": 1, "num_warps": 4},
    {"SPLIT_K": 256, "BLOCK_M": 64, "BLOCK_K": 64, "STAGES": 3, "num_warps": 8},
    {"SPLIT_K": 512, "BLOCK_M": 128, "BLOCK_K": 32, "STAGES": 2, "num_warps": 4},
    {"SPLIT_K": 2048, "BLOCK_M": 32, "BLOCK_K": 256, "STAGES": 2, "num_warps": 8},
)


@gpu
@needs_gpu
@pytest.mark.parametrize("operand", OPERANDS)
@pytest.mark.parametrize("config", CONFIGURATIONS)
def test_tiles_do_not_change_the_operand(config, operand):
    x, s, t, down = make((129, 1040), torch.bfloat16, wide_range, contiguous, True, None, 48, 0)
    result = prepare(*move((x, s, t, down), "cuda"), operand, config=config)
    assert result[2].shape[0] == 1
    assert prepare(*move((x, s, t, down), "cuda"), "none", config=config)[2].shape[0] == -(-1040 // config["SPLIT_K"])
    check_operand(result, x, s, t, operand)
    check_partials(result, x, s, down)


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_tokens_are_zeros_with_scale_one(dtype):
    x = torch.zeros(3, 48, dtype=dtype, device="cuda")
    x[1] = -0.0
    for operand in ("nvfp4", "fp8"):
        x_q, t, _ = prepare(x, None, None, None, operand)
        assert not x_q.float().any()
        assert_bits_equal(t, torch.ones(3, 1))


@gpu
@needs_gpu
@pytest.mark.parametrize(("operand", "largest"), [("nvfp4", E2M1_MAX * E4M3_MAX), ("fp8", E4M3_MAX)])
@pytest.mark.parametrize("value", [5000.0, torch.inf])
def test_saturates(value, operand, largest):
    sign = torch.where(torch.arange(48, device="cuda") % 3 == 0, -1.0, 1.0).expand(3, 48)
    x_q, _, _ = prepare((sign * value).bfloat16(), None, torch.tensor(1e-3, device="cuda"), None, operand)
    assert_bits_equal(x_q.float(), sign * largest)


@gpu
@needs_gpu
@pytest.mark.parametrize("operand", OPERANDS)
def test_outputs_are_fully_written(operand, monkeypatch):
    args = move(make((65, 272), torch.bfloat16, normal, contiguous, True, None, 48, 2), "cuda")
    wanted = prepare(*args, operand)
    empty = torch.empty

    def poisoned(*arguments, **options):
        tensor = empty(*arguments, **options)
        # NaN in every format.
        tensor.view(torch.uint8).fill_(0xFF)
        return tensor

    monkeypatch.setattr(torch, "empty", poisoned)
    for actual, without in zip(prepare(*args, operand), wanted):
        assert actual is None or assert_bits_equal(actual, without) is None


@gpu
@needs_gpu
@pytest.mark.parametrize("operand", OPERANDS)
def test_beyond_32_bit_offsets(operand, gpu_memory):
    m, k = 2**31 // 3072 + 2, 3072
    gpu_memory(24)
    x = torch.empty(m, k, dtype=torch.bfloat16, device="cuda").normal_()
    s = torch.full((k,), 0.7, dtype=torch.bfloat16, device="cuda")
    down = torch.randn(16, k, device="cuda").bfloat16()
    config = activation.configuration(m, k, 16, operand)
    whole = prepare(x, s, None, down, operand, config=config)
    last = prepare(x[-3:].clone(), s, None, down, operand, config=config)
    assert_bits_equal(whole[0].view(torch.uint8)[-3:], last[0].view(torch.uint8))
    parts = last[2] if whole[2].dtype == torch.float32 else sum_partials(last[2], x.dtype)
    assert_bits_equal(whole[2][:, -3:], parts)
    if operand != "plain":
        assert_bits_equal(whole[1][-3:], last[1])


@gpu
@needs_gpu
def test_nothing_is_copied_where_x_is_the_operand():
    x = torch.randn(4, 32, device="cuda").bfloat16()
    down = torch.randn(16, 32, device="cuda").bfloat16()
    operand, t, partials = prepare(x, None, torch.tensor(0.1, device="cuda"), down, "plain")
    assert operand is x
    assert t is None
    assert_bits_equal(partials, prepare(x, torch.ones_like(x[0]), None, down, "plain")[2])
    given = torch.tensor(0.1, device="cuda")
    assert prepare(x, None, given, None, "fp8")[1] is given


@gpu
@needs_gpu
def test_factors_need_not_be_contiguous():
    x, s, t, down = move(make((17, 272), torch.bfloat16, normal, contiguous, True, 0.02, 32, 0), "cuda")
    wanted = prepare(x, s, t, down, "nvfp4")
    strided = torch.stack((s, s), 1)[:, 0], t.reshape(1), down.t().contiguous().t()
    for actual, without in zip(prepare(x, *strided, "nvfp4"), wanted):
        assert_bits_equal(actual.flatten(), without.flatten())


# What it refuses


@pytest.mark.parametrize(
    ("x", "s", "t", "down", "operand", "message"),
    [
        (torch.zeros(2, 32).double(), None, None, None, "nvfp4", "float64"),
        (torch.zeros(2, 24), None, None, None, "nvfp4", "24 columns"),
        (torch.zeros(2, 32), torch.ones(2, 16), None, None, "fp8", r"\(2, 16\)"),
        (torch.zeros(2, 32), None, torch.ones(2, 1), None, "nvfp4", "2 values"),
        (torch.zeros(2, 32), None, torch.ones(()).bfloat16(), None, "nvfp4", "bfloat16"),
        (torch.zeros(2, 32), None, None, None, "int8", "operand='int8'"),
        (torch.zeros(2, 32), None, None, torch.zeros(4, 32), "plain", "float32 without lora_down"),
        (torch.zeros(2, 32).half(), None, None, torch.zeros(4, 16).half(), "plain", r"\(4, 16\)"),
        (torch.zeros(2, 32).half(), None, None, torch.zeros(4, 32), "plain", "lora_down is torch.float32"),
    ],
)
def test_refuses(x, s, t, down, operand, message):
    with pytest.raises(ValueError, match=message):
        prepare(x, s, t, down, operand)
