"""The stages of the operator: what is timed, that they are checked put together, and kernels that are not there."""

import pytest
import torch

from svdq_compile.bench import breakdown, clocks, measure, peers, report, roofs
from svdq_compile.bench import plan as plans
from svdq_compile.bench.layers import make_layer
from svdq_compile.bench.timing import Timer
from svdq_compile.cli import main
from svdq_compile.ops import codec, reference

CPU = torch.device("cpu")
TINY = ["bench", "linear", "--shapes", "64x48", "--tokens", "5", "--repeats", "2", "--device", "cpu"]


def reference_kernels(monkeypatch):
    """Stages made of the specification, in place of the kernels."""

    def prepare(x, layer, mode, low_rank=True):
        weight = layer.expanded if mode == "fp8" else layer.packed
        x_hat = reference.smooth(x, weight.pre_quant_scale)
        if mode == "fp8":
            matrix, scale = reference.quantize_fp8(x_hat, weight.input_scale), weight.input_scale
        elif mode == "nvfp4":
            codes = codec.quantize_nvfp4(x_hat.float(), weight.input_scale)
            matrix, scale = codec.decode_nvfp4(*codes, torch.bfloat16), weight.input_scale
        else:
            matrix, scale = x_hat, None
        partials = (x_hat.float() @ weight.lora_down.float().t())[None] if low_rank else None
        return breakdown.parts.Operand(matrix, scale, partials)

    def expand(weight, mode):
        if mode == "fp8":
            return reference.fp8_weight(weight.qweight, weight.weight_scale, weight.weight_scale_2, None)[0]
        return codec.decode_nvfp4(codec.unpack_codes(weight.qweight), weight.weight_scale, torch.bfloat16)

    def multiply(operand, matrix, layer, mode):
        y = operand.matrix.float() @ matrix.float().t() * layer.packed.weight_scale_2
        y = y * (8.0 if mode == "fp8" else 1.0) * (1.0 if operand.scale is None else operand.scale)
        if operand.partials is not None:
            y = y + operand.partials.sum(0) @ layer.packed.lora_up.float().t()
        return (y + layer.bias.float()).bfloat16()

    for function in (prepare, expand, multiply):
        monkeypatch.setattr(breakdown.parts, function.__name__, function)


@pytest.mark.parametrize("mode", plans.MODES)
@pytest.mark.parametrize("tokens", [5, 200])
def test_stages_put_together_are_checked(monkeypatch, mode, tokens):
    reference_kernels(monkeypatch)
    layer = make_layer((64, 48), 8, False, CPU)
    found = {stage.name: stage for stage in breakdown.stages(layer, layer.activations(tokens), mode)}
    assert set(found) == {"expand", "activation rank 8", "activation rank 0", "gemm rank 8", "gemm rank 0"}
    assert found["gemm rank 8"].status == report.OK, found["gemm rank 8"].note
    assert found["gemm rank 0"].status == report.OK, found["gemm rank 0"].note
    monkeypatch.setattr(breakdown.parts, "expand", lambda weight, mode: torch.ones(48, 64))
    found = {stage.name: stage for stage in breakdown.stages(layer, layer.activations(tokens), mode)}
    assert found["gemm rank 8"].status == report.FAILED


def test_kernels_that_are_not_there_leave_dashes(monkeypatch):
    def missing(*args):
        raise ImportError("no kernel")

    for name in ("prepare", "expand", "multiply"):
        monkeypatch.setattr(breakdown.parts, name, missing)
    found = roofs.Roofs(bf16=1e12, fp8=2e12, bandwidth=1e11)
    variants = (("nvfp4", "packed"), ("fp8", "expanded"))
    bench = measure.Bench(Timer(CPU, runs=1), found, 1, clocks.ClockMonitor(None), variants)
    rows = breakdown.measure(bench, make_layer((64, 48), 8, False, CPU), 5)
    assert {r.status for r in rows if r.candidate.startswith(("expand", "gemm", "activation"))} == {report.SKIPPED}
    assert [r.status for r in rows if r.candidate == "whole"] == [report.OK, report.OK]


def test_parts_of_the_operator(monkeypatch, capsys):
    reference_kernels(monkeypatch)
    assert main([*TINY, "--parts", "--modes", "fp8", "--rank", "8"]) == 0
    out = capsys.readouterr().out
    for name in ("whole fp8 packed", "whole fp8 expanded", "expand fp8", "gemm rank 0 fp8", peers.FP8_GEMM):
        assert f" {name} " in out
