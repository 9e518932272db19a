"""quant_config: exactly the linears of the inner blocks are quantised, whatever else a block holds."""

import pytest
from torch import nn

from svdq_compile.errors import QuantizeError
from svdq_compile.quantization.recipes import TEXT_AND_MODULATION, Recipe, quant_config
from svdq_compile.spec import Format

FORMATS = (Format.NVFP4_SVD, Format.NVFP4, Format.FP8)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.mod = nn.Sequential(nn.SiLU(), nn.Linear(16, 16))
        self.proj = nn.Linear(16, 16)


class Model(nn.Module):
    def __init__(self, num_blocks):
        super().__init__()
        self.img_in = nn.Linear(16, 16)
        self.transformer_blocks = nn.ModuleList(Block() for _ in range(num_blocks))
        self.single_transformer_blocks = nn.ModuleList(Block() for _ in range(num_blocks))
        self.norm_out = nn.LayerNorm(16)
        self.proj_out = nn.Linear(16, 16)


def quantizers(model, recipe, num_blocks):
    """Name -> TensorQuantizer of every enabled quantiser once ModelOpt applied the recipe."""
    mtq = pytest.importorskip("modelopt.torch.quantization")
    config = {**quant_config(recipe, num_blocks), "algorithm": None}
    mtq.quantize(model, config)
    found = {n: m for n, m in model.named_modules() if isinstance(m, mtq.nn.TensorQuantizer) and m.is_enabled}
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    assert any(isinstance(module, mtq.nn.TensorQuantizer) for norm in norms for module in norm.modules())
    return found


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("num_blocks", "kept"), [(1, 0), (5, 2), (14, 2)])
def test_only_linears_of_inner_blocks(format, num_blocks, kept):
    recipe = Recipe(format, blocks_kept=kept)
    enabled = quantizers(Model(num_blocks), recipe, num_blocks)
    assert set(enabled) == {
        f"transformer_blocks.{index}.{linear}.{role}_quantizer"
        for index in range(kept, num_blocks - kept)
        for linear in ("mod.1", "proj")
        for role in ("weight", "input")
    }
    for quantizer in enabled.values():
        if format is Format.FP8:
            assert quantizer.num_bits == (4, 3)
            assert not quantizer.block_sizes
        else:
            assert quantizer.num_bits == (2, 1)
            assert quantizer.block_sizes == {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}
        assert quantizer.axis is None


@pytest.mark.parametrize("format", FORMATS)
def test_qwen_image(format):
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.QwenImageTransformer2DModel(
        num_layers=6,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=48,
        axes_dims_rope=(8, 12, 12),
        in_channels=16,
        out_channels=4,
    )
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    inner = {name for name in linears if name.startswith(("transformer_blocks.2.", "transformer_blocks.3."))}
    assert len(inner) == 28
    enabled = quantizers(model, Recipe(format), 6)
    assert set(enabled) == {f"{name}.{role}_quantizer" for name in inner for role in ("weight", "input")}


def test_algorithms():
    assert quant_config(Recipe(Format.NVFP4), 6)["algorithm"] == "max"
    assert quant_config(Recipe(Format.FP8), 6)["algorithm"] == "max"
    assert quant_config(Recipe(), 6)["algorithm"] == {
        "method": "svdquant",
        "lowrank": 32,
        "skip_layers": list(TEXT_AND_MODULATION),
    }
    assert quant_config(Recipe(rank=8, skip=()), 6)["algorithm"] == {
        "method": "svdquant",
        "lowrank": 8,
        "skip_layers": [],
    }


def test_one_config_does_not_share_with_the_next():
    first = quant_config(Recipe(), 6)
    first["quant_cfg"][1]["cfg"]["block_sizes"][-1] = 32
    assert quant_config(Recipe(), 6)["quant_cfg"][1]["cfg"]["block_sizes"][-1] == 16


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Recipe(Format.DENSE), "dense"),
        (lambda: Recipe(rank=0), "rank"),
        (lambda: Recipe(blocks_kept=-1), "blocks_kept"),
        (lambda: Recipe(skip="*.to_q"), "tuple"),
        (lambda: quant_config(Recipe(), 4), "none of 4"),
        (lambda: quant_config(Recipe(blocks_kept=0), 0), "none of 0"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(QuantizeError, match=message):
        make()


def test_plain_strings_name_formats():
    assert quant_config(Recipe("fp8"), 6) == quant_config(Recipe(Format.FP8), 6)
    assert quant_config(Recipe("nvfp4_svd"), 6) == quant_config(Recipe(), 6)
    assert isinstance(Recipe("nvfp4").format, Format)
    with pytest.raises(QuantizeError, match="int8"):
        Recipe("int8")
