"""export: it leaves the process and the caller's model as they were, and refuses what it cannot do."""

import random
import sys

import numpy
import pytest
import torch

import svdq_compile
from svdq_compile.errors import MissingPackageError, QuantizeError
from svdq_compile.quantization.modelopt import _Loop, export
from svdq_compile.quantization.recipes import Recipe
from svdq_compile.spec import Format

pytest.importorskip("modelopt")
diffusers = pytest.importorskip("diffusers")


def tiny():
    return diffusers.QwenImageTransformer2DModel(
        num_layers=1,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=48,
        axes_dims_rope=(8, 12, 12),
        in_channels=16,
        out_channels=4,
    )


def calibrate(model):
    """One forward pass, and one number from each of the other global generators."""
    numpy.random.rand()
    random.random()
    model(torch.randn(1, 16, 16), torch.randn(1, 8, 48), torch.ones(1, 8), torch.tensor([0.5]), [[(1, 4, 4)]])


def random_state():
    return torch.get_rng_state().tolist(), numpy.random.get_state()[1].tolist(), random.getstate()


def test_leaves_no_trace(tmp_path):
    model = tiny().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    classes = {name: type(module) for name, module in model.named_modules()}
    for seed in (torch.manual_seed, numpy.random.seed, random.seed):
        seed(123)
    state, stdout = random_state(), sys.stdout
    export(model, calibrate, tmp_path, Recipe(rank=4, blocks_kept=0))
    assert random_state() == state
    assert sys.stdout is stdout
    assert all(module.training for module in model.modules())
    assert {name: type(module) for name, module in model.named_modules()} == classes
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not any(module._forward_hooks for module in model.modules())


def test_prints_go_to_the_log_and_the_callers_stay(tmp_path, capsys, caplog):
    def loop(model):
        print("mine")
        calibrate(model)

    with caplog.at_level("INFO", logger="svdq_compile.quantization.modelopt"):
        export(tiny(), loop, tmp_path, Recipe(Format.NVFP4, blocks_kept=0))
    assert capsys.readouterr().out == "mine\n"
    assert any("Export complete" in message for message in caplog.messages)


def test_a_failing_loop_restores_everything(tmp_path):
    from modelopt.torch.quantization import tensor_quant

    original, stdout = tensor_quant.dynamic_block_quantize_op, sys.stdout
    with pytest.raises(ZeroDivisionError):
        export(tiny(), lambda model: 1 / 0, tmp_path, Recipe(blocks_kept=0))
    assert tensor_quant.dynamic_block_quantize_op is original
    assert sys.stdout is stdout


@pytest.mark.parametrize(("module", "package"), [("modelopt", "nvidia-modelopt"), ("onnx", "onnx")])
def test_missing_package(monkeypatch, tmp_path, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingPackageError, match=rf"'{package}'.*pip install 'svdq-compile\[quantize\]'"):
        export(tiny(), calibrate, tmp_path, Recipe(blocks_kept=0))


def test_refuses_before_calibrating(tmp_path):
    def never(_):
        raise AssertionError

    model = tiny()
    with pytest.raises(QuantizeError, match="Linear has no transformer_blocks"):
        export(model.proj_out, never, tmp_path, Recipe())
    with pytest.raises(QuantizeError, match="none of 1"):
        export(model, never, tmp_path, Recipe())
    model.transformer_blocks[0].img_mlp.net[2] = torch.nn.Linear(24, 64)
    with pytest.raises(QuantizeError, match=r"transformer_blocks\.0\.img_mlp\.net\.2 has 24 inputs"):
        export(model, never, tmp_path, Recipe(blocks_kept=0))


def idle(model):
    """What a loop does that runs the pipeline with its own transformer."""


def once():
    """A loop over data that can be read once only."""
    data = iter([0])
    return lambda model: [calibrate(model) for _ in data]


def all_but_one(model):
    """The blocks' linears alone, without one of them."""
    for name, module in model.transformer_blocks.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "0.attn.to_k":
            module(torch.randn(1, 8, module.in_features))


@pytest.mark.parametrize("format", [Format.NVFP4_SVD, Format.NVFP4, Format.FP8])
@pytest.mark.parametrize(("loop", "count", "first"), [(idle, 14, "img_mod.1"), (all_but_one, 1, "attn.to_k")])
def test_a_loop_that_does_not_run_the_model_is_refused(tmp_path, format, loop, count, first):
    message = f"left {count} of 14 linears without input, first transformer_blocks.0.{first}\n"
    with pytest.raises(QuantizeError, match=message) as caught:
        export(tiny(), loop, tmp_path / "out", Recipe(format, rank=4, blocks_kept=0))
    assert "0 forward passes of the model in call 1 of forward_loop" in str(caught.value)
    assert "pipe.transformer = model" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_data_that_ends_before_the_last_call_is_refused(tmp_path):
    with pytest.raises(QuantizeError, match="0 forward passes of the model in call 2 of forward_loop"):
        export(tiny(), once(), tmp_path / "out", Recipe(rank=4, blocks_kept=0))
    assert not (tmp_path / "out").exists()
    export(tiny(), once(), tmp_path / "out", Recipe(Format.NVFP4, blocks_kept=0))


def test_a_forward_that_is_called_directly_counts(tmp_path):
    def loop(model):
        calibrate(model.forward)

    export(tiny(), loop, tmp_path, Recipe(Format.NVFP4, blocks_kept=0))
    assert (tmp_path / "config.json").is_file()


def test_what_is_quantised_already_is_refused(tmp_path):
    """Ours, and the copy ModelOpt calibrated."""
    copies = []

    def loop(model):
        copies.append(model)
        calibrate(model)

    ours = svdq_compile.load_transformer(export(tiny(), loop, tmp_path / "in", Recipe(Format.NVFP4, blocks_kept=0)))
    for model in (ours, *copies):
        with pytest.raises(QuantizeError, match="this QwenImageTransformer2DModel is quantised already"):
            export(model, calibrate, tmp_path / "out", Recipe(blocks_kept=0))
    assert not (tmp_path / "out").exists()


def test_progress_counts_forward_passes():
    model = torch.nn.Linear(4, 4)
    loop = _Loop(lambda model: [model(torch.ones(4)) for _ in range(5)], passes=3, linears=[])
    with loop:
        loop(model)
        assert (loop.bar.n, loop.bar.total) == (5, 15)
        model(torch.ones(4))
        loop(model)
        assert (loop.bar.n, loop.bar.total) == (10, 15)


def test_disabled_progress_bars_do_not_stop_calibration():
    """What ``diffusers.utils.logging.disable_progress_bar()`` leaves is a bar without numbers."""
    from diffusers.utils import logging as diffusers_logging

    model = torch.nn.Linear(2, 2)
    loop = _Loop(lambda module: module(torch.zeros(1, 2)), passes=3, linears=[])
    diffusers_logging.disable_progress_bar()
    try:
        with loop:
            loop(model)
            loop(model)
    finally:
        diffusers_logging.enable_progress_bar()
    assert (loop.done, loop.forwards) == (2, 2)
