"""Saving a model that no longer holds the weights it was loaded with: what is written loads, or nothing is written."""

import json

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from torch import nn

import svdq_compile
from svdq_compile.errors import SaveError
from svdq_compile.model.save import quantization_config
from svdq_compile.spec import Format, LinearSpec
from svdq_compile.testing.checkpoints import SMALL, write_checkpoint
from svdq_compile.testing.compare import differing

KINDS = {
    "svd": {},
    "rank": {"rank": 16},
    "more blocks": {"blocks_kept": 0},
    "nvfp4": {"recipe": "nvfp4"},
    "fp8": {"recipe": "fp8"},
    "half": {"dtype": "F16"},
}
"""Exports that differ in what config.json says, or in the dtype."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Name -> folder: each of :data:`KINDS`, and a model quantised without data."""
    root = tmp_path_factory.mktemp("kinds")
    folders = {name: write_checkpoint(root / name, **options) for name, options in KINDS.items()}
    torch.manual_seed(0)
    QwenImageTransformer2DModel(**SMALL).bfloat16().save_pretrained(root / "dense")
    quantised = svdq_compile.load_transformer(root / "dense", quantize="nvfp4_svd", rank=8, blocks_kept=1)
    return folders | {"data-free": svdq_compile.save_checkpoint(quantised, root / "data-free")}


@pytest.fixture
def saved(tmp_path):
    """Saves a model, and gives the saved model and the warnings of loading it."""

    def save(model):
        svdq_compile.save_checkpoint(model, tmp_path / "out")
        return svdq_compile.load_transformer(tmp_path / "out"), svdq_compile.inspect(tmp_path / "out").manifest.warnings

    return save


def config_of(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize("there", ["data-free", "svd"])
@pytest.mark.parametrize("lent", ["svd", "data-free", "rank", "more blocks", "nvfp4", "fp8"])
def test_lent_weights_are_written_with_a_config_of_their_own(folders, saved, there, lent):
    model = svdq_compile.load_transformer(folders[there])
    with svdq_compile.patch(model, folders[lent]):
        again, warnings = saved(model)
    assert differing(again, svdq_compile.load_transformer(folders[lent])) == []
    assert warnings == ()


@pytest.mark.parametrize(("there", "given"), [("data-free", "svd"), ("svd", "data-free")])
def test_an_assigned_state_dict(folders, saved, there, given):
    model, other = (svdq_compile.load_transformer(folders[name]) for name in (there, given))
    model.load_state_dict(other.state_dict(), assign=True)
    assert differing(saved(model)[0], other) == []


def test_the_config_of_a_like_checkpoint_stays(folders, tmp_path):
    """ModelOpt's own entry, globs and producer, is true of another export by the same recipe."""
    model = svdq_compile.load_transformer(folders["svd"])
    with svdq_compile.patch(model, write_checkpoint(tmp_path / "like", seed=1)):
        svdq_compile.save_checkpoint(model, tmp_path / "out")
    assert config_of(tmp_path / "out") == config_of(folders["svd"])


@pytest.mark.parametrize(
    ("other", "found"), [("data-free", "BF16, activation scale per token"), ("half", "F16, activation scale stored")]
)
def test_weights_of_two_checkpoints_are_refused(folders, tmp_path, other, found):
    out = write_checkpoint(tmp_path / "out")
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    model, second = (svdq_compile.load_transformer(folders[name]) for name in ("svd", other))
    name = "transformer_blocks.1.img_mlp.net.2"
    model.get_submodule(name).weight = second.get_submodule(name).weight
    with pytest.raises(SaveError) as caught:
        svdq_compile.save_checkpoint(model, out)
    assert (caught.value.key, caught.value.found) == (f"{name}.weight", found)
    assert "BF16, activation scale stored, as transformer_blocks.1." in caught.value.needed
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


class Adapted(nn.Module):
    """What PEFT puts in the place of a linear."""

    def __init__(self, linear):
        super().__init__()
        self.base_layer = linear
        self.lora_A = nn.ModuleDict({"default": nn.Linear(linear.in_features, 4, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(4, linear.out_features, bias=False)})


@pytest.mark.parametrize("adapters", [None, {"style": object()}], ids=["no config left", "active"])
def test_a_model_with_an_adapter_is_refused(folders, tmp_path, adapters):
    model = svdq_compile.load_transformer(folders["svd"])
    attention = model.transformer_blocks[1].attn
    attention.to_q = Adapted(attention.to_q)
    if adapters is not None:
        model.peft_config = adapters
    with pytest.raises(SaveError, match="unload_lora_weights") as caught:
        svdq_compile.save_checkpoint(model, tmp_path / "out")
    assert caught.value.key == "transformer_blocks.1.attn.to_q"
    assert caught.value.found == ("PEFT adapters style" if adapters else "a layer around the model's own (base_layer)")
    assert not (tmp_path / "out").exists()


def test_a_lora_of_diffusers_is_refused_until_it_is_unloaded(folders, saved, tmp_path):
    pytest.importorskip("peft")
    model = svdq_compile.load_transformer(folders["svd"])
    before = svdq_compile.load_transformer(folders["svd"])
    size = model.transformer_blocks[1].attn.to_q.in_features
    lora = {"lora_A.weight": torch.ones(4, size), "lora_B.weight": torch.ones(size, 4)}
    state = {f"transformer.transformer_blocks.1.attn.to_q.{key}": value for key, value in lora.items()}
    model.load_lora_adapter(state, prefix="transformer")
    with pytest.raises(SaveError, match="PEFT adapters"):
        svdq_compile.save_checkpoint(model, tmp_path / "out")
    model.unload_lora()
    assert differing(saved(model)[0], before) == []


def test_one_unsmoothed_linear_is_enough_to_promise_no_smoothing():
    specs = {str(smooth): LinearSpec(Format.NVFP4_SVD, 16, 16, 4, smooth=smooth) for smooth in (True, False)}
    assert quantization_config(specs, [])["config_groups"]["group_0"]["pre_quant_scale"] is False
