"""ModelOpt's own fake-quantised model against our model of its export, on the same machine: equal bits throughout."""

import pytest
import torch

import svdq_compile
from svdq_compile.model.load import quantised_linears
from svdq_compile.quantization.fake_quant import cpu_nvfp4
from svdq_compile.quantization.modelopt import export
from svdq_compile.quantization.recipes import Recipe
from svdq_compile.spec import Format
from svdq_compile.testing.checkpoints import SMALL, example_inputs
from svdq_compile.testing.oracle import assert_bits_equal, relative_error

pytest.importorskip("modelopt")


def trained_like(dtype):
    """A narrow Qwen-Image whose weights have outlier directions, so that every stage of the recipe does something."""
    from diffusers import QwenImageTransformer2DModel

    torch.manual_seed(0)
    model = QwenImageTransformer2DModel(**SMALL | {"num_layers": 4}).to(dtype).eval()
    for parameter in model.transformer_blocks.parameters():
        if parameter.dim() == 2:
            n, k = parameter.shape
            parameter.data += (torch.randn(n, 2) @ torch.randn(2, k) / 8).to(dtype)
    return model


@pytest.fixture
def simulated(monkeypatch):
    """What ModelOpt's model computes for the exported tensors: after it fused q, k and v, before it packs weights."""
    from modelopt.torch.export import unified_export_hf

    recorded = {}
    pack = unified_export_hf._process_quantized_modules

    def record_then_pack(model, *args, **kwargs):
        def keep(name):
            return lambda module, inputs, output: recorded.update({name: (inputs[0], output)})

        names = [
            n for n, m in model.named_modules() if hasattr(m, "weight_quantizer") and m.weight_quantizer.is_enabled
        ]
        hooks = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
        with torch.no_grad(), cpu_nvfp4():
            dtype = next(model.parameters()).dtype
            recorded["whole"] = model(**example_inputs(model, height=6, dtype=dtype))[0]
        for hook in hooks:
            hook.remove()
        return pack(model, *args, **kwargs)

    monkeypatch.setattr(unified_export_hf, "_process_quantized_modules", record_then_pack)
    return recorded


MIXED = Recipe(Format.NVFP4_SVD, rank=8, blocks_kept=1)
ALL_SVD = Recipe(Format.NVFP4_SVD, rank=8, blocks_kept=1, skip=())
PLAIN = Recipe(Format.NVFP4, blocks_kept=1)


# Other dtypes of the low-rank factors go through GEMMs whose order of sums follows the factors' memory layout.
@pytest.mark.parametrize(
    ("recipe", "dtype"),
    [(MIXED, "bfloat16"), (ALL_SVD, "bfloat16"), (PLAIN, "bfloat16"), (PLAIN, "float16"), (PLAIN, "float32")],
    ids=["mixed-bf16", "all_svd-bf16", "nvfp4-bf16", "nvfp4-fp16", "nvfp4-fp32"],
)
def test_modelopt_mode_is_modelopts_simulation(simulated, recipe, dtype, tmp_path):
    dtype = getattr(torch, dtype)
    model = trained_like(dtype)

    def calibrate(quantised):
        for height in (4, 6):
            quantised(**example_inputs(quantised, height=height, dtype=dtype))

    export(model, calibrate, tmp_path, recipe)
    ours = svdq_compile.load_transformer(tmp_path, compute="modelopt")
    linears = quantised_linears(ours)
    assert len(linears) == 28
    assert simulated.keys() == {*linears, "whole"}
    for name, module in linears.items():
        x, y = simulated[name]
        assert_bits_equal(module(x) + 0.0, y + 0.0)
    output = ours(**example_inputs(ours, height=6, dtype=dtype))[0]
    assert_bits_equal(output + 0.0, simulated["whole"] + 0.0)
    reference = model(**example_inputs(model, height=6, dtype=dtype))[0]
    assert 0 < relative_error(output, reference) < 0.2
