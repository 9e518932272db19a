"""q, k and v of two streams, finished as heads in their places for attention, against float64."""

import math
import pathlib
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from svdq_compile.ops.plan import HEAD_DIMS
from svdq_compile.testing.oracle import assert_bits_equal, assert_within_budget
from svdq_compile.testing.ptx import CUOBJDUMP, SHARED_MEMORY_BYTES, compile_for, spills
from svdq_compile.testing.tensors import run_script

pytest.importorskip("triton")

from svdq_kernels import dense
from svdq_kernels import heads as kernels

APPLY = pathlib.Path(__file__).with_name("apply_kernels.py")
E4M3 = torch.float8_e4m3fn
FACTORS = (6.0, 8.0)
EPS = 1e-6


def gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")(test))


def make(batch, tokens, heads, head_dim, k, dtype, rank, splits, per_token, bias, norm, seed, device="cuda"):
    """A stream of random values, as stream_arguments takes it."""
    g = torch.Generator(device).manual_seed(seed)

    def randn(*size):
        return torch.randn(size, generator=g, device=device)

    m, n = batch * tokens, heads * head_dim
    angles = randn(tokens, head_dim // 2) * 3
    # One slice is a sum made before, in 16 bits.
    partials = randn(splits, m, rank).to(torch.float32 if splits > 1 else dtype) if rank else None
    return {
        "x_q": randn(m, k).to(E4M3),
        "w_q": [randn(n, k).to(E4M3) for _ in range(3)],
        "scale_a": randn(m, 1).abs() + 0.1 if per_token else randn(1)[0].abs() + 0.1,
        "scale_b": [(randn(1)[0].abs() + 0.1) / (k**0.5 * math.prod(FACTORS)) for _ in range(3)],
        "partials": partials,
        "lora_up": [(randn(n, rank) / rank**0.5).to(dtype) if rank else None for _ in range(3)],
        "bias": [randn(n).to(dtype) if bias else None for _ in range(3)],
        "norms": [(1 + randn(head_dim) / 4).to(dtype) if norm else None for _ in range(2)],
        "freqs": torch.stack((angles.cos(), angles.sin()), -1),
        "factor_a": FACTORS[0],
        "factor_b": FACTORS[1],
    }


def formula(stream, member, batch, wide):
    """One of q, k, v of the stream alone, [B, S_i, H, D], every step in one floating dtype."""
    tokens, pairs, _ = stream["freqs"].shape
    scale = stream["scale_a"].to(wide) * stream["scale_b"][member].to(wide) * math.prod(FACTORS)
    y = (stream["x_q"].to(wide) @ stream["w_q"][member].to(wide).t()) * scale
    if stream["partials"] is not None:
        up = stream["lora_up"][member]
        y = y + stream["partials"].to(wide).sum(0).to(up.dtype).to(wide) @ up.to(wide).t()
    if stream["bias"][member] is not None:
        y = y + stream["bias"][member].to(wide)
    y = y.view(batch, tokens, y.shape[1] // (2 * pairs), 2 * pairs)
    if member == 2:
        return y
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + EPS)
    if stream["norms"][member] is not None:
        y = y * stream["norms"][member].to(wide)
    cos, sin = stream["freqs"].to(wide)[:, None].unbind(-1)
    real, imaginary = y.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((real * cos - imaginary * sin, real * sin + imaginary * cos), -1).flatten(-2)


def blank(first, second, dtype):
    """Room for q, k and v, full of NaN."""
    head_dim = 2 * first["freqs"].shape[1]
    sequence = first["freqs"].shape[0] + second["freqs"].shape[0]
    batch = (len(first["x_q"]) + len(second["x_q"])) // sequence
    size = (batch, sequence, first["w_q"][0].shape[0] // head_dim, head_dim)
    return [torch.full(size, float("nan"), dtype=dtype, device=first["x_q"].device) for _ in range(3)]


def run(first, second, dtype):
    out = blank(first, second, dtype)
    kernels.multiply_heads(first, second, out, EPS)
    return out


def assert_right(out, first, second):
    for member, actual in enumerate(out):
        wide, low = (
            torch.cat([formula(stream, member, len(actual), dtype) for stream in (first, second)], 1)
            for dtype in (torch.float64, actual.dtype)
        )
        assert_within_budget(actual, wide, low_precision=low)


KINDS = (
    # head_dim, dtype, then of each stream rank, splits, per_token, bias, norm
    (128, torch.bfloat16, (0, 1, False, True, True), (32, 1, False, True, True)),
    (128, torch.bfloat16, (48, 2, True, False, True), (48, 2, True, False, True)),
    (128, torch.float16, (32, 1, False, True, False), (0, 1, True, True, True)),
    (64, torch.bfloat16, (16, 2, False, True, True), (32, 1, False, True, False)),
    (64, torch.float16, (32, 1, True, False, False), (0, 1, False, False, True)),
)
"""One compiled kernel each, and tile."""


def of_kind(kind, batch, tokens, heads, ks, seed):
    """Two streams and the dtype."""
    head_dim, dtype, *options = kind
    streams = [
        make(batch, count, heads, head_dim, k, dtype, *own, seed + i)
        for i, (count, k, own) in enumerate(zip(tokens, ks, options, strict=True))
    ]
    return *streams, dtype


def pairs(values):
    return st.tuples(st.sampled_from(values), st.sampled_from(values))


ARGUMENTS = st.builds(
    of_kind,
    st.sampled_from(KINDS),
    st.sampled_from((1, 2)),
    pairs((1, 5, 64, 127, 129, 300, 600)),
    st.sampled_from((1, 2, 3, 5)),
    pairs((16, 48, 128, 272)),
    st.integers(0, 2**32),
)


# With tensor descriptors, and without.
@pytest.mark.parametrize("major", [8, 9])
def test_in_the_interpreter(major, tmp_path):
    """Which multiplies float16, but bits of bfloat16."""
    shapes = [
        ((1, 5, 3, 64, 32, 16, 2, False, True, True), (1, 70, 3, 64, 48, 0, 1, False, True, True)),
        ((2, 129, 1, 128, 48, 0, 1, True, False, True), (2, 1, 1, 128, 48, 32, 1, True, False, False)),
        ((3, 43, 5, 128, 16, 32, 1, False, True, False), (3, 7, 5, 128, 16, 48, 2, False, False, True)),
        ((2, 1, 2, 64, 144, 48, 2, True, False, False), (2, 200, 2, 64, 16, 48, 2, False, True, True)),
        ((2, 0, 2, 64, 32, 0, 1, False, True, True), (2, 40, 2, 64, 32, 16, 2, False, True, True)),
    ]
    cases = [[make(*s[:5], torch.float16, *s[5:], seed=7, device="cpu") for s in both] for both in shapes]
    arguments = [("multiply_heads", (*streams, blank(*streams, torch.float16), EPS)) for streams in cases]
    for streams, out in zip(cases, run_script(APPLY, arguments, tmp_path, "cpu", str(major)), strict=True):
        assert_right(out, *streams)


@gpu
@given(ARGUMENTS)
def test_within_the_budget_and_the_same_every_time(args):
    out = run(*args)
    assert_right(out, *args[:2])
    for again, once in zip(run(*args), out, strict=True):
        assert_bits_equal(again, once)


@gpu
@given(ARGUMENTS, st.data())
def test_tokens_do_not_meet(args, data):
    """Rows of every sequence of a stream in another order, with their angles, give the same rows in that order."""
    first, second, dtype = args
    tokens, other = second["freqs"].shape[0], first["freqs"].shape[0]
    batch = second["x_q"].shape[0] // tokens
    order = torch.tensor(data.draw(st.permutations(range(tokens))), device="cuda")
    rows = (torch.arange(batch, device="cuda")[:, None] * tokens + order).flatten()
    moved = {"x_q": second["x_q"].view(torch.uint8)[rows].view(E4M3), "freqs": second["freqs"][order]}
    if second["scale_a"].numel() > 1:
        moved["scale_a"] = second["scale_a"][rows]
    if second["partials"] is not None:
        moved["partials"] = second["partials"][:, rows].contiguous()
    permuted = run(first, second | moved, dtype)
    order = torch.cat((torch.arange(other, device="cuda"), other + order))
    for whole, actual in zip(run(*args), permuted, strict=True):
        assert_bits_equal(actual, whole[:, order])


@gpu
@pytest.mark.parametrize("spoilt", [0, 1])
@given(ARGUMENTS)
def test_streams_do_not_meet(spoilt, args):
    """With NaN for all of one, the other one is what it was."""
    *streams, dtype = args
    clean = run(*streams, dtype)
    x_q = streams[spoilt]["x_q"].view(torch.uint8)
    tokens = [stream["freqs"].shape[0] for stream in streams]
    streams[spoilt] = streams[spoilt] | {"x_q": torch.full_like(x_q, 0x7F).view(E4M3)}
    for dirty, before in zip(run(*streams, dtype), clean, strict=True):
        parts = dirty.split(tokens, dim=1)
        assert parts[spoilt].isnan().all()
        assert_bits_equal(parts[1 - spoilt], before.split(tokens, dim=1)[1 - spoilt])


@gpu
def test_nan_stays_in_its_token_and_head():
    first = make(2, 9, 3, 128, 48, torch.bfloat16, 16, 2, False, True, True, 0)
    second = make(2, 40, 3, 128, 48, torch.bfloat16, 16, 2, False, True, True, 1)
    clean = run(first, second, torch.bfloat16)
    second["bias"][0][130] = float("nan")
    second["partials"][1, 47] = float("nan")
    q, k, v = run(first, second, torch.bfloat16)
    assert q[:, 9:, 1].isnan().all()
    for dirty, before in zip((q, k, v), clean, strict=True):
        assert dirty[1, 9 + 7].isnan().all()
        dirty[1, 9 + 7] = before[1, 9 + 7]
    q[:, 9:, 1] = clean[0][:, 9:, 1]
    for dirty, before in zip((q, k, v), clean, strict=True):
        assert_bits_equal(dirty, before)


def empty_out(*size, dtype=torch.bfloat16):
    return [torch.zeros(size, dtype=dtype)] * 3


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": [None]}, "three of each"),
        ({"x_q": torch.zeros(8, 32, dtype=torch.bfloat16)}, "needs e4m3"),
        ({"w_q": [torch.zeros(n, 32, dtype=torch.uint8).view(E4M3) for n in (128, 128, 64)]}, "do not fit"),
        ({"freqs": torch.zeros(3, 32, 2)}, r"need float32 \(4, 32, 2\)"),
        ({"norms": [torch.ones(64), torch.ones(128)]}, r"\(64,\)"),
    ],
)
def test_refuses_a_stream(which, change, message):
    streams = [make(2, 4, 2, 64, 32, torch.bfloat16, 16, 2, False, True, True, 0, device="cpu") for _ in range(2)]
    streams[which] = streams[which] | change
    with pytest.raises(ValueError, match=message):
        kernels.multiply_heads(*streams, empty_out(2, 8, 2, 64), EPS)


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (empty_out(2, 9, 2, 64), "do not fit sequences of 9"),
        (empty_out(3, 8, 2, 64), "8 rows are no 3 sequences"),
        (empty_out(2, 8, 4, 32), "head_dim in"),
        (empty_out(2, 8, 2, 64)[:2], "needs q, k and v"),
        (empty_out(2, 8, 2, 64)[:2] + empty_out(2, 8, 2, 64, dtype=torch.float32)[:1], "one shape"),
    ],
)
def test_refuses_what_streams_do_not_fill(out, message):
    stream = make(2, 4, 2, 64, 32, torch.bfloat16, 16, 2, False, True, True, 0, device="cpu")
    with pytest.raises(ValueError, match=message):
        kernels.multiply_heads(stream, stream, out, EPS)


def test_the_plan_knows_the_sizes_of_heads():
    assert kernels.HEAD_DIMS == HEAD_DIMS


def compiled_for(capability, ranks, size, head_dim=128, in_features=None):
    """The kernel for ranks of the streams, and rows and columns; in_features are an argument, or a constant as Inductor
    makes them.
    """
    constants = kernels.configuration(*size, head_dim, capability)
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    types, aligned = {"q_ptr": "*bf16", "k_ptr": "*bf16", "v_ptr": "*bf16", "N": "i32"}, ["N"]
    streams = []
    for rank in ranks:
        own = {"w": "*fp8e4nv", "scale_b_ptr": "*fp32", "bias_ptr": "*bf16"} | ({"up_ptr": "*bf16"} if rank else {})
        stream = {"x": "*fp8e4nv", **kernels.members({name: [kind] * 3 for name, kind in own.items()})}
        stream |= {"scale_a_ptr": "*fp32", "freqs_ptr": "*fp32", "norm_q_ptr": "*bf16", "norm_k_ptr": "*bf16"}
        stream |= dict.fromkeys(("M", "tokens", "K") if in_features is None else ("M", "tokens"), "i32")
        streams.append(stream | ({"partials_ptr": "*bf16"} if rank else {}))
    types |= kernels.both(*streams)
    own = [{"PER_TOKEN": False, "FACTOR_A": 6.0, "FACTOR_B": 8.0, "R": rank, "SPLITS": 1} for rank in ranks]
    own = [stream | {"CHUNK": dense.rank_chunk(stream["R"]), "K": in_features} for stream in own]
    constants |= kernels.both(*own) | {"EPS": 1e-6, "HEAD_DIM": head_dim, "TMA": dense.uses_tma(capability)}
    aligned += [name for name in ("first_K", "second_K") if name in types]
    return compile_for(capability, kernels._heads_kernel, types, constants, **options, aligned=aligned)


@pytest.mark.parametrize("tokens", [64, 512, 4096])
def test_one_step_over_in_features_makes_no_pipeline_of_tiles(tokens):
    """Where the main loop has one step it is none, and Triton would pipeline the loop around it."""
    compiled = compiled_for((9, 0), (0, 32), (tokens, 3072), in_features=128)
    assert compiled.metadata.shared <= SHARED_MEMORY_BYTES[9, 0] // 2


SIZES = (64, 3072), (128, 3072), (256, 3072), (4096, 3072), (300, 256)
HOPPER = [((9, 0), ranks, size) for ranks in ((0, 32), (64, 0)) for size in SIZES]
OTHERS = [(capability, (0, 32), SIZES[3]) for capability in ((8, 9), (12, 0))]


# Heads of 128 are those of every model of the family; of 64, small and large tiles and another instruction.
CASES = [(128, *case) for case in HOPPER + OTHERS] + [(64, *case) for case in [HOPPER[0], HOPPER[8], OTHERS[1]]]


@pytest.mark.parametrize(("head_dim", "capability", "ranks", "size"), CASES)
def test_compiles_without_spills(head_dim, capability, ranks, size):
    compiled = compiled_for(capability, ranks, size, head_dim)
    ptx = compiled.asm["ptx"]
    product = "wgmma.mma_async" if capability == (9, 0) else "mma.sync"
    assert any(product in line and "e4m3" in line for line in ptx.splitlines())
    assert compiled.metadata.shared <= SHARED_MEMORY_BYTES.get(capability, SHARED_MEMORY_BYTES[12, 0])
    if CUOBJDUMP.exists() and capability == (9, 0):
        assert spills(compiled) == 0


@pytest.mark.parametrize("head_dim", kernels.HEAD_DIMS)
def test_a_large_tile_goes_through_shared_memory_once_a_head(head_dim):
    """As 16-bit results on their way to the store; neither sums nor angles are moved between threads."""
    compiled = compiled_for((9, 0), (0, 32), (4096, 3072), head_dim)
    moved = [line for line in compiled.asm["ttgir"].splitlines() if "ttg.convert_layout" in line]
    # A tile has two sizes, a bias one.
    wide = [line for line in moved if re.search(r"tensor<\d+x\d+xf32", line) and line.count("#mma") < 2]
    assert not wide
    stored = [line for line in moved if f"tensor<128x{head_dim}xbf16" in line]
    assert len(stored) == 2 * 3 * 256 // head_dim
