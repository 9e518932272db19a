"""fake_quantize against ModelOpt's real kernel source, and the context manager that installs it."""

import os
import pathlib
import subprocess
import sys

import pytest
import torch

from svdq_compile.quantization.fake_quant import cpu_nvfp4, fake_quantize

INTERPRET = pathlib.Path(__file__).with_name("interpret_kernel.py")


def ties(dtype):
    """Every multiple of 1/8 up to 6 and its neighbours, both signs, in blocks that start with 6."""
    grid = torch.arange(0, 49, dtype=dtype) / 8
    near = torch.cat([grid, torch.nextafter(grid.float(), grid.float() + 1).to(dtype), -grid])
    near = torch.nn.functional.pad(near, (0, -len(near) % 15)).view(-1, 15)
    return torch.cat([torch.full((len(near), 1), 6.0, dtype=dtype), near], dim=1)


def cases():
    g = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=g)

    wide = randn(24, 128) * 10 ** (randn(24, 128) * 4)
    sweep = torch.cat([torch.ones(4096, 1), randn(4096, 15) / 4], 1) * torch.linspace(0, 3000, 4096).view(-1, 1)
    result = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        small = randn(8, 64) * 1e-6
        for x in (randn(40, 96), wide.clamp(-6e4, 6e4), small, ties(dtype), sweep.clamp(-3e3, 3e3)):
            x = x.to(dtype)
            result.append((x, x.abs().amax().float()))
        x = randn(16, 64).to(dtype)
        result.append((x, torch.tensor(0.3)))
        result.append((x, torch.tensor(0.0)))
        result.append((ties(dtype), torch.tensor(6.0 * 448)))
        result.append((randn(5, 40).to(dtype), torch.tensor(2.0)))
        result.append((torch.tensor([[0.0, -0.0, -0.01, 0.01] * 4], dtype=dtype), torch.tensor(1.0)))
        result.append((torch.zeros(2, 32, dtype=dtype), torch.tensor(0.0)))
    return result


def bits(x):
    return x.contiguous().view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def test_every_bit_of_modelopts_kernel(tmp_path):
    pytest.importorskip("modelopt")
    inputs = cases()
    torch.save(inputs, tmp_path / "cases.pt")
    subprocess.run(
        [sys.executable, str(INTERPRET), str(tmp_path / "cases.pt"), str(tmp_path / "results.pt")],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        check=True,
        capture_output=True,
    )
    for (x, amax), expected in zip(inputs, torch.load(tmp_path / "results.pt"), strict=True):
        actual = fake_quantize(x, amax)
        assert actual.dtype == x.dtype
        assert torch.equal(bits(actual), bits(expected)), (x.dtype, x.shape, amax)


def test_per_channel_amax_counts_as_its_maximum():
    x = torch.randn(4, 32)
    assert torch.equal(fake_quantize(x, x.abs().amax(0)), fake_quantize(x, x.abs().amax()))


def test_installs_for_the_duration_and_restores():
    tensor_quant = pytest.importorskip("modelopt.torch.quantization.tensor_quant")
    original = tensor_quant.dynamic_block_quantize_op
    x = torch.randn(4, 32)
    args = (x, 16, x.abs().amax(), None, (2, 1), (4, 3))
    with cpu_nvfp4():
        inside = tensor_quant.dynamic_block_quant(*args)
    assert torch.equal(inside, fake_quantize(x, x.abs().amax()))
    assert tensor_quant.dynamic_block_quantize_op is original
    with pytest.raises(AssertionError, match="CUDA"):
        tensor_quant.dynamic_block_quant(*args)
    with pytest.raises(ZeroDivisionError), cpu_nvfp4():
        raise ZeroDivisionError
    assert tensor_quant.dynamic_block_quantize_op is original


def test_other_formats_reach_modelopts_operator(monkeypatch):
    tensor_quant = pytest.importorskip("modelopt.torch.quantization.tensor_quant")
    calls = []

    def record(*args):
        calls.append(args)
        return args[0]

    monkeypatch.setattr(tensor_quant, "dynamic_block_quantize_op", record)
    x = torch.randn(4, 32)
    with cpu_nvfp4():
        tensor_quant.dynamic_block_quant(x, 32, None, None, (4, 3), (8, 0))
        tensor_quant.dynamic_block_quant(x, 32, x.amax(), None, (2, 1), (4, 3))
        tensor_quant.dynamic_block_quant(x, 16, x.amax(), None, (2, 1), (4, 3))
    assert [args[1] for args in calls] == [32, 32]
