"""export: it leaves the process and the caller's model as they were, and refuses what it cannot do."""

import random
import sys

import numpy
import pytest
import torch

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


def test_progress_counts_forward_passes():
    model = torch.nn.Linear(4, 4)
    loop = _Loop(lambda model: [model(torch.ones(4)) for _ in range(5)], passes=3)
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
    loop = _Loop(lambda module: module(torch.zeros(1, 2)), passes=3)
    diffusers_logging.disable_progress_bar()
    try:
        with loop:
            loop(model)
            loop(model)
    finally:
        diffusers_logging.enable_progress_bar()
    assert (loop.done, loop.forwards) == (2, 2)
