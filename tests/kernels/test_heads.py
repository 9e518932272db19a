"""q, k and v of a stream, finished as heads in their places for attention, against float64."""

import pathlib

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
BEFORE, AFTER = 3, 2
"""Rows of the other stream around ours."""


def gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")(test))


def make(batch, tokens, heads, head_dim, k, dtype, rank, splits, per_token, bias, norm, seed, device="cuda"):
    """Arguments of multiply_heads, by their names; out is full of NaN."""
    g = torch.Generator(device).manual_seed(seed)

    def randn(*size):
        return torch.randn(size, generator=g, device=device)

    m, n = batch * tokens, heads * head_dim
    angles = randn(tokens, head_dim // 2) * 3
    size = (batch, BEFORE + tokens + AFTER, heads, head_dim)
    # One slice is a sum made before, in 16 bits.
    partials = randn(splits, m, rank).to(torch.float32 if splits > 1 else dtype) if rank else None
    return {
        "x_q": randn(m, k).to(E4M3),
        "w_q": [randn(n, k).to(E4M3) for _ in range(3)],
        "scale_a": randn(m, 1).abs() + 0.1 if per_token else randn(1)[0].abs() + 0.1,
        "scale_b": [(randn(1)[0].abs() + 0.1) / (k**0.5 * 48) for _ in range(3)],
        "partials": partials,
        "lora_up": [(randn(n, rank) / rank**0.5).to(dtype) if rank else None for _ in range(3)],
        "bias": [randn(n).to(dtype) if bias else None for _ in range(3)],
        "norms": [(1 + randn(head_dim) / 4).to(dtype) if norm else None for _ in range(2)],
        "freqs": torch.stack((angles.cos(), angles.sin()), -1),
        "out": [torch.full(size, float("nan"), dtype=dtype, device=device) for _ in range(3)],
        "first": BEFORE,
        "eps": 1e-6,
        "factor_a": FACTORS[0],
        "factor_b": FACTORS[1],
    }


def formula(args, member, wide):
    """One of q, k, v of the stream alone, [B, S_i, H, D], every step in one floating dtype."""
    head_dim, tokens = args["out"][0].shape[3], args["freqs"].shape[0]
    scale = args["scale_a"].to(wide) * args["scale_b"][member].to(wide) * 48
    y = (args["x_q"].to(wide) @ args["w_q"][member].to(wide).t()) * scale
    if args["partials"] is not None:
        up = args["lora_up"][member]
        y = y + args["partials"].to(wide).sum(0).to(up.dtype).to(wide) @ up.to(wide).t()
    if args["bias"][member] is not None:
        y = y + args["bias"][member].to(wide)
    y = y.view(-1, tokens, y.shape[1] // head_dim, head_dim)
    if member == 2:
        return y
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + args["eps"])
    if args["norms"][member] is not None:
        y = y * args["norms"][member].to(wide)
    cos, sin = args["freqs"].to(wide)[:, None].unbind(-1)
    real, imaginary = y.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((real * cos - imaginary * sin, real * sin + imaginary * cos), -1).flatten(-2)


def run(args):
    """q, k and v with the rows around them."""
    out = [torch.full_like(each, float("nan")) for each in args["out"]]
    kernels.multiply_heads(**args | {"out": out})
    return out


def ours(tensor):
    return tensor[:, BEFORE:-AFTER]


def assert_right(out, args):
    for member, actual in enumerate(out):
        assert actual[:, :BEFORE].isnan().all()
        assert actual[:, -AFTER:].isnan().all()
        wide, low = (formula(args, member, dtype) for dtype in (torch.float64, actual.dtype))
        assert_within_budget(ours(actual), wide, low_precision=low)


KINDS = (
    # head_dim, dtype, rank, splits, per_token, bias, norm
    (128, torch.bfloat16, 32, 1, False, True, True),
    (128, torch.bfloat16, 48, 2, True, False, True),
    (128, torch.float16, 0, 1, False, True, False),
    (64, torch.bfloat16, 16, 2, False, True, True),
    (64, torch.float16, 32, 1, True, False, False),
)
"""One compiled kernel each, and tile."""


def of_kind(kind, batch, tokens, heads, k, seed):
    return make(batch, tokens, heads, kind[0], k, *kind[1:], seed)


ARGUMENTS = st.builds(
    of_kind,
    st.sampled_from(KINDS),
    st.sampled_from((1, 2)),
    st.sampled_from((1, 5, 64, 127, 129, 300, 600)),
    st.sampled_from((1, 2, 3, 5)),
    st.sampled_from((16, 48, 128, 272)),
    st.integers(0, 2**32),
)


# With tensor descriptors, and without.
@pytest.mark.parametrize("major", [8, 9])
def test_in_the_interpreter(major, tmp_path):
    """Which multiplies float16, but bits of bfloat16."""
    shapes = [
        (1, 5, 3, 64, 32, 16, 2, False, True, True),
        (2, 129, 1, 128, 48, 0, 1, True, False, True),
        (3, 43, 5, 128, 16, 32, 1, False, True, False),
        (2, 1, 2, 64, 144, 48, 2, True, False, False),
    ]
    cases = [make(*s[:5], torch.float16, *s[5:], seed=i, device="cpu") for i, s in enumerate(shapes)]
    arguments = [("multiply_heads", tuple(args.values())) for args in cases]
    for args, out in zip(cases, run_script(APPLY, arguments, tmp_path, "cpu", str(major)), strict=True):
        assert_right(out, args)


@gpu
@given(ARGUMENTS)
def test_within_the_budget_and_the_same_every_time(args):
    out = run(args)
    assert_right(out, args)
    for again, once in zip(run(args), out, strict=True):
        assert_bits_equal(again, once)


@gpu
@given(ARGUMENTS, st.data())
def test_tokens_do_not_meet(args, data):
    """Rows of every sequence in another order, with their angles, give the same rows in that order."""
    batch, tokens = args["out"][0].shape[0], args["freqs"].shape[0]
    order = torch.tensor(data.draw(st.permutations(range(tokens))), device="cuda")
    rows = (torch.arange(batch, device="cuda")[:, None] * tokens + order).flatten()
    moved = args | {"x_q": args["x_q"].view(torch.uint8)[rows].view(E4M3), "freqs": args["freqs"][order]}
    if args["scale_a"].numel() > 1:
        moved["scale_a"] = args["scale_a"][rows]
    if args["partials"] is not None:
        moved["partials"] = args["partials"][:, rows].contiguous()
    for whole, permuted in zip(run(args), run(moved), strict=True):
        assert_bits_equal(ours(permuted), ours(whole)[:, order])


@gpu
def test_nan_stays_in_its_token_and_head():
    args = make(2, 40, 3, 128, 48, torch.bfloat16, 16, 2, False, True, True, 0)
    clean = run(args)
    args["bias"][0][130] = float("nan")
    args["partials"][1, 47] = float("nan")
    q, k, v = (ours(each) for each in run(args))
    assert q[:, :, 1].isnan().all()
    for dirty, before in zip((q, k, v), clean, strict=True):
        assert dirty[1, 7].isnan().all()
        dirty[1, 7] = ours(before)[1, 7]
    q[:, :, 1] = ours(clean[0])[:, :, 1]
    for dirty, before in zip((q, k, v), clean, strict=True):
        assert_bits_equal(dirty, ours(before))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": [None]}, "three of each"),
        ({"x_q": torch.zeros(8, 32, dtype=torch.bfloat16)}, "needs e4m3"),
        ({"w_q": [torch.zeros(n, 32, dtype=torch.uint8).view(E4M3) for n in (128, 128, 64)]}, "do not fit"),
        ({"freqs": torch.zeros(3, 32, 2)}, r"need float32 \(4, 32, 2\)"),
        ({"norms": [torch.ones(64), torch.ones(128)]}, r"\(64,\)"),
        ({"first": 6}, "do not fit 2 sequences of 9"),
        ({"out": [torch.zeros(2, 9, 4, 32, dtype=torch.bfloat16)] * 3}, "head_dim in"),
        ({"out": [torch.zeros(2, 9, 2, 64, dtype=torch.bfloat16)] * 2 + [torch.zeros(2, 9, 2, 64)]}, "one shape"),
    ],
)
def test_refuses(change, message):
    args = make(2, 4, 2, 64, 32, torch.bfloat16, 16, 2, False, True, True, 0, device="cpu")
    with pytest.raises(ValueError, match=message):
        kernels.multiply_heads(**args | change)


def test_the_plan_knows_the_sizes_of_heads():
    assert kernels.HEAD_DIMS == HEAD_DIMS


def compiled_for(capability, rank, size, head_dim=128, in_features=None):
    """The kernel for rows and columns; in_features are an argument, or a constant as Inductor makes them."""
    constants = kernels.configuration(*size, head_dim, capability)
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    own = {"w": "*fp8e4nv", "scale_b_ptr": "*fp32", "bias_ptr": "*bf16"} | ({"up_ptr": "*bf16"} if rank else {})
    types = {"x": "*fp8e4nv", **kernels.members({name: [kind] * 3 for name, kind in own.items()})}
    types |= {"scale_a_ptr": "*fp32", "freqs_ptr": "*fp32", "norm_q_ptr": "*bf16", "norm_k_ptr": "*bf16"}
    types |= {"q_ptr": "*bf16", "k_ptr": "*bf16", "v_ptr": "*bf16"} | ({"partials_ptr": "*bf16"} if rank else {})
    types |= dict.fromkeys(("M", "N", "K", "tokens", "first", "sequence"), "i32")
    types |= {"stride_xm": "i64", "stride_wn": "i64"}
    constants |= {"PER_TOKEN": False, "FACTOR_A": 6.0, "FACTOR_B": 8.0, "EPS": 1e-6, "HEAD_DIM": head_dim, "R": rank}
    constants |= {"SPLITS": 1, "CHUNK": dense.rank_chunk(rank), "TMA": dense.uses_tma(capability)}
    aligned = ["N", "K", "stride_xm", "stride_wn"]
    if in_features is not None:
        del types["K"]
        aligned.remove("K")
        constants["K"] = in_features
    return compile_for(capability, kernels._heads_kernel, types, constants, **options, aligned=aligned)


@pytest.mark.parametrize("tokens", [64, 512, 4096])
def test_one_step_over_in_features_makes_no_pipeline_of_tiles(tokens):
    """Where the main loop has one step it is none, and Triton would pipeline the loop around it."""
    compiled = compiled_for((9, 0), 32, (tokens, 3072), in_features=128)
    assert compiled.metadata.shared <= SHARED_MEMORY_BYTES[9, 0] // 2


SIZES = (64, 3072), (128, 3072), (4096, 3072), (300, 256)
HOPPER = [((9, 0), rank, size) for rank in (0, 32, 64) for size in SIZES]
OTHERS = [(capability, 32, SIZES[2]) for capability in ((8, 9), (12, 0))]


@pytest.mark.parametrize(("capability", "rank", "size"), HOPPER + OTHERS)
@pytest.mark.parametrize("head_dim", kernels.HEAD_DIMS)
def test_compiles_without_spills(capability, rank, size, head_dim):
    compiled = compiled_for(capability, rank, size, head_dim)
    ptx = compiled.asm["ptx"]
    product = "wgmma.mma_async" if capability == (9, 0) else "mma.sync"
    assert any(product in line and "e4m3" in line for line in ptx.splitlines())
    assert compiled.metadata.shared <= SHARED_MEMORY_BYTES.get(capability, SHARED_MEMORY_BYTES[12, 0])
    if CUOBJDUMP.exists() and capability == (9, 0):
        assert spills(compiled) == 0


@pytest.mark.parametrize("head_dim", kernels.HEAD_DIMS)
def test_a_large_tile_goes_through_shared_memory_once_a_head(head_dim):
    """As 16-bit results on their way to the store; neither sums nor angles are moved between threads."""
    compiled = compiled_for((9, 0), 32, (4096, 3072), head_dim)
    moved = [line for line in compiled.asm["ttgir"].splitlines() if "ttg.convert_layout" in line]
    wide = [line for line in moved if "xf32" in line and line.count("#mma") < 2]
    assert not wide
    stored = [line for line in moved if f"tensor<128x{head_dim}xbf16" in line]
    assert len(stored) == 3 * 256 // head_dim
