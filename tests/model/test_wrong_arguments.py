"""Wrong arguments: a pipeline for a model, an adapter's layer for a linear, a dtype's name, an unknown mode."""

import types
from pathlib import Path

import pytest
import torch
from diffusers import QwenImageTransformer2DModel

import svdq_compile
from svdq_compile.errors import ModelError, OptionError, UnknownLinearError
from svdq_compile.testing.checkpoints import SMALL

EXPORT = Path(__file__).parents[1] / "data" / "modelopt-two-blocks"

CALLS = {
    "load_into": lambda given: svdq_compile.load_into(given, "nowhere"),
    "patch": lambda given: svdq_compile.patch(given, "nowhere").__enter__(),
    "capture": svdq_compile.capture,
    "explain": svdq_compile.explain,
    "set_compute": lambda given: svdq_compile.set_compute(given, "fp8"),
    "save_checkpoint": lambda given: svdq_compile.save_checkpoint(given, "nowhere"),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))
def test_says_what_to_give(call):
    with pytest.raises(ModelError, match=r"SimpleNamespace is no model\n.*\.transformer"):
        call(types.SimpleNamespace(transformer=None))
    with pytest.raises(ModelError, match="int is no model"):
        call(3)


class Adapted(torch.nn.Module):
    """As adapters wrap a layer."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer


def test_a_layer_an_adapter_wraps():
    loaded = svdq_compile.load_transformer(EXPORT)
    model = QwenImageTransformer2DModel.from_config(loaded.config)
    attention = model.transformer_blocks[0].attn
    attention.to_q = Adapted(attention.to_q)
    with pytest.raises(UnknownLinearError, match="unload_lora_weights"):
        svdq_compile.load_into(model, EXPORT)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.int8, torch.float8_e4m3fn])
def test_a_dtype_no_model_computes_in(dtype):
    with pytest.raises(OptionError, match=r"torch\.bfloat16"):
        svdq_compile.load_transformer(EXPORT, dtype=dtype)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    QwenImageTransformer2DModel(**SMALL).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["quantised", "dense"])
def test_an_unknown_compute_mode(dense, kind, caplog):
    """It is refused whether or not there is a linear to have it, and nothing says that it merely does nothing."""
    path = EXPORT if kind == "quantised" else dense
    model = svdq_compile.load_transformer(path)
    before = [id(parameter) for parameter in model.parameters()]
    for call in (
        lambda: svdq_compile.load_transformer(path, compute="fast"),
        lambda: svdq_compile.load_into(model, path, compute="fast"),
        lambda: svdq_compile.patch(model, path, compute="fast").__enter__(),
        lambda: svdq_compile.set_compute(model, "fast"),
    ):
        with pytest.raises(OptionError, match="compute='fast': choose one of auto, nvfp4, fp8, bf16, modelopt"):
            call()
    assert [id(parameter) for parameter in model.parameters()] == before
    assert "has no quantised linear" not in caplog.text
