"""quantize_weight against ModelOpt's exporter, bit for bit, and its low-rank pair against float64."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from svdq_compile.dtypes import TORCH_DTYPES
from svdq_compile.errors import QuantizeError
from svdq_compile.ops.codec import unpack_codes
from svdq_compile.ops.modelopt import dequantize_weight
from svdq_compile.quantization.data_free import low_rank_factors, quantize_as_exported, quantize_weight
from svdq_compile.spec import COMPONENTS, MODEL_DTYPES, Format

DTYPES = (torch.bfloat16, torch.float32)


def weights():
    g = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=g)

    zero_blocks = randn(32, 96)
    zero_blocks[:, 16:48] = 0
    zero_blocks[3] = -0.0
    tiny_blocks = randn(32, 96)
    tiny_blocks[:, :32] *= 1e-7
    # With an amax of 6 * 448 and a block that holds 6, both scales are 1: the entries are the scaled values.
    ties = torch.arange(-48, 48).float().view(-1, 8) / 8
    ties = torch.cat([ties, torch.full((12, 1), 6.0), torch.full((12, 7), 0.125)], 1)
    ties = torch.cat([ties, torch.full((12, 16), 6.0 * 448)], 1)
    return {
        "normal": randn(64, 128),
        "wide": randn(64, 128) * 10 ** (randn(64, 128) * 5).clamp(-18, 18),
        "wider": randn(64, 128).sign() * 10 ** (randn(64, 128) * 15).clamp(-36, 36),
        "zero_blocks": zero_blocks,
        "tiny_blocks": tiny_blocks,
        "tiny": randn(32, 64) * 1e-25,
        "one_value": torch.eye(16, 32) * 3,
        "ties": ties,
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", weights())
def test_every_bit_of_modelopts_exporter(case, dtype):
    pytest.importorskip("modelopt")
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    weight = weights()[case].to(dtype)
    packed, scale, tensor_scale = NVFP4QTensor.quantize(weight.clone(), 16)
    _, parts = quantize_weight(weight, Format.NVFP4)
    assert torch.equal(parts["qweight"], packed._quantized_data)
    assert torch.equal(parts["weight_scale"].view(torch.uint8), scale.view(torch.uint8))
    assert torch.equal(parts["weight_scale_2"], tensor_scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "rank"), [((48, 64), 8), ((64, 48), 8), ((16, 32), 40)])
@pytest.mark.filterwarnings("ignore:The low-rank dimensions")
def test_low_rank_pair_is_modelopts_up_to_sign(shape, rank, dtype):
    pytest.importorskip("modelopt")
    from modelopt.torch.quantization.model_calib import svd

    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    up, down = svd(weight, rank)
    _, parts = quantize_weight(weight, Format.NVFP4_SVD, rank)
    assert torch.equal(parts["lora_down"].abs(), down.abs())
    assert torch.equal(parts["lora_up"].abs(), up.abs())


@pytest.mark.parametrize("dtype", MODEL_DTYPES)
@pytest.mark.parametrize(("format", "rank"), [(Format.NVFP4, 32), (Format.NVFP4_SVD, 8), (Format.NVFP4_SVD, 100)])
def test_components_are_what_the_spec_says(format, rank, dtype):
    spec, parts = quantize_weight(torch.randn(48, 64).to(TORCH_DTYPES[dtype]), format, rank)
    assert (spec.format, spec.out_features, spec.in_features, spec.dtype) == (format, 48, 64, dtype)
    assert spec.dynamic
    assert not spec.smooth
    assert spec.rank == (rank if format is Format.NVFP4_SVD else 0)
    assert list(parts) == [name for name in COMPONENTS if name in spec.components()]
    for name, component in spec.components().items():
        assert tuple(parts[name].shape) == component.shape
        assert parts[name].dtype == TORCH_DTYPES[component.dtype]
        assert parts[name].is_contiguous()


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 40),
    st.integers(1, 4),
    st.sampled_from([(Format.NVFP4, 1), *((Format.NVFP4_SVD, rank) for rank in (1, 7, 50))]),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    st.floats(-3, 3),
    st.integers(0, 2**32),
)
def test_every_weight_is_within_one_step(rows, groups, recipe, dtype, exponent, seed):
    g = torch.Generator().manual_seed(seed)
    weight = (torch.randn(rows, 16 * groups, generator=g) * 10**exponent).to(dtype)
    _, parts = quantize_weight(weight, *recipe)
    rebuilt = dequantize_weight(parts["qweight"], parts["weight_scale"], parts["weight_scale_2"]).double()
    if recipe[0] is Format.NVFP4_SVD:
        rebuilt = rebuilt + parts["lora_up"].double() @ parts["lora_down"].double()
    # The largest gap between e2m1 values is 2 steps; float32 rounding adds a few of its own ulps.
    step = (parts["weight_scale"].double() * parts["weight_scale_2"]).repeat_interleave(16, 1)
    assert ((rebuilt - weight.double()).abs() <= step * (1 + 2**-20)).all()


@pytest.mark.parametrize("shape", [(48, 64), (64, 48)])
def test_low_rank_is_the_best_there_is(shape):
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(2)).double()
    down, up = low_rank_factors(weight, 8)
    values = torch.linalg.svdvals(weight)
    best = values[8:].norm()
    u, s, vt = torch.linalg.svd(weight.float(), full_matrices=False)
    float32_error = ((weight - ((u[:, :8] * s[:8]) @ vt[:8]).double()).norm() - best).abs()
    budget = 2 * (float32_error + torch.finfo(torch.float64).eps * values[0])
    assert ((weight - up @ down).norm() - best).abs() <= budget
    assert (down.gather(1, down.abs().argmax(1, keepdim=True)) > 0).all()


def test_signs_do_not_depend_on_the_svd():
    weight = torch.randn(32, 48, generator=torch.Generator().manual_seed(3)).double()
    down, up = low_rank_factors(weight, 4)
    flipped_down, flipped_up = low_rank_factors(-weight, 4)
    assert torch.equal(down.bfloat16(), flipped_down.bfloat16())
    assert torch.equal(up.bfloat16(), -flipped_up.bfloat16())


def test_residual_is_taken_from_the_rounded_pair():
    weight = torch.randn(32, 48, generator=torch.Generator().manual_seed(4)).bfloat16()
    _, parts = quantize_weight(weight, Format.NVFP4_SVD, 4)
    residual = weight.double() - parts["lora_up"].double() @ parts["lora_down"].double()
    codes, scale, tensor_scale = quantize_as_exported(residual.float())
    assert torch.equal(unpack_codes(parts["qweight"]), codes)
    assert torch.equal(parts["weight_scale"].float(), scale.float())
    assert torch.equal(parts["weight_scale_2"], tensor_scale)


@pytest.mark.parametrize("rank", [1, 40])
def test_rank_beyond_the_shape_is_zeros(rank):
    _, parts = quantize_weight(torch.randn(16, 32), Format.NVFP4_SVD, rank)
    down, up = parts["lora_down"], parts["lora_up"]
    assert down.shape == (rank, 32)
    assert up.shape == (16, rank)
    assert not down[16:].any()
    assert not up[:, 16:].any()
    assert down[:16].any(1).all()


@pytest.mark.parametrize("format", [Format.NVFP4, Format.NVFP4_SVD])
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45])
def test_an_empty_weight_stays_finite(format, value):
    _, parts = quantize_weight(torch.full((16, 32), value), format, 4)
    assert parts["weight_scale_2"] == 1
    assert (parts["weight_scale"].float() == 1).all()
    assert not parts["qweight"].any()


def test_a_plain_string_names_a_format():
    spec, parts = quantize_weight(torch.randn(16, 32), "nvfp4_svd", 4)
    assert spec.format is Format.NVFP4_SVD
    assert parts["lora_up"].shape == (16, 4)


def test_a_block_whose_step_underflows_is_zero():
    weight = torch.zeros(1, 32)
    weight[0, 0], weight[0, 16] = 4e-42, 1.4e-45
    codes, _, tensor_scale = quantize_as_exported(weight)
    assert tensor_scale > 0
    assert codes[0, 0] == 7
    assert not codes[0, 16:].any()


def test_same_weight_same_bytes():
    weight = torch.randn(48, 64).bfloat16()
    first, second = (quantize_weight(weight.clone(), Format.NVFP4_SVD, 8)[1] for _ in range(2))
    for name in first:
        one, other = (parts[name].reshape(-1).view(torch.uint8) for parts in (first, second))
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("weight", "format", "rank", "message"),
    [
        (torch.ones(8, 24), Format.NVFP4, 1, r"\[8, 24\]"),
        (torch.ones(16), Format.NVFP4, 1, r"\[16\]"),
        (torch.ones(0, 16), Format.NVFP4, 1, r"\[0, 16\]"),
        (torch.ones(16, 16).double(), Format.NVFP4, 1, "float64"),
        (torch.ones(16, 16), Format.FP8, 1, "fp8"),
        (torch.ones(16, 16), Format.NVFP4_SVD, 0, "rank"),
        (torch.full((16, 16), float("nan")), Format.NVFP4, 1, "NaN"),
        (torch.full((16, 16), 6e4, dtype=torch.float16), Format.NVFP4_SVD, 1, "overflows"),
    ],
)
def test_refuses(weight, format, rank, message):
    with pytest.raises(QuantizeError, match=message):
        quantize_weight(weight, format, rank)


def test_imports_neither_modelopt_nor_diffusers():
    code = (
        "import sys, svdq_compile.quantization.modelopt, svdq_compile.quantization.data_free\n"
        "assert not {'modelopt', 'diffusers', 'onnx'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
