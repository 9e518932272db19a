"""The reference against what NVIDIA ModelOpt's own simulation recorded (tests/data/README.md)."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import svdq_compile
from svdq_compile.ops import modelopt, reference
from svdq_compile.ops.linear import linear
from svdq_compile.spec import COMPONENTS, MODELOPT_LEAF
from svdq_compile.testing.oracle import assert_bits_equal, assert_within_budget, relative_error

DATA = Path(__file__).parents[1] / "data" / "modelopt-two-blocks"
LINEARS = sorted(
    f"transformer_blocks.{block}.{layer}"
    for block in (0, 1)
    for layer in (
        *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
        *(f"attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
        *(f"{stream}_{layer}" for stream in ("img", "txt") for layer in ("mod.1", "mlp.net.0.proj", "mlp.net.2")),
    )
)

WHOLE_EXPORT = os.environ.get("SVDQ_GOLDEN")
"""Folder of a whole export with its recording, where one is at hand; the repository carries two blocks."""


def ascending_linear(x, weight, bias=None):
    """F.linear with float32 sums in ascending order of in_features: the recording's order up to 256 of them.

    Products of two 16-bit floats are exact in float64, so one rounding per step is a fused multiply-add.
    """
    rows, w = x.reshape(-1, x.shape[-1]).double(), weight.double()
    total = torch.zeros(rows.shape[0], w.shape[0])
    for k in range(w.shape[1]):
        total = (total.double() + rows[:, k, None] * w[None, :, k]).float()
    if bias is not None:
        total = total + bias.float()
    return total.to(x.dtype).reshape(*x.shape[:-1], w.shape[0])


@pytest.fixture(scope="module")
def export():
    return load_file(DATA / "diffusion_pytorch_model.safetensors"), load_file(DATA / "recorded_io.safetensors")


def operands(export, name):
    tensors, recorded = export
    parts = [tensors.get(f"{name}.{MODELOPT_LEAF[part]}") for part in COMPONENTS]
    return (recorded[f"linear.{name}.input"], *parts, tensors[f"{name}.bias"]), recorded[f"linear.{name}.output"]


def test_every_quantised_linear_is_recorded(export):
    assert len(LINEARS) == 28
    assert {k for k in export[1] if k.endswith(".output")} == {f"linear.{n}.output" for n in LINEARS}


@pytest.mark.parametrize("name", LINEARS)
def test_modelopt_mode_reproduces_the_recording(export, name, monkeypatch):
    """Bit for bit up to 256 inputs on any machine; beyond, the order of the sums is the CPU library's own."""
    args, recorded = operands(export, name)
    if args[0].shape[-1] <= 256:
        monkeypatch.setattr(modelopt.F, "linear", ascending_linear)
        assert_bits_equal(modelopt.nvfp4_linear_modelopt(*args), recorded)
        return
    # Smoothed first, so that the oracle quantises the very values the recording quantised.
    x_hat = reference.smooth(args[0], args[5]).double()
    oracle = modelopt.nvfp4_linear_modelopt(x_hat, *args[1:5], None, *args[6:])
    assert_within_budget(modelopt.nvfp4_linear_modelopt(*args), oracle, low_precision=recorded)


@pytest.mark.parametrize("name", LINEARS)
def test_nvfp4_mode_is_within_modelopts_own_rounding(export, name):
    """3.5e-3 is what rounding every operand and result to bfloat16 costs ModelOpt's simulation."""
    args, recorded = operands(export, name)
    wide = reference.linear_wide(*args, "nvfp4")
    assert wide.dtype == torch.float32
    assert relative_error(wide, recorded) <= 3.5e-3
    assert_bits_equal(linear(*args, "nvfp4"), wide.to(torch.bfloat16))


@pytest.mark.parametrize("name", LINEARS)
def test_what_narrower_operands_cost(export, name):
    """Against the same stored weight with the activation as it is."""
    args, _ = operands(export, name)
    wide = reference.linear_wide(*args, "bf16")
    assert 0.015 <= relative_error(reference.linear_wide(*args, "fp8"), wide) <= 0.04
    assert 0.045 <= relative_error(reference.linear_wide(*args, "nvfp4"), wide) <= 0.105


@pytest.mark.parametrize("ablation", ["lora", "smoothing"])
def test_the_recording_tells_a_wrong_formula(export, ablation):
    """Without the low-rank branch, or without smoothing, the error is a hundred times the rounding."""
    args, recorded = operands(export, "transformer_blocks.0.attn.to_q")
    args = list(args)
    if ablation == "lora":
        args[6] = args[7] = None
    else:
        args[5] = None
    assert relative_error(reference.linear_wide(*args, "nvfp4"), recorded) > 0.1


@pytest.mark.skipif(WHOLE_EXPORT is None, reason="set SVDQ_GOLDEN to a folder with a whole recorded export")
def test_whole_model_reproduces_modelopt():
    """The whole model is ``torch.equal`` to ModelOpt's where the CPU sums in the recording's order.

    On a CPU with AMX that takes ``ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 MKL_ENABLE_INSTRUCTIONS=AVX512_E3``.
    """
    folder = Path(WHOLE_EXPORT)
    recorded = load_file(folder / "recorded_io.safetensors")
    with safe_open(folder / "recorded_io.safetensors", "pt") as handle:
        shapes = json.loads(handle.metadata()["img_shapes"])
    inputs = {k.removeprefix("model_input."): v for k, v in recorded.items() if k.startswith("model_input.")}
    model = svdq_compile.load_transformer(folder, compute="modelopt")
    output = model(**inputs, img_shapes=[[tuple(s) for s in sample] for sample in shapes], return_dict=False)[0]
    differing = 0
    for name, module in model.named_modules():
        if f"linear.{name}.input" in recorded:
            y = module(recorded[f"linear.{name}.input"])
            differing += int((y != recorded[f"linear.{name}.output"]).sum())
    equal = torch.equal(output, recorded["model.modelopt_output"])
    print(f"\n28 linears: {differing} differing elements; whole model equal: {equal}")
    assert differing == 0
    assert equal
