"""The first GEMM of a feed-forward layer, which writes the operand of the second, against float64."""

import pathlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from svdq_compile.testing.oracle import assert_bits_equal, assert_within_budget
from svdq_compile.testing.ptx import CUOBJDUMP, SHARED_MEMORY_BYTES, compile_for, spills
from svdq_compile.testing.tensors import run_script

pytest.importorskip("triton")

from svdq_kernels import activation, dense
from svdq_kernels import feed_forward as kernels

APPLY = pathlib.Path(__file__).with_name("apply_kernels.py")
E4M3 = torch.float8_e4m3fn
FACTORS = (6.0, 8.0, 6.0)


def gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")(test))


def make(m, n, k, dtype, rank, next_rank, per_token, bias, smooth, seed, device="cuda"):
    """Arguments of multiply_gelu_quantize, by their names; some results saturate."""
    g = torch.Generator(device).manual_seed(seed)

    def randn(*size):
        return torch.randn(size, generator=g, device=device)

    return {
        "x_q": randn(m, k).to(E4M3),
        "w_q": randn(n, k).to(E4M3),
        "scale_a": randn(m, 1).abs() + 0.1 if per_token else randn(1)[0].abs() + 0.1,
        "scale_b": (randn(1)[0].abs() + 0.1) / (k**0.5 * 48),
        "partials": randn(2, m, rank) if rank else None,
        "lora_up": (randn(n, rank) / rank**0.5).to(dtype) if rank else None,
        "bias": randn(n).to(dtype) if bias else None,
        "pre_quant_scale": torch.exp2(randn(n) / 2).to(dtype) if smooth else None,
        "input_scale": torch.tensor(4.0 / (6 * 448), device=device),
        "lora_down": (randn(next_rank, n) / n**0.5).to(dtype) if next_rank else None,
        "dtype": dtype,
        "factor_a": FACTORS[0],
        "factor_b": FACTORS[1],
        "scale_factor": FACTORS[2],
    }


def formula(args, wide):
    """x_hat in units of the operand's scale, and h, with sums and GELU in one floating dtype."""
    y = (args["x_q"].to(wide) @ args["w_q"].to(wide).t()) * (args["scale_a"].to(wide) * args["scale_b"].to(wide) * 48)
    if args["partials"] is not None:
        h = args["partials"].to(wide).sum(0).to(args["lora_up"].dtype).to(wide)
        y = y + h @ args["lora_up"].to(wide).t()
    if args["bias"] is not None:
        y = y + args["bias"].to(wide)
    x_hat = F.gelu(y, approximate="tanh")
    if args["pre_quant_scale"] is not None:
        x_hat = x_hat * args["pre_quant_scale"].to(wide)
    h = None if args["lora_down"] is None else x_hat @ args["lora_down"].to(wide).t()
    return x_hat / (6 * args["input_scale"].to(wide)), h


def assert_operand_right(operand, args):
    scaled = formula(args, torch.float64)[0].clamp(-448, 448)
    assert operand.dtype == E4M3
    assert operand.is_contiguous()
    assert_within_budget(operand.to(args["dtype"]), scaled, low_precision=scaled.to(E4M3))


def assert_partials_right(partials, args):
    if args["lora_down"] is None:
        assert partials is None
        return
    assert partials.dtype == args["dtype"]
    # The tensor cores round x_hat to the model's dtype, and so does the formula in that dtype.
    low = formula(args, args["dtype"])[1]
    assert_within_budget(partials[0], formula(args, torch.float64)[1], low_precision=low)


SIZES = (
    st.sampled_from((1, 5, 127, 128, 129, 600)),
    st.sampled_from((16, 48, 256, 272, 528)),
    st.sampled_from((16, 48, 128, 272)),
    st.sampled_from((torch.bfloat16, torch.float16)),
    st.sampled_from((0, 16, 32, 48)),
    st.sampled_from((0, 1, 16, 32, 64)),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**32),
)
ARGUMENTS = st.builds(make, *SIZES)


# With tensor descriptors, and without.
@pytest.mark.parametrize("major", [8, 9])
def test_in_the_interpreter(major, tmp_path):
    """Which multiplies float16, but bits of bfloat16, and rounds to e4m3 in its own way, so that h is looked at."""
    shapes = [
        (5, 48, 32, 16, 16, False, True, True),
        (129, 272, 48, 0, 32, True, False, True),
        (130, 256, 16, 32, 0, False, True, False),
        (1, 528, 144, 0, 1, False, False, False),
    ]
    cases = [make(*s[:3], torch.float16, *s[3:], seed=i, device="cpu") for i, s in enumerate(shapes)]
    arguments = [("multiply_gelu_quantize", tuple(args.values())) for args in cases]
    for args, (operand, partials) in zip(cases, run_script(APPLY, arguments, tmp_path, "cpu", str(major))):
        assert operand.shape == (args["x_q"].shape[0], args["w_q"].shape[0])
        assert_partials_right(partials, args)


def partials(m, rank, seed, device="cuda"):
    g = torch.Generator(device).manual_seed(seed)
    return torch.randn(48, m, rank, generator=g, device=device).half()


@pytest.mark.parametrize(("m", "tokens"), [(5, 70), (130, 70), (130, 1500), (0, 70)])
def test_a_sum_beside_in_the_interpreter(m, tokens, tmp_path):
    """A kernel whose programs are all busy in the last round, or not; more than idle ones take; and none at all."""
    args, parts = make(m, 272, 48, torch.float16, 16, 16, False, True, True, 0, "cpu"), partials(tokens, 33, 1, "cpu")
    h = torch.full((1, tokens, 33), torch.nan, dtype=torch.float16)
    calls = [
        ("multiply_gelu_quantize_beside", (parts, h, *args.values())),
        ("multiply_gelu_quantize", tuple(args.values())),
    ]
    (*beside, h), alone = run_script(APPLY, calls, tmp_path, "cpu")
    assert_bits_equal(h[0], sum_in_order(parts))
    for one, other in zip(beside, alone, strict=True):
        assert_bits_equal(one.view(torch.uint8), other.view(torch.uint8))


def sum_in_order(parts):
    h = parts[0].float()
    for part in parts[1:]:
        h = h + part.float()
    return h.half()


@gpu
@given(
    ARGUMENTS, st.builds(partials, st.sampled_from((0, 1, 600, 4100)), st.sampled_from((1, 16, 32)), st.integers(0, 9))
)
def test_a_sum_beside(args, parts):
    h = torch.full((1, *parts.shape[1:]), torch.nan, dtype=parts.dtype, device="cuda")
    beside, alone = kernels.multiply_gelu_quantize(**args, beside=(parts, h)), kernels.multiply_gelu_quantize(**args)
    assert_bits_equal(h[0], sum_in_order(parts))
    assert_bits_equal(beside[0].view(torch.uint8), alone[0].view(torch.uint8))
    if alone[1] is not None:
        assert_bits_equal(beside[1], alone[1])


@gpu
@given(ARGUMENTS)
def test_within_the_budget_and_the_same_every_time(args):
    operand, partials = kernels.multiply_gelu_quantize(**args)
    assert_operand_right(operand, args)
    assert_partials_right(partials, args)
    again = kernels.multiply_gelu_quantize(**args)
    assert_bits_equal(again[0], operand)
    if partials is not None:
        assert_bits_equal(again[1], partials)


@gpu
@given(ARGUMENTS, st.data())
def test_tokens_do_not_meet(args, data):
    """Rows in another order give the same rows in that order."""
    order = torch.tensor(data.draw(st.permutations(range(args["x_q"].shape[0]))), device="cuda")
    moved = dict(args)
    moved["x_q"] = args["x_q"].view(torch.uint8)[order].view(E4M3)
    if args["scale_a"].numel() > 1:
        moved["scale_a"] = args["scale_a"][order]
    if args["partials"] is not None:
        moved["partials"] = args["partials"][:, order].contiguous()
    whole, permuted = kernels.multiply_gelu_quantize(**args), kernels.multiply_gelu_quantize(**moved)
    assert_bits_equal(permuted[0].view(torch.uint8), whole[0].view(torch.uint8)[order])
    if whole[1] is not None:
        assert_bits_equal(permuted[1], whole[1][:, order])


@gpu
def test_nan_stays_in_its_token():
    args = make(40, 272, 48, torch.bfloat16, 16, 16, True, True, True, 0)
    clean = kernels.multiply_gelu_quantize(**args)
    args["scale_a"][7] = float("nan")
    dirty = kernels.multiply_gelu_quantize(**args)
    others = [i for i in range(40) if i != 7]
    assert dirty[0][7].float().isnan().all()
    assert dirty[1][:, 7].isnan().all()
    assert_bits_equal(dirty[0].view(torch.uint8)[others], clean[0].view(torch.uint8)[others])
    assert_bits_equal(dirty[1][:, others], clean[1][:, others])


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
    args = make(4, 48, 32, torch.bfloat16, 16, 16, False, True, True, 0, device="cpu")
    with pytest.raises(ValueError, match=message):
        kernels.multiply_gelu_quantize(**args | change)


def compiled_for(capability, rank, size, in_features=None):
    """The kernel for results of a size; in_features are an argument, or a constant as Inductor makes them."""
    constants = kernels.configuration(*size, capability)
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    types = {"x": "*fp8e4nv", "w": "*fp8e4nv", "operand_ptr": "*fp8e4nv", "bias_ptr": "*bf16", "s_ptr": "*bf16"}
    types |= {"scale_a_ptr": "*fp32", "scale_b_ptr": "*fp32", "t_ptr": "*fp32"}
    types |= {"M": "i32", "N": "i32", "K": "i32", "stride_xm": "i64", "stride_wn": "i64"}
    if rank:
        types |= {"partials_ptr": "*fp32", "up_ptr": "*bf16", "down_ptr": "*bf16", "next_partials_ptr": "*bf16"}
    constants |= {"PER_TOKEN": False, "FACTOR_A": 6.0, "FACTOR_B": 8.0, "R": rank, "SPLITS": 2, "SCALE_FACTOR": 6.0}
    constants |= {"CHUNK": dense.rank_chunk(rank), "NEXT_R": rank, "NEXT_RANK": activation.padded_rank(rank)}
    constants |= {"BFLOAT16": True, "TMA": dense.uses_tma(capability)}
    aligned = ["N", "K", "stride_xm", "stride_wn"]
    if in_features is not None:
        del types["K"]
        aligned.remove("K")
        constants["K"] = in_features
    return compile_for(capability, kernels._gelu_quantize_kernel, types, constants, **options, aligned=aligned)


@pytest.mark.parametrize("tokens", [64, 256, 512, 4096])
def test_one_step_over_in_features_makes_no_pipeline_of_tiles(tokens):
    """Where the main loop has one step it is none, and Triton would pipeline the loop around it."""
    compiled = compiled_for((9, 0), 32, (tokens, 12288), in_features=128)
    assert compiled.metadata.shared <= SHARED_MEMORY_BYTES[9, 0] // 2


@pytest.mark.parametrize("capability", [(9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("rank", [0, 16, 32, 64])
@pytest.mark.parametrize("size", [(64, 12288), (4096, 12288), (128, 48), (256, 48), (512, 48)])
def test_compiles_without_spills(capability, rank, size):
    compiled = compiled_for(capability, rank, size)
    ptx = compiled.asm["ptx"]
    assert {9: "wgmma.mma_async", 10: "tcgen05.mma", 12: "mma.sync"}[capability[0]] in ptx
    assert "cvt.rn.satfinite.e4m3x2" in ptx
    assert compiled.metadata.shared <= SHARED_MEMORY_BYTES[capability]
    if CUOBJDUMP.exists() and capability == (9, 0):
        assert spills(compiled) == 0
