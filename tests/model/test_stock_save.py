"""diffusers' own save_pretrained on models with quantised weights: refused, and nothing is touched."""

import copy
import inspect
import io
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import QwenImageTransformer2DModel

import svdq_compile
from svdq_compile.errors import SaveError
from svdq_compile.testing.checkpoints import SMALL

EXPORT = Path(__file__).parents[1] / "data" / "modelopt-two-blocks"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("copied", [False, True], ids=["loaded", "copied"])
def test_an_export_is_left_alone(copied, tmp_path):
    folder = tmp_path / "export"
    shutil.copytree(EXPORT, folder)
    before = contents(folder)
    model = svdq_compile.load_transformer(folder)
    model = copy.deepcopy(model) if copied else model
    assert not copied or model.save_pretrained.__self__ is model
    with pytest.raises(SaveError, match="save_checkpoint"):
        model.save_pretrained(folder)
    assert contents(folder) == before


def test_a_patched_model_saves_its_own_weights_once_it_has_them_back(tmp_path):
    loaded = svdq_compile.load_transformer(EXPORT)
    model = QwenImageTransformer2DModel.from_config(loaded.config).bfloat16()
    with svdq_compile.patch(model, EXPORT), pytest.raises(SaveError, match="quantised weights"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    model.save_pretrained(tmp_path)
    again = QwenImageTransformer2DModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])


def test_the_refusal_is_in_nobodys_way():
    """Pipelines pass on what the signature names, and a whole model can be pickled."""
    model = svdq_compile.load_transformer(EXPORT)
    stock = inspect.signature(QwenImageTransformer2DModel.save_pretrained)
    assert list(inspect.signature(model.save_pretrained).parameters) == list(stock.parameters)[1:]
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert again.state_dict().keys() == model.state_dict().keys()


def test_options_without_a_quantised_linear_are_not_silent(tmp_path, caplog):
    QwenImageTransformer2DModel(**SMALL).bfloat16().save_pretrained(tmp_path)
    with caplog.at_level("WARNING", "svdq_compile"):
        model = svdq_compile.load_transformer(tmp_path)
        assert not caplog.records
        svdq_compile.load_transformer(tmp_path, compute="fp8")
        svdq_compile.set_compute(model, "fp8")
    assert len(caplog.records) == 2
    assert all("no quantised linear" in record.getMessage() for record in caplog.records)
