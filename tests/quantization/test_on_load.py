"""An unquantised checkpoint becomes a quantised model while it loads, without data."""

import json

import pytest
import torch
from diffusers import QwenImageTransformer2DModel

import svdq_compile
from svdq_compile.errors import QuantizeError
from svdq_compile.model.load import quantised_linears
from svdq_compile.quantization.data_free import low_rank_factors
from svdq_compile.spec import Format
from svdq_compile.testing.checkpoints import SMALL, example_inputs, write_checkpoint
from svdq_compile.testing.compare import differing
from svdq_compile.testing.oracle import relative_error


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A stock BF16 transformer folder whose weights have outlier directions, as trained ones do."""
    folder = tmp_path_factory.mktemp("dense")
    torch.manual_seed(0)
    model = QwenImageTransformer2DModel(**SMALL).bfloat16()
    for parameter in model.transformer_blocks.parameters():
        if parameter.dim() == 2:
            n, k = parameter.shape
            parameter.data += (torch.randn(n, 4) @ torch.randn(4, k) / 8).bfloat16()
    model.save_pretrained(folder)
    return folder


def output(model):
    return model(**example_inputs(model))[0]


def test_an_unquantised_checkpoint_loads_as_it_is(dense):
    stock = QwenImageTransformer2DModel.from_pretrained(dense, torch_dtype=torch.bfloat16)
    assert torch.equal(output(svdq_compile.load_transformer(dense)), output(stock))


@pytest.mark.parametrize("format", ["nvfp4", "nvfp4_svd"])
def test_blocks_between_the_kept_ones_are_quantised(dense, format):
    model = svdq_compile.load_transformer(dense, quantize=format, rank=8, blocks_kept=1)
    linears = quantised_linears(model)
    assert len(linears) == 14
    assert all(name.startswith("transformer_blocks.1.") for name in linears)
    for module in linears.values():
        spec = module.weight.spec
        assert (spec.format, spec.dynamic, spec.smooth) == (Format(format), True, False)
        assert spec.rank == (8 if format == "nvfp4_svd" else 0)


def test_the_low_rank_branch_takes_the_outliers(dense):
    """Same model, same codes' budget: with rank-4 outliers a rank-8 branch leaves less error than none."""
    reference = output(svdq_compile.load_transformer(dense))
    errors = {
        format: relative_error(
            output(svdq_compile.load_transformer(dense, quantize=format, rank=8, blocks_kept=0)), reference
        )
        for format in ("nvfp4", "nvfp4_svd")
    }
    assert errors["nvfp4_svd"] < errors["nvfp4"]


@pytest.mark.parametrize("format", ["nvfp4", "nvfp4_svd"])
def test_what_was_quantised_saves_and_loads(dense, format, tmp_path):
    model = svdq_compile.load_transformer(dense, quantize=format, rank=8, blocks_kept=1)
    svdq_compile.save_checkpoint(model, tmp_path)
    again = svdq_compile.load_transformer(tmp_path)
    assert not differing(again, model)
    group = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    assert group["input_activations"]["dynamic"] is True
    assert not any("input_scale" in key for key in svdq_compile.inspect(tmp_path).manifest.dense)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"quantize": "fp8"}, "FP8 needs calibration"),
        ({"quantize": "int4"}, "int4"),
        ({"quantize": "nvfp4", "blocks_kept": 2}, "lower blocks_kept"),
        ({"quantize": "nvfp4_svd", "rank": 0}, "rank must be 1 or more"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_done_is_refused(dense, arguments, message):
    with pytest.raises(QuantizeError, match=message):
        svdq_compile.load_transformer(dense, **arguments)


def test_quantising_twice_is_refused(tmp_path):
    write_checkpoint(tmp_path, config=SMALL, recipe="mixed", blocks_kept=1)
    with pytest.raises(QuantizeError, match="quantised already"):
        svdq_compile.load_transformer(tmp_path, quantize="nvfp4")


@pytest.mark.parametrize("decay", [0.0, 0.01], ids=["flat", "decaying"])
def test_subspace_iteration_finds_what_a_full_svd_finds(decay):
    """Beyond the size where a full SVD is quick: within 1 % of the least residual there is."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(560, 640, generator=g, dtype=torch.float64)
    weight = weight * torch.exp(-decay * torch.arange(640, dtype=torch.float64))
    s = torch.linalg.svdvals(weight)
    down, up = low_rank_factors(weight, 32)
    assert down.shape == (32, 640)
    assert (weight - up @ down).norm() <= 1.01 * s[32:].norm()
    torch.testing.assert_close(down @ down.T, torch.eye(32, dtype=torch.float64))
    again = low_rank_factors(weight, 32)
    assert torch.equal(down, again[0])
