"""Activations normalised and modulated as they are read: as if they had been so before."""

import pathlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from svdq_compile.testing.oracle import assert_bits_equal, assert_within_budget
from svdq_compile.testing.ptx import CUOBJDUMP, compile_for, spills
from svdq_compile.testing.tensors import run_script

pytest.importorskip("triton")

from svdq_kernels import activation
from svdq_kernels.activation import prepare
from svdq_kernels.modulation import modulate

APPLY = pathlib.Path(__file__).with_name("apply_kernels.py")


def gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")(test))


def make(m, k, dtype, rank, smooth, seed, device="cuda"):
    """x, its modulation, and the other arguments of prepare. No product or sum of theirs is rounded in float32 or x's
    dtype, so that it does not matter which of them a compiler makes one operation of.
    """
    g = torch.Generator(device).manual_seed(seed)

    def integers(low, high, *size):
        return torch.randint(low, high + 1, size, generator=g, device=device).float()

    x = integers(-8, 8, m, k).to(dtype)
    modulation = (
        integers(-2, 2, m, 1),
        2.0 ** integers(-1, 1, m, 1),
        (2.0 ** integers(0, 2, k) - 1).to(dtype),
        integers(-4, 4, k).to(dtype),
    )
    s = 2.0 ** integers(-1, 1, k) if smooth else None
    down = integers(-2, 2, rank, k).to(dtype) if rank else None
    t = torch.tensor(2.0**-6, device=device)
    return x, None if s is None else s.to(dtype), t, down, modulation


def modulated(x, modulation):
    mean, deviation, gain, shift = (part.double() for part in modulation)
    return ((x.double() - mean) * deviation * (1 + gain) + shift).to(x.dtype)


def assert_same(actual, wanted, dtype):
    """Operands and scales to the bit, and the sums of the parts of h, which are exact, as rounded to x's dtype."""
    for place, (a, b) in enumerate(zip(actual, wanted, strict=True)):
        assert (a is None) == (b is None)
        if a is not None and place == 2:
            a, b = (partials.sum(0).to(dtype) for partials in (a, b))
        if a is not None:
            assert_bits_equal(a, b)


def test_in_the_interpreter(tmp_path):
    """Which multiplies float16, but bits of bfloat16, and rounds to e4m3 in its own way."""
    cases, wanted = [], []
    for seed, (m, k, rank, smooth) in enumerate(
        [(5, 48, 16, True), (130, 272, 5, False), (1, 16, 0, True), (3, 2064, 5, True)]
    ):
        x, s, t, down, modulation = make(m, k, torch.float16, rank, smooth, seed, "cpu")
        for operand in ("plain", "nvfp4", "none")[: 3 if rank else 2]:
            cases.append(("prepare_modulated", (x, s, t, down, operand, *modulation)))
            wanted.append(("prepare", (modulated(x, modulation), s, t, down, operand)))
    results = run_script(APPLY, cases + wanted, tmp_path, "cpu")
    for actual, expected in zip(results[: len(cases)], results[len(cases) :]):
        assert_same(actual, expected, torch.float16)


@gpu
@given(
    st.builds(
        make,
        st.sampled_from((1, 5, 64, 65, 1025)),
        st.sampled_from((16, 48, 272, 1040)),
        st.sampled_from((torch.bfloat16, torch.float16)),
        st.sampled_from((0, 1, 16, 48)),
        st.booleans(),
        st.integers(0, 2**32),
    ),
    st.sampled_from(("plain", "nvfp4", "fp8")),
)
def test_as_if_it_had_been_so_before(args, operand):
    x, s, t, down, modulation = args
    actual = prepare(x, s, t, down, operand, modulation=modulation)
    assert_same(actual, prepare(modulated(x, modulation), s, t, down, operand), x.dtype)


@gpu
@pytest.mark.parametrize("m", [64, 3000])
@pytest.mark.parametrize("far", [0, 10, 100])
def test_a_mean_far_from_zero_in_deviations(m, far):
    g = torch.Generator("cuda").manual_seed(m)
    x, center, gain, shift, s, down = (
        torch.randn(size, generator=g, device="cuda") for size in ((m, 3072), (m, 1), 3072, 3072, 3072, (32, 3072))
    )
    x = (x + far * center).bfloat16()
    gain, shift, s, down = ((part / size).bfloat16() for part, size in ((gain, 3), (shift, 3), (s, 1), (down, 55)))
    variance, mean = torch.var_mean(x.double(), 1, correction=0, keepdim=True)
    modulation = (mean.float(), variance.rsqrt().float(), gain, shift)
    actual = prepare(x, s, torch.tensor(0.01, device="cuda"), down, "fp8", modulation=modulation)[2].double().sum(0)
    wide = (x.double() - mean) * variance.rsqrt() * (1 + gain.double()) + shift.double()
    low = (modulated(x, modulation) * s).float() @ down.float().t()
    assert_within_budget(actual.bfloat16(), wide * s.double() @ down.double().t(), low_precision=low.bfloat16())


@gpu
@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("modulate_first", [False, True])
def test_the_same_every_time(smooth, modulate_first):
    """Copies for the steps ahead are many here, and under way while others are multiplied."""
    x, s, t, down, modulation = make(4096, 3072, torch.bfloat16, 32, smooth, 0)
    down = torch.randn(down.shape, generator=torch.Generator("cuda").manual_seed(1), device="cuda").to(down.dtype)
    first = prepare(x, s, t, down, "fp8", modulation=modulation if modulate_first else None)
    for _ in range(500):
        again = prepare(x, s, t, down, "fp8", modulation=modulation if modulate_first else None)
        assert_bits_equal(again[0], first[0])
        assert_bits_equal(again[2], first[2])


def make_streams(sizes, dtype, ranks, smooth, moments, seed, device="cuda"):
    """Arguments of modulate; products are exact as in :func:`make`."""
    given = [make(m, k, dtype, rank, smooth, seed + i, device) for i, ((m, k), rank) in enumerate(zip(sizes, ranks))]
    return (
        [x if moments else None for x, *_ in given],
        [s for _, s, *_ in given],
        [modulation[2] for *_, modulation in given],
        [modulation[3] for *_, modulation in given],
        [down for _, _, _, down, _ in given],
        [1e-6 * (i + 1) for i in range(len(given))],
        [(128, 64, 1024, 448)[(seed + i) % 4] for i in range(len(given))],
    )


def check_streams(results, arguments):
    assert len(results) == len(arguments[0])
    for (mean, deviation, modulated_down, sums), (x, s, gain, shift, down, eps, columns) in zip(
        results, zip(*arguments, strict=True), strict=True
    ):
        assert (mean is None) == (deviation is None) == (x is None)
        if x is not None and x.numel():
            variance, wanted = torch.var_mean(x.double(), 1, correction=0)
            low_variance, low = torch.var_mean(x.float(), 1, correction=0)
            assert_within_budget(mean, wanted, low_precision=low)
            wanted, low = ((each + eps).rsqrt() for each in (variance, low_variance))
            assert_within_budget(deviation, wanted, low_precision=low)
        assert (modulated_down is None) == (sums is None) == (down is None)
        if down is not None:
            wide = down.double() * (1 if s is None else s.double())
            assert_bits_equal(modulated_down, (wide * (1 + gain.double())).to(down.dtype))
            for part, places in zip(sums, torch.arange(down.shape[1]).split(columns), strict=True):
                both = modulated_down.double(), wide * shift.double()
                assert_bits_equal(part, torch.stack([each[:, places].sum(1) for each in both]).float())


def test_moments_and_low_rank_factors_in_the_interpreter(tmp_path):
    cases = [
        make_streams(sizes, torch.float16, ranks, smooth, moments, seed, "cpu")
        for seed, (sizes, ranks, smooth, moments) in enumerate(
            [
                ([(5, 48), (3, 80)], (16, 5), True, True),
                ([(3, 48)], (0,), False, True),
                ([(2, 1040), (70, 16)], (0, 1), False, True),
                ([(2, 1040)], (7,), True, False),
                ([(0, 32), (2, 32)], (2, 0), True, True),
            ]
        )
    ]
    for case, results in zip(cases, run_script(APPLY, [("modulate", case) for case in cases], tmp_path, "cpu")):
        check_streams(results, case)


STREAM_SIZES = st.tuples(st.sampled_from((0, 1, 5, 1025)), st.sampled_from((16, 48, 1040, 3072)))


@gpu
@given(
    st.lists(st.tuples(STREAM_SIZES, st.sampled_from((0, 1, 16, 48))), min_size=1, max_size=2),
    st.sampled_from((torch.bfloat16, torch.float16)),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**32),
)
def test_moments_and_low_rank_factors(streams, dtype, smooth, moments, seed):
    sizes, ranks = zip(*streams)
    arguments = make_streams(sizes, dtype, ranks, smooth, moments, seed)
    check_streams(modulate(*arguments), arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_scale": None}, "per token"),
        ({"mean": torch.zeros(3, 1)}, "4 float32"),
        ({"deviation": torch.zeros(4, 1, dtype=torch.float16)}, "4 float32"),
        ({"gain": torch.zeros(16)}, "need 48"),
    ],
)
def test_refuses(change, message):
    x, s, t, down, modulation = make(4, 48, torch.bfloat16, 16, True, 0, "cpu")
    parts = dict(zip(("mean", "deviation", "gain", "shift"), modulation)) | {"input_scale": t} | change
    t = parts.pop("input_scale")
    with pytest.raises(ValueError, match=message):
        prepare(x, s, t, down, "fp8", modulation=tuple(parts.values()))


@pytest.mark.parametrize("operand", ["plain", "nvfp4", "fp8"])
@pytest.mark.parametrize("rank", [0, 32, 64, 128])
@pytest.mark.parametrize("m", [600, 4096])
def test_compiles_without_spills(operand, rank, m):
    constants = activation.configuration(m, 3072, rank, operand, True)
    warps = constants.pop("num_warps")
    types = dict.fromkeys(("x_ptr", "s_ptr", "gain_ptr", "shift_ptr", "down_ptr"), "*bf16")
    types |= dict.fromkeys(("t_ptr", "mean_ptr", "deviation_ptr", "sums_ptr"), "*fp32")
    types |= {"partials_ptr": "*bf16" if operand == "fp8" else "*fp32"}
    types |= {"M": "i32", "K": "i32", "R": "i32", "stride_xm": "i64", "stride_tm": "i32"}
    types |= {"operand_ptr": "*fp8e4nv" if operand == "fp8" else "*bf16"}
    constants |= {"OPERAND": operand, "SCALE_FACTOR": 6.0, "RANK": activation.padded_rank(rank), "WGMMA": True}
    compiled = compile_for((9, 0), activation._prepare_kernel, types, constants, warps, aligned=("K", "stride_xm"))
    if CUOBJDUMP.exists():
        assert spills(compiled) == 0
