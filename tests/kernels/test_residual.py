"""Linears of two streams in one launch, each finished as its stream's residual, against float64."""

import pathlib
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from svdq_compile.testing.oracle import assert_bits_equal, assert_within_budget
from svdq_compile.testing.ptx import CUOBJDUMP, SHARED_MEMORY_BYTES, compile_for, spills
from svdq_compile.testing.tensors import run_script

pytest.importorskip("triton")

from svdq_kernels import dense
from svdq_kernels import residual as kernels

APPLY = pathlib.Path(__file__).with_name("apply_kernels.py")
E4M3 = torch.float8_e4m3fn
FACTORS = (6.0, 8.0)


def gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")(test))


class Stream(NamedTuple):
    """Arguments of multiply_residual that one stream has."""

    x_q: torch.Tensor
    w_q: torch.Tensor
    scale_a: torch.Tensor
    scale_b: torch.Tensor
    partials: torch.Tensor | None
    lora_up: torch.Tensor | None
    bias: torch.Tensor | None
    residual: torch.Tensor
    gate: torch.Tensor
    factor_a: float = FACTORS[0]
    factor_b: float = FACTORS[1]


def run(*streams):
    return kernels.multiply_residual(*zip(*streams, strict=True))


def make(batch, tokens, n, k, dtype, rank, splits, per_token, bias, seed, device="cuda"):
    """A stream; its gates lie in rows of a wider tensor, as chunks of a modulation do."""
    g = torch.Generator(device).manual_seed(seed)

    def randn(*size):
        return torch.randn(size, generator=g, device=device)

    m = batch * tokens
    # One slice is a sum made before, in 16 bits.
    partials = randn(splits, m, rank).to(torch.float32 if splits > 1 else dtype) if rank else None
    return Stream(
        x_q=randn(m, k).to(E4M3),
        w_q=randn(n, k).to(E4M3),
        scale_a=randn(m, 1).abs() + 0.1 if per_token else randn(1)[0].abs() + 0.1,
        scale_b=(randn(1)[0].abs() + 0.1) / (k**0.5 * 48),
        partials=partials,
        lora_up=(randn(n, rank) / rank**0.5).to(dtype) if rank else None,
        bias=randn(n).to(dtype) if bias else None,
        residual=randn(m, n).to(dtype),
        gate=randn(batch, 3 * n).to(dtype)[:, n : 2 * n],
    )


def formula(stream, wide):
    """Every step in one floating dtype."""
    scale = stream.scale_a.to(wide) * stream.scale_b.to(wide) * 48
    y = (stream.x_q.to(wide) @ stream.w_q.to(wide).t()) * scale
    if stream.partials is not None:
        up = stream.lora_up
        y = y + stream.partials.to(wide).sum(0).to(up.dtype).to(wide) @ up.to(wide).t()
    if stream.bias is not None:
        y = y + stream.bias.to(wide)
    rows = stream.residual.shape[0] // stream.gate.shape[0]
    return stream.residual.to(wide) + stream.gate.to(wide).repeat_interleave(rows, 0) * y


def assert_right(outs, streams):
    for actual, stream in zip(outs, streams, strict=True):
        assert actual.dtype is stream.residual.dtype
        assert actual.is_contiguous()
        wide, low = (formula(stream, dtype) for dtype in (torch.float64, actual.dtype))
        assert_within_budget(actual, wide, low_precision=low)


KINDS = (
    # dtype, then rank, splits, per_token, bias of each stream
    (torch.bfloat16, (32, 1, False, True), (0, 1, False, True)),
    (torch.bfloat16, (0, 1, True, False), (48, 2, False, True)),
    (torch.float16, (16, 2, False, True), (32, 1, True, False)),
)
"""One compiled kernel each, tile, and pair of in_features."""

KIND = st.sampled_from(KINDS)
BATCH, COLUMNS = st.sampled_from((1, 2, 3)), st.sampled_from((16, 48, 128, 272, 640))
TOKENS = st.tuples(*2 * [st.sampled_from((1, 5, 64, 127, 129, 300, 600))])
IN_FEATURES = st.sampled_from(((48, 272), (128, 16)))


def of_kind(kind, batch, n, tokens, k, seed):
    dtype, *own = kind
    given = zip(tokens, k, own, strict=True)
    return tuple(make(batch, t, n, width, dtype, *each, seed + i) for i, (t, width, each) in enumerate(given))


ARGUMENTS = st.builds(of_kind, KIND, BATCH, COLUMNS, TOKENS, IN_FEATURES, st.integers(0, 2**32))


# With tensor descriptors, and without.
@pytest.mark.parametrize("major", [8, 9])
def test_in_the_interpreter(major, tmp_path):
    """Which multiplies float16, but bits of bfloat16."""
    shapes = [
        ((1, 150, 320, 32, 32, 1, False, True), (1, 5, 320, 64, 0, 1, False, True)),
        ((2, 3, 48, 48, 0, 1, True, False), (2, 129, 48, 16, 16, 2, False, True)),
        ((3, 43, 272, 144, 48, 2, True, True), (3, 43, 272, 16, 32, 1, False, False)),
    ]
    cases = [
        tuple(make(*own[:4], torch.float16, *own[4:], seed=i, device="cpu") for own in both)
        for i, both in enumerate(shapes)
    ]
    arguments = [("multiply_residual", tuple(zip(*case, strict=True))) for case in cases]
    for streams, outs in zip(cases, run_script(APPLY, arguments, tmp_path, "cpu", str(major)), strict=True):
        assert_right(outs, streams)


@gpu
@given(ARGUMENTS)
def test_within_the_budget_and_the_same_every_time(streams):
    outs = run(*streams)
    assert_right(outs, streams)
    for again, once in zip(run(*streams), outs, strict=True):
        assert_bits_equal(again, once)


@gpu
@given(ARGUMENTS)
def test_a_stream_does_not_meet_the_other(streams):
    """Its result is that of a launch with a stream of other values, NaN among them."""
    first, second = streams
    dirty = second._replace(residual=torch.full_like(second.residual, float("nan")))
    clean, _ = run(first, second)
    beside, spoilt = run(first, dirty)
    assert_bits_equal(beside, clean)
    assert spoilt.isnan().all()


@gpu
def test_gates_are_those_of_their_sequence():
    streams = of_kind(KINDS[0], 3, 272, (129, 40), (48, 128), 0)
    for stream, tokens in zip(streams, (129, 40), strict=True):
        stream.gate[1] = 0
        stream.gate[2, 7] = float("nan")
        out = run(*streams)[0 if tokens == 129 else 1]
        assert_bits_equal(out[tokens : 2 * tokens], stream.residual[tokens : 2 * tokens])
        assert out[2 * tokens :, 7].isnan().all()
        assert out.isnan().sum() == tokens


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_q": torch.zeros(8, 32, dtype=torch.bfloat16)}, "needs e4m3"),
        ({"w_q": torch.zeros(64, 16, dtype=torch.uint8).view(E4M3)}, "need contiguous"),
        ({"w_q": torch.zeros(48, 32, dtype=torch.uint8).view(E4M3), "bias": None}, "do not fit"),
        ({"residual": torch.zeros(8, 64)}, "one dtype"),
        ({"residual": torch.zeros(7, 64, dtype=torch.bfloat16)}, r"contiguous \(8, 64\)"),
        ({"residual": torch.zeros(64, 8, dtype=torch.bfloat16).t()}, r"contiguous \(8, 64\)"),
        ({"gate": torch.zeros(2, 64)}, "one dtype"),
        ({"gate": torch.zeros(2, 32, dtype=torch.bfloat16)}, r"\(B, 64\)"),
        ({"gate": torch.zeros(3, 64, dtype=torch.bfloat16)}, "no multiple"),
        (
            {
                "x_q": torch.zeros(0, 32, dtype=torch.uint8).view(E4M3),
                "partials": None,
                "lora_up": None,
                "residual": torch.zeros(0, 64, dtype=torch.bfloat16),
            },
            "or none",
        ),
        ({"gate": torch.zeros(64, 2, dtype=torch.bfloat16).t()}, "unit stride"),
    ],
)
@pytest.mark.parametrize("second", [False, True])
def test_refuses(change, message, second):
    right = make(2, 4, 64, 32, torch.bfloat16, 16, 2, False, True, 0, device="cpu")
    streams = [right._replace(**change), right]
    with pytest.raises(ValueError, match=message):
        run(*(streams[::-1] if second else streams))


def test_refuses_streams_of_different_widths():
    streams = (make(1, 4, n, 32, torch.bfloat16, 16, 2, False, True, 0, device="cpu") for n in (64, 48))
    with pytest.raises(ValueError, match="64 and 48 columns"):
        run(*streams)


H100 = 132
"""Its multiprocessors."""


@pytest.mark.parametrize(
    ("rows", "columns"),
    # Images of 1024 x 1024, 1328 x 1328, 768 x 768 and 512 x 512 fill waves of large tiles, 640 x 640 does not.
    [(4096 + 128, 256), (6889 + 128, 256), (2304 + 128, 256), (1024 + 128, 256), (1600 + 128, 128)],
)
def test_tiles_are_halved_where_a_wave_would_be_mostly_empty(rows, columns):
    assert kernels.configuration(rows, 3072, (9, 0), H100)["BLOCK_N"] == columns


@pytest.mark.parametrize("capability", [(8, 9), (9, 0), (12, 0)])
@given(rows=st.integers(1, 20000), columns=st.integers(1, 1200), multiprocessors=st.integers(1, 200))
def test_half_tiles_save_time(capability, rows, columns, multiprocessors):
    """By the rule's own measure, and they are tiles that other sizes take as well."""
    chosen = kernels.configuration(rows, 16 * columns, capability, multiprocessors)
    whole, *others = dense.configurations(rows, 16 * columns, 1, capability)

    def waves(tile):
        return -(-(-(-rows // tile["BLOCK_M"]) * -(-16 * columns // tile["BLOCK_N"])) // multiprocessors)

    tile = {name: value for name, value in chosen.items() if name != "PARTS"}
    assert tile == whole or (tile in others and kernels.HALF_TILE * waves(tile) < waves(whole))


def compiled_for(capability, ranks, size, in_features=3072):
    """The kernel for rows and columns."""
    constants = kernels.configuration(*size, capability, H100) | {"TMA": dense.uses_tma(capability)}
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    types = {"x": "*fp8e4nv", "w": "*fp8e4nv", "scale_a_ptr": "*fp32", "scale_b_ptr": "*fp32", "bias_ptr": "*bf16"}
    types |= dict.fromkeys(("residual_ptr", "gate_ptr", "out_ptr"), "*bf16")
    types |= {"M": "i32", "tokens": "i32", "stride_gate": "i64"}
    low_rank = {"partials_ptr": "*bf16", "up_ptr": "*bf16"}
    signature = kernels.numbered([types | (low_rank if rank else {}) for rank in ranks]) | {"N": "i32"}
    fixed = {"K": in_features, "PER_TOKEN": False, "FACTOR_A": 6.0, "FACTOR_B": 8.0, "SPLITS": 1}
    constants |= kernels.numbered([fixed | {"R": rank, "CHUNK": dense.rank_chunk(rank)} for rank in ranks])
    aligned = ["N", "stride_gate0", "stride_gate1"]
    return compile_for(capability, kernels._residual_kernel, signature, constants, **options, aligned=aligned)


@pytest.mark.parametrize("tokens", [64, 512, 4096])
def test_one_step_over_in_features_makes_no_pipeline_of_tiles(tokens):
    """Where the main loop has one step it is none, and Triton would pipeline the loop around it."""
    compiled = compiled_for((9, 0), (32, 0), (tokens, 3072), in_features=128)
    assert compiled.metadata.shared <= SHARED_MEMORY_BYTES[9, 0] // 2


SIZES = (64, 3072), (128, 3072), (300, 256), (4224, 3072), (1728, 3072)
HOPPER = [((9, 0), ranks, size) for ranks in ((32, 0), (0, 0), (64, 64)) for size in SIZES]
OTHERS = [(capability, (32, 0), SIZES[3]) for capability in ((8, 9), (12, 0))]


@pytest.mark.parametrize(("capability", "ranks", "size"), HOPPER + OTHERS)
def test_compiles_without_spills(capability, ranks, size):
    compiled = compiled_for(capability, ranks, size)
    product = "wgmma.mma_async" if capability == (9, 0) else "mma.sync"
    assert any(product in line and "e4m3" in line for line in compiled.asm["ptx"].splitlines())
    assert compiled.metadata.shared <= SHARED_MEMORY_BYTES.get(capability, SHARED_MEMORY_BYTES[12, 0])
    if CUOBJDUMP.exists() and capability == (9, 0):
        assert spills(compiled) == 0


def test_a_residual_is_read_and_written_in_whole_sectors():
    """Eight columns a thread: sums change layout on their way, what is in memory does not."""
    lines = compiled_for((9, 0), (32, 0), (4224, 3072)).asm["ptx"].splitlines()
    stores = [line for line in lines if "st.global" in line]
    assert stores
    assert all(".v4.b32" in line for line in stores)
