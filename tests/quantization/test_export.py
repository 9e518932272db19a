"""export: what ModelOpt writes for each recipe and each variant of Qwen-Image."""

import json
import random

import numpy
import pytest
import torch
from safetensors.torch import load_file

from svdq_compile.dtypes import TORCH_DTYPES
from svdq_compile.ops import codec
from svdq_compile.quantization.data_free import quantize_as_exported
from svdq_compile.quantization.modelopt import export
from svdq_compile.quantization.recipes import Recipe
from svdq_compile.spec import MODELOPT_LEAF, Format, LinearSpec

pytest.importorskip("modelopt")
diffusers = pytest.importorskip("diffusers")

IMAGE_LINEARS = {f"attn.{leaf}" for leaf in ("to_q", "to_k", "to_v", "to_out.0")}
IMAGE_LINEARS |= {"img_mlp.net.0.proj", "img_mlp.net.2"}


def tiny(dtype=torch.bfloat16, num_layers=5, **options):
    torch.manual_seed(0)
    model = diffusers.QwenImageTransformer2DModel(
        num_layers=num_layers,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=48,
        axes_dims_rope=(8, 12, 12),
        in_channels=16,
        out_channels=4,
        **options,
    )
    return model.to(dtype)


def calibrate(model):
    """One forward pass whose inputs come from torch's, NumPy's and Python's global generators."""
    dtype = model.dtype
    inputs = {
        "hidden_states": torch.randn(1, 16, 16, dtype=dtype) * random.uniform(1, 2),
        "encoder_hidden_states": torch.randn(1, 8, 48, dtype=dtype) * numpy.random.uniform(1, 2),
        "encoder_hidden_states_mask": torch.ones(1, 8, dtype=torch.long),
        "timestep": torch.tensor([0.5], dtype=dtype),
        "img_shapes": [[(1, 4, 4)]],
    }
    if model.config.use_additional_t_cond:
        inputs["additional_t_cond"] = torch.zeros(1, dtype=torch.long)
    model(**inputs)


def read(folder):
    config = json.loads((folder / "config.json").read_text())
    return load_file(folder / "diffusion_pytorch_model.safetensors"), config


def linears(state):
    return {key.removesuffix(".weight_scale") for key in state if key.endswith(".weight_scale")}


def assert_is(state, name, spec):
    """The checkpoint's tensors of a linear are exactly the spec's components and a bias."""
    found = {key.removeprefix(f"{name}.") for key in state if key.startswith(f"{name}.")}
    assert found == {MODELOPT_LEAF[part] for part in spec.components()} | {"bias"}
    for part, component in spec.components().items():
        tensor = state[f"{name}.{MODELOPT_LEAF[part]}"]
        assert tuple(tensor.shape) == component.shape, (name, part)
        assert tensor.dtype == TORCH_DTYPES[component.dtype], (name, part)


def spec_of(model, name, format, rank=0):
    linear = model.get_submodule(name)
    smooth = format is Format.NVFP4_SVD
    return LinearSpec(format, linear.out_features, linear.in_features, rank, smooth=smooth)


@pytest.fixture(scope="module")
def svd(tmp_path_factory):
    """Folder of an NVFP4_SVD export, with the enabled LayerNorm quantisers of each calibration pass."""
    from modelopt.torch.quantization.nn import TensorQuantizer

    passes = []

    def loop(model):
        norms = [module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)]
        assert norms
        inner = [module for norm in norms for module in norm.modules() if isinstance(module, TensorQuantizer)]
        passes.append((len(inner), sum(module.is_enabled for module in inner)))
        calibrate(model)

    return export(tiny(), loop, tmp_path_factory.mktemp("svd"), Recipe(rank=8)), passes


def test_layer_norms_are_never_quantised(svd):
    _, passes = svd
    assert len(passes) == 3
    assert all(present and not enabled for present, enabled in passes)


def test_svd_keys(svd):
    state, config = read(svd[0])
    model = tiny()
    assert config["quantization_config"]["quant_algo"] == "NVFP4_SVD"
    assert config["quantization_config"]["config_groups"]["group_0"]["lora_rank"] == 8
    names = linears(state)
    assert len(names) == 14
    assert all(name.startswith("transformer_blocks.2.") for name in names)
    for name in names:
        low_rank = name.removeprefix("transformer_blocks.2.") in IMAGE_LINEARS
        recipe = (Format.NVFP4_SVD, 8) if low_rank else (Format.NVFP4,)
        assert_is(state, name, spec_of(model, name, *recipe))


def test_same_seed_same_bytes(svd, tmp_path):
    model = tiny()
    for seed in (torch.manual_seed, numpy.random.seed, random.seed):
        seed(123)
    again = export(model, calibrate, tmp_path / "again", Recipe(rank=8))
    other = export(model, calibrate, tmp_path / "other", Recipe(rank=8), seed=1)
    name = "diffusion_pytorch_model.safetensors"
    assert (svd[0] / name).read_bytes() == (again / name).read_bytes()
    assert (svd[0] / name).read_bytes() != (other / name).read_bytes()


def test_all_svd_and_one_block_more(tmp_path):
    state, _ = read(export(tiny(num_layers=3), calibrate, tmp_path, Recipe(rank=8, blocks_kept=1, skip=())))
    names = linears(state)
    assert len(names) == 14
    for name in names:
        assert_is(state, name, spec_of(tiny(num_layers=3), name, Format.NVFP4_SVD, 8))


def test_nvfp4_bits(tmp_path):
    model = tiny(num_layers=1)
    state, config = read(export(model, calibrate, tmp_path, Recipe(Format.NVFP4, blocks_kept=0)))
    assert config["quantization_config"]["quant_algo"] == "NVFP4"
    assert len(linears(state)) == 14
    for name in linears(state):
        assert_is(state, name, spec_of(model, name, Format.NVFP4))
    # Linears of their own: q, k and v share one tensor scale.
    for leaf in ("attn.to_out.0", "attn.to_add_out", "img_mlp.net.2", "txt_mod.1"):
        name = f"transformer_blocks.0.{leaf}"
        codes, scale, tensor_scale = quantize_as_exported(model.get_submodule(name).weight.float())
        assert torch.equal(state[f"{name}.weight"], codec.pack_codes(codes))
        assert torch.equal(state[f"{name}.weight_scale"].float(), scale.float())
        assert torch.equal(state[f"{name}.weight_scale_2"], tensor_scale)


def test_fp8_bits(tmp_path):
    model = tiny(num_layers=1)
    state, config = read(export(model, calibrate, tmp_path, Recipe(Format.FP8, blocks_kept=0)))
    assert config["quantization_config"]["quant_algo"] == "FP8"
    assert len(linears(state)) == 14
    for name in linears(state):
        assert_is(state, name, spec_of(model, name, Format.FP8))
        weight = model.get_submodule(name).weight.detach()
        scale = weight.abs().amax().float() / 448
        assert torch.equal(state[f"{name}.weight_scale"], scale)
        # ModelOpt divides in the model's dtype, so values are rounded twice.
        expected = (weight.float() / scale).bfloat16().to(torch.float8_e4m3fn)
        assert torch.equal(state[f"{name}.weight"].view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize(
    "options",
    [{"use_additional_t_cond": True, "use_layer3d_rope": True}, {"zero_cond_t": True}],
    ids=["layered", "edit-2511"],
)
def test_variants(tmp_path, options):
    from modelopt.torch.export import diffusers_utils

    original = diffusers_utils.generate_diffusion_dummy_inputs
    model = tiny(num_layers=1, **options)
    state, config = read(export(model, calibrate, tmp_path, Recipe(rank=4, blocks_kept=0)))
    assert diffusers_utils.generate_diffusion_dummy_inputs is original
    assert all(config[key] == value for key, value in options.items())
    q, k = (state[f"transformer_blocks.0.attn.to_{letter}.svdquant_lora_a"] for letter in "qk")
    assert torch.equal(q, k), "q, k and v were not decomposed together"


@pytest.mark.parametrize("dtype", ["F16", "F32"])
def test_the_models_dtype_is_kept(tmp_path, dtype):
    model = tiny(TORCH_DTYPES[dtype], num_layers=1)
    state, _ = read(export(model, calibrate, tmp_path, Recipe(rank=4, blocks_kept=0)))
    for leaf in ("bias", "pre_quant_scale", "svdquant_lora_a", "svdquant_lora_b"):
        assert state[f"transformer_blocks.0.attn.to_q.{leaf}"].dtype == TORCH_DTYPES[dtype]
