"""The first GEMM of one or two feed-forward layers, which writes the operands of the second ones, against float64."""

import collections
import inspect
import pathlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from svdq_compile.ops.plan import FEED_FORWARD_RANK
from svdq_compile.testing.oracle import assert_bits_equal, assert_within_budget
from svdq_compile.testing.ptx import CUOBJDUMP, SHARED_MEMORY_BYTES, compile_for, spills
from svdq_compile.testing.tensors import run_script

pytest.importorskip("triton")

from svdq_kernels import activation, dense
from svdq_kernels import feed_forward as kernels

APPLY = pathlib.Path(__file__).with_name("apply_kernels.py")
E4M3 = torch.float8_e4m3fn
FACTORS = (6.0, 8.0, 6.0)

Stream = collections.namedtuple("Stream", inspect.signature(kernels.Stream).parameters)
"""What a stream of the kernel is made of."""


def gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")(test))


def make(m, n, k, dtype, rank, next_rank, per_token, bias, smooth, seed, device="cuda"):
    """A stream; some results saturate."""
    g = torch.Generator(device).manual_seed(seed)

    def randn(*size):
        return torch.randn(size, generator=g, device=device)

    return Stream(
        x_q=randn(m, k).to(E4M3),
        w_q=randn(n, k).to(E4M3),
        scale_a=randn(m, 1).abs() + 0.1 if per_token else randn(1)[0].abs() + 0.1,
        scale_b=(randn(1)[0].abs() + 0.1) / (k**0.5 * 48),
        partials=randn(2, m, rank) if rank else None,
        lora_up=(randn(n, rank) / rank**0.5).to(dtype) if rank else None,
        bias=randn(n).to(dtype) if bias else None,
        pre_quant_scale=torch.exp2(randn(n) / 2).to(dtype) if smooth else None,
        input_scale=torch.tensor(4.0 / (6 * 448), device=device),
        lora_down=(randn(next_rank, n) / n**0.5).to(dtype) if next_rank else None,
        factor_a=FACTORS[0],
        factor_b=FACTORS[1],
        scale_factor=FACTORS[2],
    )


def one_or_two(dtype, shared, *own):
    """Streams of the same N and K."""
    return [make(m, *shared, dtype, *rest) for m, *rest in own], dtype


def run(streams, dtype):
    return kernels.multiply_gelu_quantize([kernels.Stream(*each) for each in streams], dtype)


def formula(stream, wide):
    """x_hat in units of the operand's scale, and h, with sums and GELU in one floating dtype."""
    y = (stream.x_q.to(wide) @ stream.w_q.to(wide).t()) * (stream.scale_a.to(wide) * stream.scale_b.to(wide) * 48)
    if stream.partials is not None:
        h = stream.partials.to(wide).sum(0).to(stream.lora_up.dtype).to(wide)
        y = y + h @ stream.lora_up.to(wide).t()
    if stream.bias is not None:
        y = y + stream.bias.to(wide)
    x_hat = F.gelu(y, approximate="tanh")
    if stream.pre_quant_scale is not None:
        x_hat = x_hat * stream.pre_quant_scale.to(wide)
    h = None if stream.lora_down is None else x_hat @ stream.lora_down.to(wide).t()
    return x_hat / (6 * stream.input_scale.to(wide)), h


def assert_operand_right(operand, stream, dtype):
    scaled = formula(stream, torch.float64)[0].clamp(-448, 448)
    assert operand.dtype == E4M3
    assert operand.is_contiguous()
    assert_within_budget(operand.to(dtype), scaled, low_precision=scaled.to(E4M3))


def assert_partials_right(partials, stream, dtype):
    if stream.lora_down is None:
        assert partials is None
        return
    assert partials.dtype == torch.float32
    # The tensor cores round x_hat to the model's dtype, and so does the formula in that dtype.
    low = formula(stream, dtype)[1]
    assert_within_budget(partials[0].to(dtype), formula(stream, torch.float64)[1], low_precision=low)


def assert_right(results, streams, dtype):
    for (operand, partials), stream in zip(results, streams, strict=True):
        assert operand.shape == (stream.x_q.shape[0], stream.w_q.shape[0])
        assert_operand_right(operand, stream, dtype)
        assert_partials_right(partials, stream, dtype)


def assert_same(results, expected):
    for result, other in zip(results, expected, strict=True):
        for a, b in zip(result, other, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                assert_bits_equal(a, b)


OWN = st.tuples(
    st.sampled_from((1, 5, 127, 128, 129, 600)),
    st.sampled_from((0, 16, 32, 48)),
    st.sampled_from((0, 1, 16, 32, 64)),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**32),
)
SHARED = st.tuples(st.sampled_from((16, 48, 256, 272, 528)), st.sampled_from((16, 48, 128, 272)))
DTYPES = st.sampled_from((torch.bfloat16, torch.float16))
ONE = st.builds(one_or_two, DTYPES, SHARED, OWN)
TWO = st.builds(one_or_two, DTYPES, SHARED, OWN, OWN)


# With tensor descriptors, and without.
@pytest.mark.parametrize("major", [8, 9])
def test_in_the_interpreter(major, tmp_path):
    """Which multiplies float16, but bits of bfloat16, and rounds to e4m3 in its own way, so that h is looked at."""
    shapes = [
        ((48, 32), (5, 16, 16, False, True, True)),
        ((272, 48), (129, 0, 32, True, False, True)),
        ((256, 16), (130, 32, 0, False, True, False)),
        ((528, 144), (1, 0, 1, False, False, False)),
        ((272, 48), (300, 32, 32, False, True, True), (129, 0, 0, True, True, False)),
        ((528, 32), (5, 0, 16, True, False, False), (150, 48, 32, False, True, True)),
        ((48, 16), (0, 16, 16, False, True, True), (40, 0, 16, False, True, True)),
    ]
    cases = [
        [make(m, *shared, torch.float16, *rest, seed=seed, device="cpu") for seed, (m, *rest) in enumerate(own)]
        for shared, *own in shapes
    ]
    calls = [("multiply_gelu_quantize", ([tuple(each) for each in streams], torch.float16)) for streams in cases]
    for streams, results in zip(cases, run_script(APPLY, calls, tmp_path, "cpu", str(major)), strict=True):
        for stream, (operand, partials) in zip(streams, results, strict=True):
            assert operand.shape == (stream.x_q.shape[0], stream.w_q.shape[0])
            assert_partials_right(partials, stream, torch.float16)


@gpu
@given(ONE | TWO)
def test_within_the_budget_and_the_same_every_time(given):
    results = run(*given)
    assert_right(results, *given)
    assert_same(run(*given), results)


@gpu
@given(TWO)
def test_streams_do_not_meet(given):
    """Two in one launch are the two alone where the tiles are of one size, which is the larger stream's."""
    streams, dtype = given
    together = run(streams, dtype)
    assert_same(run(streams[::-1], dtype), together[::-1])
    rows = max(stream.x_q.shape[0] for stream in streams)
    for stream, result in zip(streams, together, strict=True):
        if stream.x_q.shape[0] == rows:
            assert_same(run([stream], dtype), [result])


@gpu
@given(ONE, st.data())
def test_tokens_do_not_meet(given, data):
    """Rows in another order give the same rows in that order."""
    (stream,), dtype = given
    order = torch.tensor(data.draw(st.permutations(range(stream.x_q.shape[0]))), device="cuda")
    moved = {"x_q": stream.x_q.view(torch.uint8)[order].view(E4M3)}
    if stream.scale_a.numel() > 1:
        moved["scale_a"] = stream.scale_a[order]
    if stream.partials is not None:
        moved["partials"] = stream.partials[:, order].contiguous()
    (whole,) = run([stream], dtype)
    (permuted,) = run([stream._replace(**moved)], dtype)
    assert_bits_equal(permuted[0].view(torch.uint8), whole[0].view(torch.uint8)[order])
    if whole[1] is not None:
        assert_bits_equal(permuted[1], whole[1][:, order])


@gpu
def test_nan_stays_in_its_token():
    dtype = torch.bfloat16
    streams = [make(tokens, 272, 48, dtype, 16, 16, True, True, True, tokens) for tokens in (40, 30)]
    clean = run(streams, dtype)
    streams[0].scale_a[7] = float("nan")
    dirty = run(streams, dtype)
    assert_same(dirty[1:], clean[1:])
    others = [i for i in range(40) if i != 7]
    (operand, partials), before = dirty[0], clean[0]
    assert operand[7].float().isnan().all()
    assert partials[:, 7].isnan().all()
    assert_bits_equal(operand.view(torch.uint8)[others], before[0].view(torch.uint8)[others])
    assert_bits_equal(partials[:, others], before[1][:, others])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_q": torch.zeros(4, 32, dtype=torch.bfloat16), "w_q": torch.zeros(48, 32, dtype=torch.bfloat16)}, "e4m3"),
        ({"input_scale": torch.ones(2)}, "2 values"),
        ({"pre_quant_scale": torch.ones(32)}, r"needs \(48,\)"),
        ({"lora_down": torch.zeros(16, 32, dtype=torch.bfloat16)}, r"\(16, 32\)"),
        ({"lora_down": torch.zeros(128, 48, dtype=torch.bfloat16)}, "at most 64"),
    ],
)
def test_refuses(change, message):
    stream = make(4, 48, 32, torch.bfloat16, 16, 16, False, True, True, 0, device="cpu")
    with pytest.raises(ValueError, match=message):
        run([stream._replace(**change)], torch.bfloat16)


@pytest.mark.parametrize("widths", [(), (48, 64), (48, 48, 48)], ids=str)
def test_refuses_streams(widths):
    streams = [make(4, n, 32, torch.bfloat16, 16, 16, False, True, True, 0, device="cpu") for n in widths]
    with pytest.raises(ValueError, match="one stream, or two"):
        run(streams, torch.bfloat16)


def test_the_plan_knows_the_ranks():
    assert kernels.MAX_RANK == FEED_FORWARD_RANK


def compiled_for(capability, ranks, size, in_features=None):
    """The kernel of streams of these ranks, for results of a size; in_features are an argument, or a constant as
    Inductor makes them.
    """
    config = kernels.configuration(*size, capability)
    options = {name: config.pop(name) for name in ("num_warps", "num_stages")}
    # Two streams are for compiled code, where slices of K are summed before.
    splits, partials = (2, "*fp32") if len(ranks) == 1 else (1, "*bf16")
    streams = []
    for rank in ranks:
        # Rank 0 is a linear without smoothing, too.
        types = {"x": "*fp8e4nv", "w": "*fp8e4nv", "operand_ptr": "*fp8e4nv", "bias_ptr": "*bf16", "M": "i32"}
        types |= dict.fromkeys(("scale_a_ptr", "scale_b_ptr", "t_ptr"), "*fp32")
        types |= {"partials_ptr": partials if rank else None, "next_partials_ptr": "*fp32" if rank else None}
        types |= dict.fromkeys(("up_ptr", "s_ptr", "down_ptr"), "*bf16" if rank else None)
        constants = {"PER_TOKEN": False, "FACTOR_A": 6.0, "FACTOR_B": 8.0, "SCALE_FACTOR": 6.0, "R": rank}
        constants |= {
            "SPLITS": splits,
            "CHUNK": dense.rank_chunk(rank),
            "NEXT_R": rank,
            "NEXT_RANK": activation.padded_rank(rank),
        }
        streams.append(types | constants)
    arguments = {**kernels.numbered(streams), "N": "i32", "K": in_features or "i32", **config}
    arguments |= {"BFLOAT16": True, "TMA": dense.uses_tma(capability)}
    types = {name: value for name, value in arguments.items() if isinstance(value, str)}
    constants = {name: value for name, value in arguments.items() if name not in types}
    aligned = types.keys() & {"N", "K"}
    return compile_for(capability, kernels._gelu_quantize_kernel, types, constants, **options, aligned=aligned)


@pytest.mark.parametrize("tokens", [64, 256, 512, 4096])
@pytest.mark.parametrize("ranks", [(32,), (32, 0)], ids=str)
def test_one_step_over_in_features_makes_no_pipeline_of_tiles(tokens, ranks):
    """Where the main loop has one step it is none, and Triton would pipeline the loop around it."""
    compiled = compiled_for((9, 0), ranks, (tokens, 12288), in_features=128)
    assert compiled.metadata.shared <= SHARED_MEMORY_BYTES[9, 0] // 2


SIZES = (64, 12288), (4096, 12288), (128, 48), (256, 48), (512, 48)
CAPABILITIES = (9, 0), (10, 0), (12, 0)
ONE_STREAM = [(capability, (rank,), size) for capability in CAPABILITIES for rank in (0, 16, 32, 64) for size in SIZES]
STREAMS = [((9, 0), ranks, size) for ranks in ((32, 0), (0, 32), (32, 32), (64, 64)) for size in SIZES]
OTHERS = [(capability, (32, 0), SIZES[1]) for capability in ((8, 9), (12, 0))]


@pytest.mark.parametrize(("capability", "ranks", "size"), ONE_STREAM + STREAMS + OTHERS)
def test_compiles_without_spills(capability, ranks, size):
    compiled = compiled_for(capability, ranks, size)
    ptx = compiled.asm["ptx"]
    assert {8: "mma.sync", 9: "wgmma.mma_async", 10: "tcgen05.mma", 12: "mma.sync"}[capability[0]] in ptx
    assert "cvt.rn.satfinite.e4m3x2" in ptx
    assert compiled.metadata.shared <= SHARED_MEMORY_BYTES.get(capability, SHARED_MEMORY_BYTES[12, 0])
    if CUOBJDUMP.exists() and capability == (9, 0):
        assert spills(compiled) == 0
